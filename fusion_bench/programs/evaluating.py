"""Evaluates the models of a run, each on its tasks."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lightning.fabric import Fabric
from torch import nn

from fusion_bench.problems import Place, within
from fusion_bench.programs.fusing import MERGED
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.spec import Baselines, Places
from fusion_bench.report import Answers, ModelResult, TaskAnswers, TaskInfo, TaskResult, summarise
from fusion_bench.report.schema import Role
from fusion_bench.storage import write_bytes
from fusion_bench.tasks import canonical_name
from fusion_bench.weights import TensorWeights, Weights, sha256

if TYPE_CHECKING:
    from fusion_bench.taskpool import Score

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates models with a task pool, and collects the results.

    Args:
        modelpool: the models; each is loaded when it is needed.
        taskpool: the tasks; without it, models are only described.
        fabric: the device, precision and processes; all processes must make the same calls.
        baselines: which of the pool's models are evaluated, and on which tasks.
        fast_dev_run: evaluate only the first batch of each task.
        output_dir: the directory for predictions as parquet files, if the task pool saves them.
        place: where the task pool is in the config.

    Attributes:
        models: the results by model name.
        answers: the predictions of each model.
    """

    def __init__(
        self,
        modelpool: PlacedModelPool,
        taskpool: TaskPool | None,
        fabric: Fabric,
        baselines: Baselines,
        fast_dev_run: bool = False,
        output_dir: Path | None = None,
        place: Place = Places.taskpool,
    ):
        self.modelpool = modelpool
        self.taskpool = taskpool
        self.fabric = fabric
        self.baselines = baselines
        self.fast_dev_run = fast_dev_run
        self.output_dir = output_dir
        self.place = place
        self.models: dict[str, ModelResult] = {}
        self.answers = Answers()

    @property
    def task_names(self) -> list[str]:
        """The tasks; none without a task pool."""
        return [] if self.taskpool is None else self.taskpool.task_names

    def evaluate_baselines(self) -> None:
        """Evaluate the pretrained model and the individual ones, as configured."""
        if self.baselines == "none" or self.taskpool is None:
            return
        if self.modelpool.has_pretrained:
            self._evaluate_baseline("_pretrained_", "pretrained")
        self.evaluate_individuals()

    def evaluate_individuals(self) -> None:
        """Evaluate each of the pool's models on its own task, or on all."""
        for name in self.modelpool.model_names:
            tasks = self.own_tasks(name) if self.baselines == "own_task" else None
            if tasks == []:
                log.info("'%s' is not evaluated: no task has this name.", name)
                continue
            self._evaluate_baseline(name, "individual", tasks)

    def take(self, other: "Evaluator") -> None:
        """Add another evaluator's results."""
        self.models |= {name: model.model_copy(deep=True) for name, model in other.models.items()}
        for task, found in other.answers.tasks.items():
            for model in found.predictions:
                self.answers.add(task, model, found)

    def evaluate_merged(self, merged: Mapping[str, nn.Module | Weights]) -> None:
        """Evaluate the merged models."""
        for name, model in merged.items():
            # One of several that bears a task's name is made for that task.
            tasks = self.own_tasks(name.removeprefix(f"{MERGED}/")) or None
            if self.baselines == "all_tasks":
                tasks = None
            if isinstance(model, Weights):
                build = partial(self.modelpool.build_model, model)
                known = self.modelpool.architecture()
                self._evaluate(name, "merged", model, build, known, tasks)
            else:  # what it computes is not told by its weights, so that nothing is kept of it
                weights = TensorWeights(model.state_dict())
                self._evaluate(name, "merged", weights, model, None, tasks)

    def summarise(self) -> None:
        """Fill in normalised accuracies and averages, once all models are evaluated."""
        summarise(self.models, {t: name for name in self.models for t in self.own_tasks(name)})

    def own_tasks(self, model: str) -> list[str]:
        """Return the tasks with a model's name."""
        own = canonical_name(model)
        return [task for task in self.task_names if canonical_name(task) == own]

    def task_infos(self) -> dict[str, TaskInfo]:
        """Describe the tasks that models were evaluated on."""
        if self.taskpool is None:
            return {}
        evaluated = {t: r.num_samples for m in self.models.values() for t, r in m.tasks.items()}
        return {
            task: TaskInfo(
                num_classes=len(self.taskpool.data(task).class_names),
                num_samples=evaluated[task],
                fingerprint=self.taskpool.data(task).fingerprint,
                head_sha256=self.taskpool.head_sha256(task),
                images_sha256=self.taskpool.images_sha256(task),
                class_names=(
                    self.taskpool.data(task).class_names if self.taskpool.per_class else None
                ),
            )
            for task in self.taskpool.task_names
            if task in evaluated
        }

    def _evaluate_baseline(self, name: str, role: Role, tasks: list[str] | None = None) -> None:
        pool = self.modelpool
        build = partial(pool.load_model, name)
        self._evaluate(name, role, pool.weights(name), build, pool.architecture(name), tasks)

    def _evaluate(
        self,
        name: str,
        role: Role,
        weights: Weights,
        model: nn.Module | Callable[[], nn.Module],
        architecture: str | None,
        tasks: list[str] | None,
    ) -> None:
        """Evaluate a model; it is built only if its results are not cached.

        ``architecture`` and the weights define the model's computation.
        """
        identity = sha256(weights)
        own = [weights.spec(key) for key in weights if weights.tied_to(key) == key]
        scores: dict[str, Score] = {}
        if self.taskpool is not None:
            with within(*self.place, keyed_only=True):
                scores = self.taskpool.evaluate(
                    model,
                    self.fabric,
                    tasks,
                    name=name,
                    fast_dev_run=self.fast_dev_run,
                    weights_sha256=None if architecture is None else identity,
                    architecture=architecture or "",
                )
            if self.taskpool.save_predictions and self.fabric.global_rank == 0:
                self._save_predictions(name, scores)
        for task, score in scores.items():
            found = (score.samples, score.labels, score.predictions)
            samples, labels, predictions = (array.astype("int32") for array in found)
            self.answers.add(task, name, TaskAnswers(samples, labels, {name: predictions}))
        self.models[name] = ModelResult(
            role=role,
            weights_sha256=identity,
            num_parameters=sum(spec.numel for spec in own if spec.dtype.is_floating_point),
            tasks={task: self._task_result(task, score) for task, score in scores.items()},
        )

    def _task_result(self, task: str, score: "Score") -> TaskResult:
        per_class = None
        if self.taskpool is not None and self.taskpool.per_class:
            per_class = score.per_class(len(self.taskpool.data(task).class_names))
        return TaskResult.from_counts(
            score.num_correct, score.loss_sum, score.num_samples, per_class
        )

    def _save_predictions(self, model: str, scores: "Mapping[str, Score]") -> None:
        """Write each task's answers as a parquet file."""
        assert self.output_dir is not None
        directory = self.output_dir / "predictions" / quote(model, safe="")
        for task, score in scores.items():
            write_bytes(directory / f"{quote(task, safe='')}.parquet", score.parquet())
