"""Fuse, then evaluate: the main program."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from urllib.parse import quote

from hydra.utils import get_object
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError, check_choice, did_you_mean
from fusion_bench.instantiate import instantiate
from fusion_bench.programs.environment import describe_run, make_fabric
from fusion_bench.progress import quiet_libraries
from fusion_bench.report import (
    ModelResult,
    Report,
    Seconds,
    TaskInfo,
    TaskResult,
    Tuning,
    TuningTask,
    markdown,
    print_comparison,
    summarise,
)
from fusion_bench.report.schema import Role
from fusion_bench.storage import whole_directory, write_bytes, write_text
from fusion_bench.tasks import canonical_name
from fusion_bench.weights import TensorWeights, Weights, in_memory, sha256

if TYPE_CHECKING:
    from fusion_bench.taskpool import Score, TuningImages

log = logging.getLogger(__name__)

#: What the fused model is called; one of several has its own name after a slash.
_MERGED = "merged"

Baselines = Literal["own_task", "all_tasks", "none"]


@runtime_checkable
class Savable(Protocol):
    """A module that is no plain checkpoint, and writes itself."""

    def save(self, directory: Path, modelpool: Any, config: Mapping[str, Any]) -> None:
        """Write the directory, whole or not at all."""


class FabricModelFusionProgram:
    """Fuses a model pool with a method and judges the result beside the models it came from.

    Args:
        method: the fusion method, as config node or object; so are the next three.
        modelpool: the models.
        taskpool: the tasks; without it nothing is judged.
        fabric: ``lightning.Fabric``'s arguments; by default one process on the best device.
        output_dir: where the report and the config go; ``None`` writes none.
        seed: seeds every random number generator.
        baselines: what is judged beside the merged model: the pretrained model on every task and
            each individual model on its ``own_task``, on ``all_tasks``, or ``none`` of them.
        report_save_path: one more place for the report's JSON; ``{log_dir}`` in it is
            ``output_dir``.
        merged_model_save_path: directory for the merged model; likewise.
        overwrite: replace what is at these two paths.
        allow_test_split: let the method learn from data that the models are judged on.
        fast_dev_run: judge only the first batch of each task.
        dry_run: check the config and stop before anything is loaded.
    """

    def __init__(
        self,
        method: Any,
        modelpool: Any,
        taskpool: Any = None,
        fabric: Any = None,
        output_dir: str | Path | None = None,
        seed: int | None = None,
        baselines: Baselines = "own_task",
        report_save_path: str | None = None,
        merged_model_save_path: str | None = None,
        overwrite: bool = False,
        allow_test_split: bool = False,
        fast_dev_run: bool = False,
        dry_run: bool = False,
    ):
        self.config: dict[str, Any] = {
            "_target_": f"fusion_bench.programs.{type(self).__name__}",
            "_recursive_": False,
            "method": _plain(method),
            "modelpool": _plain(modelpool),
            "taskpool": _plain(taskpool),
            "fabric": _plain(fabric),
            "seed": seed,
            "baselines": baselines,
            "report_save_path": report_save_path,
            "merged_model_save_path": merged_model_save_path,
            "overwrite": overwrite,
            "allow_test_split": allow_test_split,
            "fast_dev_run": fast_dev_run,
            "dry_run": dry_run,
        }
        check_choice("baselines", baselines, Baselines)
        if seed is not None and not isinstance(seed, int):
            raise FusionBenchError(f"seed: '{seed}' is not a whole number.")
        self.method = instantiate(_seeded(method, seed), "method")
        self.modelpool = instantiate(_lazily(modelpool), "modelpool")
        self.taskpool = instantiate(_lazily(taskpool), "taskpool")
        if output_dir is None and getattr(self.taskpool, "save_predictions", False):
            raise FusionBenchError("taskpool.save_predictions: needs an output_dir.")
        self.fabric_config = fabric
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.seed = seed
        self.baselines = baselines
        self.allow_test_split = allow_test_split
        self.fast_dev_run = fast_dev_run
        self.dry_run = dry_run
        self.report_path = self._destination("report_save_path", report_save_path, overwrite)
        self.model_path = self._destination(
            "merged_model_save_path", merged_model_save_path, overwrite
        )

    def run(self) -> Report | None:
        """Fuse, judge, save and print; returns the report, or ``None`` after a dry run."""
        if self.dry_run:
            log.info("Dry run: the config is sound; nothing was loaded.")
            return None
        self._quiet_libraries()
        fabric = make_fabric(self.fabric_config)
        log.info(
            "Fusing %s with %s", ", ".join(self.modelpool.model_names), type(self.method).__name__
        )
        report: Report = fabric.launch(self._fuse_and_judge)
        if fabric.global_rank == 0:  # where processes were started by us, this one is their parent
            self._publish(report)
        return report

    def _fuse_and_judge(self, fabric: Fabric) -> Report:
        """Do the work; called in every process, with the same result in each."""
        self._quiet_libraries()  # again, for a process that was spawned
        if self.seed is not None:
            fabric.seed_everything(self.seed, verbose=False)
        clock = _Clock()
        with clock.measure("load"):
            if self.taskpool is not None:
                self.taskpool.prepare(fabric)
            data = self._tuning_data(fabric) if _needs_data(self.method) else None
        with clock.measure("fuse"):
            merged = self._fuse(fabric, data)
        with clock.measure("evaluate"):
            models = self._judge_all(fabric, merged)
        seconds = Seconds(**clock.seconds, total=clock.total())
        own_model = {task: name for name in models for task in self._own_tasks(name)}
        summarise(models, own_model)
        return Report(
            run=describe_run(fabric, self.config, self.seed, seconds, self._tuning(data)),
            tasks=self._task_infos(models),
            models=models,
        )

    def _quiet_libraries(self) -> None:
        if self.taskpool is not None:  # a merge alone imports neither transformers nor datasets
            quiet_libraries()

    def _tuning_data(self, fabric: Fabric) -> "dict[str, TuningImages]":
        """Return what the method learns from; of the test split only if that is allowed."""
        split = self.method.split
        key = {"validation": "val_datasets"}.get(split, f"{split}_datasets")
        datasets, where = getattr(self.modelpool, key, None), f"modelpool.{key}"
        if self.taskpool is None:
            raise FusionBenchError(
                f"{type(self.method).__name__} learns from data; give the task pool that its "
                "classifiers are from."
            )
        if split == "test" and not datasets:
            datasets, where = self.taskpool.test_datasets, "taskpool.test_datasets"
        if not datasets:
            raise FusionBenchError(
                f"{where}: missing; {type(self.method).__name__} learns from the {split} split. "
                "Name a dataset for each model there, or choose another method.split."
            )
        data: dict[str, TuningImages] = self.taskpool.tuning(datasets, fabric, where)
        for name, images in data.items():
            if not self.allow_test_split and images.is_test(self.taskpool.data(images.task)):
                raise FusionBenchError(
                    f"{where}.{name}: the models are judged on this very split. Learn from another "
                    "(method.split=train or validation), or give allow_test_split=true; the report "
                    "will say so."
                )
        return data

    def _tuning(self, data: "Mapping[str, TuningImages] | None") -> Tuning | None:
        """Return what the report says of the data that the method learned from."""
        if data is None:
            return None
        assert self.taskpool is not None
        judged = self.taskpool.data
        return Tuning(
            split=self.method.split,
            labels=self.method.uses_labels,
            test_split=any(images.is_test(judged(images.task)) for images in data.values()),
            tasks={
                name: TuningTask(num_samples=len(images), fingerprint=images.data.fingerprint)
                for name, images in data.items()
            },
        )

    def _fuse(
        self, fabric: Fabric, data: "Mapping[str, TuningImages] | None"
    ) -> dict[str, nn.Module | Weights]:
        """Return what the method makes, by name; saved, where a path is given.

        Merged weights are computed as they are written; they are held in memory only if they are
        to be judged or to be thrown away.
        """
        offered = {"fabric": fabric, "data": data}
        wanted = {k: v for k, v in offered.items() if k in signature(self.method.run).parameters}
        merged = _named(self.method.run(self.modelpool, **wanted))
        if self.taskpool is not None or self.model_path is None:
            for name, model in merged.items():
                if isinstance(model, Weights):
                    merged[name] = TensorWeights(in_memory(model))
        if self.model_path is None:
            return merged
        places = {
            name: self.model_path / quote(name.removeprefix(_MERGED).lstrip("/"), safe="")
            for name in merged
        }
        if fabric.global_rank == 0:
            with _whole(self.model_path, several=list(merged) != [_MERGED]) as whole:
                for name, place in places.items():
                    self._save(merged[name], whole / place.relative_to(self.model_path))
        fabric.barrier()
        if self.taskpool is not None:
            return merged
        for name, place in places.items():
            if isinstance(merged[name], Weights):
                merged[name] = self.modelpool.open_saved(place)
        return merged

    def _save(self, model: nn.Module | Weights, place: Path) -> None:
        try:
            if isinstance(model, Savable):
                model.save(place, self.modelpool, self.config)
            else:
                self.modelpool.save_model(model, place, self.config)
        except OSError as error:
            raise FusionBenchError(f"merged_model_save_path: cannot write it: {error}") from error

    def _judge_all(
        self, fabric: Fabric, merged: Mapping[str, nn.Module | Weights]
    ) -> dict[str, ModelResult]:
        """Judge baselines and merged models; each model is loaded when its turn comes."""
        results: dict[str, ModelResult] = {}
        if self.baselines != "none" and self.taskpool is not None:
            if self.modelpool.has_pretrained:
                results["_pretrained_"] = self._judge_baseline(fabric, "_pretrained_", "pretrained")
            for name in self.modelpool.model_names:
                tasks = self._own_tasks(name) if self.baselines == "own_task" else None
                if tasks == []:
                    log.info("'%s' is judged on no task: none bears its name.", name)
                    continue
                results[name] = self._judge_baseline(fabric, name, "individual", tasks)
        for name, model in merged.items():
            # One of several that bears a task's name is made for that task.
            tasks = self._own_tasks(name.removeprefix(f"{_MERGED}/")) or None
            if self.baselines == "all_tasks":
                tasks = None
            if isinstance(model, Weights):
                build = partial(self.modelpool.build_model, model)
                known = self.modelpool.architecture()
                results[name] = self._judge(fabric, name, "merged", model, build, known, tasks)
            else:  # what it computes is not told by its weights, so that nothing is kept of it
                weights = TensorWeights(model.state_dict())
                results[name] = self._judge(fabric, name, "merged", weights, model, None, tasks)
        return results

    def _judge_baseline(
        self, fabric: Fabric, name: str, role: Role, tasks: list[str] | None = None
    ) -> ModelResult:
        pool = self.modelpool
        build = partial(pool.load_model, name)
        architecture = pool.architecture(name)
        return self._judge(fabric, name, role, pool.weights(name), build, architecture, tasks)

    def _judge(
        self,
        fabric: Fabric,
        name: str,
        role: Role,
        weights: Weights,
        model: nn.Module | Callable[[], nn.Module],
        architecture: str | None,
        tasks: list[str] | None = None,
    ) -> ModelResult:
        """Judge a model, which is only built if its results are not known.

        ``architecture`` tells, with the weights, what the model computes.
        """
        identity = sha256(weights)
        own = [weights.spec(key) for key in weights if weights.tied_to(key) == key]
        scores: dict[str, Score] = {}
        if self.taskpool is not None:
            scores = self.taskpool.evaluate(
                model,
                fabric,
                tasks,
                name=name,
                fast_dev_run=self.fast_dev_run,
                weights_sha256=None if architecture is None else identity,
                architecture=architecture or "",
            )
            if self.taskpool.save_predictions and fabric.global_rank == 0:
                self._save_predictions(name, scores)
        return ModelResult(
            role=role,
            weights_sha256=identity,
            num_parameters=sum(spec.numel for spec in own if spec.dtype.is_floating_point),
            tasks={task: self._task_result(task, score) for task, score in scores.items()},
        )

    def _task_result(self, task: str, score: "Score") -> TaskResult:
        assert self.taskpool is not None
        per_class = None
        if self.taskpool.per_class:
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

    def _own_tasks(self, model: str) -> list[str]:
        names = [] if self.taskpool is None else self.taskpool.task_names
        return [task for task in names if canonical_name(task) == canonical_name(model)]

    def _task_infos(self, models: Mapping[str, ModelResult]) -> dict[str, TaskInfo]:
        if self.taskpool is None:
            return {}
        judged = {t: r.num_samples for m in models.values() for t, r in m.tasks.items()}
        return {
            task: TaskInfo(
                num_classes=len(self.taskpool.data(task).class_names),
                num_samples=judged[task],
                fingerprint=self.taskpool.data(task).fingerprint,
                class_names=(
                    self.taskpool.data(task).class_names if self.taskpool.per_class else None
                ),
            )
            for task in self.taskpool.task_names
            if task in judged
        }

    def _publish(self, report: Report) -> None:
        """Write the report's files and print the comparison."""
        if report.tasks:
            console = Console()
            if not console.is_terminal:
                console.width = 200  # a log or a pipe has no width of its own
            print_comparison(report, console)
        if self.model_path is not None:
            log.info("Merged model: %s", self.model_path)
        elif not report.tasks:
            log.warning(
                "The merged model was neither judged nor saved; give a task pool or %s.",
                "merged_model_save_path",
            )
        if report.run.tuning is not None and report.run.tuning.test_split:
            log.warning("The merged model was %s.", report.run.tuning.sentence())
        if self.fast_dev_run and report.tasks:
            log.warning("Only the first batch of each task was judged (fast_dev_run).")
        if self.output_dir is not None:
            write_text(self.output_dir / "config.yaml", OmegaConf.to_yaml(self.config))
            write_text(self.output_dir / "report.md", markdown(report))
            report.save(self.output_dir / "report.json")
            log.info("Report: %s", self.output_dir / "report.md")
        if self.report_path is not None:
            try:
                report.save(self.report_path)
            except OSError as error:
                raise FusionBenchError(f"report_save_path: cannot write it: {error}") from error
            log.info("Report: %s", self.report_path)

    def _destination(self, key: str, path: str | None, overwrite: bool) -> Path | None:
        if path is None:
            return None
        for placeholder in re.findall(r"\{(\w*)\}", path):
            if placeholder != "log_dir":
                raise FusionBenchError(
                    f"{key}: '{{{placeholder}}}' is unknown. "
                    + did_you_mean(placeholder, ["log_dir"])
                )
        if "{log_dir}" in path and self.output_dir is None:
            raise FusionBenchError(f"{key}: '{{log_dir}}' needs an output_dir.")
        place = Path(path.replace("{log_dir}", str(self.output_dir))).expanduser().absolute()
        if place.exists() and not overwrite:
            raise FusionBenchError(
                f"{key}: '{place}' exists already. Choose another path, or give overwrite=true."
            )
        return place


class _Clock:
    """Measures named steps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)

    def total(self) -> float:
        return round(time.perf_counter() - self._start, 3)


def _named(result: Any, name: str = _MERGED) -> dict[str, nn.Module | Weights]:
    """Return by name what a method returned: weights, a module, or a family of either."""
    if isinstance(result, nn.Module | Weights):
        return {name: result}
    if all(isinstance(value, Tensor) for value in result.values()):
        return {name: TensorWeights(result)}
    parts = [_named(part, f"{name}/{own}") for own, part in result.items()]
    return {key: model for part in parts for key, model in part.items()}


@contextmanager
def _whole(directory: Path, *, several: bool) -> Iterator[Path]:
    """Yield where models go: several together take the place of what was in the directory."""
    if not several:
        yield directory  # a model alone sees to that itself
        return
    with whole_directory(directory) as place:
        yield place


def _seeded(method: Any, seed: int | None) -> Any:
    """Return a method's node with the program's seed, where it takes one and names none."""
    node = _plain(method)
    if seed is None or not isinstance(node, Mapping) or "seed" in node:
        return method
    with suppress(ImportError, AttributeError, TypeError, ValueError):
        if "seed" in signature(get_object(str(node.get("_target_")))).parameters:
            return {**node, "seed": seed}
    return method


def _needs_data(method: Any) -> bool:
    return bool(getattr(method, "needs_data", False))


def _lazily(section: Any) -> Any:
    # A pool's datasets and models are made when their turn comes, also where the YAML forgets
    # to say so.
    return {"_recursive_": False, **section} if isinstance(section, Mapping) else section


def _plain(section: Any) -> Any:
    if OmegaConf.is_config(section):
        return OmegaConf.to_container(section, resolve=True)
    if section is None or isinstance(section, Mapping):
        return section
    return f"{type(section).__module__}.{type(section).__qualname__}"
