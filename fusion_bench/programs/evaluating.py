"""Evaluates the models of a run, each on its tasks."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from fusion_bench.method.contract import FusionMethod, Product
from fusion_bench.method.plain import class_name
from fusion_bench.problems import FusionBenchError, Place, within
from fusion_bench.programs.fusing import MERGED
from fusion_bench.programs.owners import owners
from fusion_bench.programs.pools import EvaluatesParts, ForeseesWork, PlacedModelPool, TaskPool
from fusion_bench.programs.spec import Baselines, Places
from fusion_bench.report import ModelResult, Scores, TaskInfo, TaskResult, metric_info, summarise
from fusion_bench.report.losses import per_class_accuracy
from fusion_bench.report.schema import Role
from fusion_bench.results import SampleScores
from fusion_bench.storage import write_bytes
from fusion_bench.tasks import canonical_name
from fusion_bench.weights import Model, TensorWeights, Weights, sha256

log = logging.getLogger(__name__)

#: Weights, what makes the module, and the architecture.
_Opened = tuple[Weights, nn.Module | Callable[[], nn.Module], str | None]


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
        scores: every model's scores of single samples.
        owners: the model that was trained for each task.
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
        self.scores = Scores()
        self.owners = {} if taskpool is None else owners(taskpool, modelpool.model_names)

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
        for name, tasks in self.individuals():
            if not tasks:
                log.info("'%s' is not evaluated: it has no task of its own.", name)
                continue
            self._evaluate_baseline(name, "individual", tasks)

    def individuals(self) -> list[tuple[str, list[str]]]:
        """Return each of the pool's models with the tasks that it is evaluated on."""
        own = self.baselines == "own_task"
        names = self.modelpool.model_names
        return [(name, self.own_tasks(name) if own else self.task_names) for name in names]

    def baseline_tasks(self) -> list[str]:
        """Return the tasks that ``evaluate_baselines`` evaluates a model on, each time anew."""
        if self.baselines == "none":
            return []
        pretrained = self.task_names if self.modelpool.has_pretrained else []
        return [*pretrained, *(task for _, tasks in self.individuals() for task in tasks)]

    def num_samples(self, tasks: Iterable[str]) -> int | None:
        """Return the samples of all these tasks; ``None`` if the task pool does not tell."""
        pool, quick = self.taskpool, self.fast_dev_run
        if not isinstance(pool, ForeseesWork):
            return None
        return sum(pool.num_samples(task, self.fabric, fast_dev_run=quick) for task in tasks)

    def take(self, other: "Evaluator") -> None:
        """Add another evaluator's results."""
        self.models |= {name: model.model_copy(deep=True) for name, model in other.models.items()}
        for task, models in other.scores.tasks.items():
            for model, found in models.items():
                self.scores.add(task, model, found)

    def evaluate_merged(self, merged: Mapping[str, Product]) -> None:
        """Evaluate the merged models."""
        for name, model in merged.items():
            self._evaluate(name, "merged", *self._opened(model), self.merged_tasks(name))

    def evaluate_part(
        self,
        method: FusionMethod,
        merged: Mapping[str, Product],
        samples: Mapping[str, NDArray[np.int64]],
    ) -> dict[str, SampleScores]:
        """Return a method's scores of some samples of some tasks, by task.

        Raises:
            FusionBenchError: several models for a task.
        """
        assert isinstance(self.taskpool, EvaluatesParts)
        found: dict[str, SampleScores] = {}
        for name, model in merged.items():
            own = {task: samples[task] for task in self.merged_tasks(name) if task in samples}
            if found.keys() & own:
                raise several_models(method, merged)
            if own:
                pool, (weights, build, known) = self.taskpool.part(own), self._opened(model)
                found |= self._scores(pool, name, sha256(weights), build, known, list(own))
        return found

    def _opened(self, model: Product) -> "_Opened":
        """Return weights, what builds the module, and the architecture."""
        if isinstance(model, nn.Module):  # what it computes is not told by its weights
            return TensorWeights(model.state_dict()), model, None
        build = partial(self.modelpool.build_model, model)
        if isinstance(model, Model):
            return model.weights, build, model.architecture
        return model, build, self.modelpool.architecture()

    def merged_tasks(self, name: str) -> list[str]:
        """Return the tasks that a merged model is evaluated on."""
        # One of several that bears a task's name is made for that task.
        own = self.own_tasks(name.removeprefix(f"{MERGED}/"))
        return self.task_names if self.baselines == "all_tasks" or not own else own

    def describe_inputs(self, inputs: Mapping[str, str]) -> None:
        """Add the pool's models that were not evaluated, with their hashes."""
        described = {}
        for name, identity in inputs.items():
            role: Role = "pretrained" if name == "_pretrained_" else "individual"
            described[name] = self.models.get(name) or ModelResult(
                role=role,
                identity=identity,
                num_parameters=_num_parameters(self.modelpool.weights(name)),
                tasks={},
            )
        self.models = described | self.models

    def summarise(self) -> None:
        """Fill in normalised values and averages, once all models are evaluated."""
        summarise(self.models, self.task_infos())

    def own_tasks(self, model: str) -> list[str]:
        """Return the tasks that a model was trained for."""
        own = canonical_name(model)
        return [t for t, owner in self.owners.items() if owner and canonical_name(owner) == own]

    def task_infos(self, *, every: bool = False) -> dict[str, TaskInfo]:
        """Describe the tasks that models were evaluated on, or ``every`` task."""
        if self.taskpool is None:
            return {}
        evaluated = {t: r.num_samples for m in self.models.values() for t, r in m.tasks.items()}
        infos = {}
        for task in self.taskpool.task_names:
            if every or task in evaluated:
                described = self.taskpool.describe(task)
                self.scores.metrics[task] = list(described.metrics)
                infos[task] = TaskInfo(
                    kind=described.kind,
                    main=described.main.name,
                    metrics=[metric_info(metric) for metric in described.metrics],
                    num_samples=evaluated.get(task, 0),
                    identity=dict(described.identity),
                    owner=self.owners[task],
                    num_classes=described.num_classes,
                    classes=None if described.classes is None else list(described.classes),
                )
        return infos

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
        scores: dict[str, SampleScores] = {}
        if self.taskpool is not None:
            scores = self._scores(self.taskpool, name, identity, model, architecture, tasks)
            if self.taskpool.save_predictions and self.fabric.global_rank == 0:
                self._save_predictions(name, scores)
        for task, found in scores.items():
            self.scores.add(task, name, found)
        self.models[name] = ModelResult(
            role=role,
            identity=identity,
            num_parameters=_num_parameters(weights),
            tasks={task: self._task_result(task, found) for task, found in scores.items()},
        )

    def _scores(
        self,
        pool: TaskPool,
        name: str,
        identity: str,
        model: nn.Module | Callable[[], nn.Module],
        architecture: str | None,
        tasks: list[str] | None,
    ) -> dict[str, SampleScores]:
        with within(*self.place, keyed_only=True):
            return pool.evaluate(
                model,
                self.fabric,
                tasks,
                name=name,
                fast_dev_run=self.fast_dev_run,
                weights_sha256=None if architecture is None else identity,
                architecture=architecture or "",
            )

    def _task_result(self, task: str, scores: SampleScores) -> TaskResult:
        assert self.taskpool is not None
        described = self.taskpool.describe(task)
        per_class = None
        if described.classes is not None:
            per_class = per_class_accuracy(scores, len(described.classes))
        return TaskResult.of(scores, described.metrics, per_class)

    def _save_predictions(self, model: str, scores: Mapping[str, SampleScores]) -> None:
        """Write each task's scores of single samples as a parquet file."""
        if self.output_dir is None:
            return
        directory = self.output_dir / "predictions" / quote(model, safe="")
        for task, found in scores.items():
            write_bytes(directory / f"{quote(task, safe='')}.parquet", found.parquet())


def several_models(method: FusionMethod, merged: Iterable[str]) -> FusionBenchError:
    """Return the problem of a search whose method makes several models for a task."""
    return FusionBenchError(
        f"{class_name(method)} returns several models for each task, {', '.join(merged)}, so "
        "there is no single score.",
        "Choose another method.",
        place=("search",),
    )


def _num_parameters(weights: Weights) -> int:
    """Return the number of elements of floating point, each tensor counted once."""
    own = [weights.spec(key) for key in weights if weights.tied_to(key) == key]
    return sum(spec.numel for spec in own if spec.dtype.is_floating_point)
