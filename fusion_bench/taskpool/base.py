"""What the image-classification task pools have in common."""

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.addresses import Folders
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import FusionBenchError, Place, did_you_mean, within
from fusion_bench.repository import hub_cache
from fusion_bench.storage import check_file_name
from fusion_bench.taskpool.classes import some
from fusion_bench.taskpool.described import datasets_cache, describe, load_split
from fusion_bench.taskpool.evaluate import BatchLimit, Loading, check_loading, evaluate
from fusion_bench.taskpool.images import Columns, DatasetPlace, LabelledImages
from fusion_bench.taskpool.pixels import PreparedImages
from fusion_bench.taskpool.preprocess import Preprocessor
from fusion_bench.taskpool.results import ResultStore, Score
from fusion_bench.taskpool.tuning import TuningImages
from fusion_bench.tasks import Task, canonical_name, load_task

log = logging.getLogger(__name__)

#: Draws the samples of ``max_samples``; the same ones in every run.
_SUBSET_SEED = 0
#: Seconds to wait for another run, where several processes of this one wait.
_PATIENCE = 300
#: What configs say of a model's form, as far as they say it.
_SIZES = ("hidden_size", "hidden_sizes", "depths", "patch_size", "image_size", "num_hidden_layers")

Classify = Callable[[Tensor], Tensor]


@runtime_checkable
class EnsembleClassifier(Protocol):
    """A module whose members are each evaluated, and whose logits are put together."""

    @property
    def members(self) -> Sequence[nn.Module]:
        """Models, each of which makes a classifier."""

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Return one tensor of logits from those of all members."""


class ImageTaskPool(ABC):
    """Image-classification tasks; subclasses say what makes a model a classifier.

    Args:
        test_datasets: task name to dataset node.
        dataloader_kwargs: ``batch_size`` and ``num_workers``, which suit the device where they are
            not given.
        tasks: task name to what differs from the known data: ``class_names``, ``templates``,
            ``image_column``, ``label_column``.
        max_samples: evaluate no more than so many samples of each task, a random subset that is the
            same in every run.
        per_class: report each class's accuracy too.
        save_predictions: leave each model's answers as parquet files beside the report.
        cache: keep prepared images, text heads and results on disk and use what is there.
        cache_size: what prepared images may take on disk, ``50GB`` for one; those unused for
            longest make room.
        compile: compile the models with ``torch.compile``.

    Raises:
        FusionBenchError: no task, settings of a task that is not there or that cannot be, or a
            name that no file can have.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        dataloader_kwargs: Mapping[str, Any] | None,
        tasks: Mapping[str, Mapping[str, Any]] | None,
        max_samples: int | None,
        per_class: bool,
        save_predictions: bool,
        cache: bool,
        cache_size: int | str,
        compile: bool,
    ):
        if not test_datasets:
            raise FusionBenchError(
                "there is no task.",
                "Name at least one dataset, for example "
                "'mnist: {_target_: datasets.load_dataset, path: ylecun/mnist, split: test}'.",
                place=("test_datasets",),
            )
        for name in tasks or {}:
            if name not in test_datasets:
                raise FusionBenchError(
                    "there is no such task.",
                    f"{did_you_mean(name, test_datasets)} To take its settings away too: "
                    f"'~{{here}}{name}'.",
                    place=("tasks", name),
                )
        if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
            raise FusionBenchError(f"'{max_samples}' is not 1 or more.", place=("max_samples",))
        for name in test_datasets:
            with within("test_datasets", name):
                check_file_name(name)
        check_loading(dataloader_kwargs or {})
        self.task_names: list[str] = list(test_datasets)
        self.per_class = per_class
        self.save_predictions = save_predictions
        self.test_datasets = dict(test_datasets)
        self._dataloader_kwargs = dict(dataloader_kwargs or {})
        self._tasks: dict[str, Task] = {}
        for name in self.test_datasets:
            with within("tasks", name):
                own = (tasks or {}).get(name, {})
                self._tasks[name] = Task.from_mapping(own, base=load_task(name))
        self._max_samples = max_samples
        self._cache_bytes = _bytes(cache_size) if cache else 0
        self._results = ResultStore() if cache else None
        self._compile = compile
        self._described: dict[str, Columns | None] = {}
        self._batch_limit = BatchLimit()
        self._data: dict[str, LabelledImages] = {}
        self._images: dict[str, PreparedImages] = {}
        self._preprocessors: dict[str, Preprocessor] = {}

    @property
    def notes(self) -> list[str]:
        """What the report is to say of how models were evaluated."""
        if self._batch_limit.most is None:
            return []
        return [f"Memory ran out: {self._batch_limit.most} images were evaluated at a time."]

    @abstractmethod
    def image_processor(self, task: str) -> Any:
        """Return the image processor of a task."""

    @abstractmethod
    def head_identity(self, task: str) -> str:
        """Return what a task's classifier depends on, the model aside."""

    def images_sha256(self, task: str) -> str:
        """Return the hash of how a task's images are prepared, once ``prepare`` has run."""
        own = [self._data[task].image_column, self._preprocessors[task].identity]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()

    def head_sha256(self, task: str) -> str:
        """Return the hash of what makes a task's classifier, the model aside."""
        return hashlib.sha256(self.head_identity(task).encode()).hexdigest()

    @abstractmethod
    def classifier(self, task: str, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return the function from images to logits that ``model`` makes for a task."""

    @abstractmethod
    def find_models(self, plan: Plan, scratch: Path | None) -> None:
        """Find what makes a model a classifier; note what is not here and what is wrong."""

    def plan(self, scratch: Path | None = None) -> Plan:
        """Compare what is known of the datasets with the tasks; no data is read.

        Args:
            scratch: where small files go that are not here, for a run that leaves nothing.
        """
        plan = Plan()
        for name, node in self.test_datasets.items():
            place = DatasetPlace(("test_datasets", name))
            with plan.collect():
                self._described[name] = self._describe(plan, name, node, place, scratch)
        self.find_models(plan, scratch)
        return plan

    def plan_tuning(
        self, datasets: Mapping[str, Any], place: Place, scratch: Path | None = None
    ) -> Plan:
        """Likewise for the datasets that ``tuning`` is given, once ``plan`` has run."""
        plan = Plan()
        for name, node in datasets.items():
            own = DatasetPlace((*place, name), whole=True)
            with plan.collect():
                task = self._task_of(name, node, own)
                columns = self._describe(plan, task, node, own, scratch)
                evaluated = self._described.get(task)
                names = columns and columns.class_names, evaluated and evaluated.class_names
                if names[0] and names[1]:
                    _refuse_other_classes(own, task, names[0], names[1])
        return plan

    def _describe(
        self, plan: Plan, task: str, node: Any, place: DatasetPlace, scratch: Path | None
    ) -> Columns | None:
        """Note what a dataset takes; return its columns, as far as they can be known."""
        with place.located():
            described = describe(node, scratch)
        if described is None:
            return None
        if described.download != 0:
            plan.add(Step("download", node["path"], described.download, hub_cache(), "HF_HOME"))
        if described.prepared:
            cache = Path(node.get("cache_dir") or datasets_cache())
            plan.add(Step("prepare", node["path"], described.prepared, cache, "HF_HOME"))
        if described.features is None:
            return None
        columns = Columns(task, described.features, self._tasks[task], place, quiet=True)
        split = node.get("split")
        if described.column is not None and (split in described.splits or not described.splits):
            columns.labels(described.column(split, columns.label_column))
        return columns

    def prepare(self, fabric: Fabric) -> None:
        """Load the datasets, image processors and classifiers; done once.

        Raises:
            FusionBenchError: a source that cannot be read, a dataset without images or labels.
        """
        if self._preprocessors:
            return
        with fabric.rank_zero_first():  # so that only one process downloads
            for name in self.task_names:
                place = DatasetPlace(("test_datasets", name))
                self._data[name] = self._loaded(name, self.test_datasets[name], place)
            found: dict[str, Preprocessor] = {}
            for name in self.task_names:
                own = Preprocessor(self.image_processor(name))
                same = (p for p in found.values() if p.identity == own.identity)
                found[name] = next(same, own)
                self.head_identity(name)  # so that what is not there is noticed now
        self._preprocessors = found

    def tuning(
        self, datasets: Mapping[str, Any], fabric: Fabric, place: Place
    ) -> dict[str, TuningImages]:
        """Return what a method may learn from, by the datasets' names.

        Args:
            datasets: name of a task of this pool to dataset node.
            fabric: gives the device.
            place: the datasets' whole place in the config, which need not be in this pool.

        Raises:
            FusionBenchError: a name that is no task's, a dataset that cannot be read, or classes
                that are not the task's.
        """
        self.prepare(fabric)
        loading = Loading.for_device(self._dataloader_kwargs, fabric)
        tuning = {}
        for name, node in datasets.items():
            own = DatasetPlace((*place, name), whole=True)
            task = self._task_of(name, node, own)
            with fabric.rank_zero_first():
                data = self._loaded(task, node, own)
            _refuse_other_classes(own, task, data.class_names, self._data[task].class_names)
            tuning[name] = TuningImages(
                task,
                str(data.dataset.split or ""),
                PreparedImages(data, self._preprocessors[task], self._cache_bytes),
                partial(self._tuned_classifier, task, fabric),
                fabric,
                loading,
                self._batch_limit,
            )
        return tuning

    def _loaded(self, task: str, node: Any, place: DatasetPlace) -> LabelledImages:
        """Load a dataset of a task."""
        with place.located():
            dataset = load_split(node)
        return LabelledImages(task, dataset, self._tasks[task], place, Folders.of(node))

    def _task_of(self, name: str, node: Any, place: DatasetPlace) -> str:
        """Return the task that the dataset called ``name`` belongs to."""
        known = {canonical_name(task): task for task in self.task_names}
        task = known.get(canonical_name(name))
        if task is None:
            raise place.refusal(
                "the task pool has no such task.", did_you_mean(name, self.task_names)
            )
        if node is None:
            raise place.refusal("names no dataset.", f"To leave it out: '~{place}'.")
        return task

    def evaluating(self, data: Mapping[str, TuningImages]) -> Self:
        """Return a pool that evaluates on what ``tuning`` gave, and is like this one otherwise."""
        pool = copy(self)
        images = {own.task: own.images for own in data.values()}
        pool.task_names = [task for task in self.task_names if task in images]
        pool._images = images
        pool._data = {task: own.data for task, own in images.items()}
        pool._preprocessors = {task: self._preprocessors[task] for task in pool.task_names}
        return pool

    def _tuned_classifier(self, task: str, fabric: Fabric, model: nn.Module) -> Classify:
        classify = self._classifier(task, model, "merged", fabric)
        dtype = next(model.parameters()).dtype
        return lambda images: classify(images.to(dtype))

    def _classifier(self, task: str, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return the classifier that a model makes, or that its members make together."""
        if not isinstance(model, EnsembleClassifier):
            return self.classifier(task, model, name, fabric)
        members = [self.classifier(task, member, name, fabric) for member in model.members]
        return lambda images: model.combine([member(images) for member in members])

    def data(self, name: str) -> LabelledImages:
        """Return a task's images and labels, once ``prepare`` has run."""
        return self._data[name]

    def evaluate(
        self,
        model: nn.Module | Callable[[], nn.Module],
        fabric: Fabric,
        tasks: Sequence[str] | None = None,
        *,
        name: str = "model",
        fast_dev_run: bool = False,
        weights_sha256: str | None = None,
        architecture: str = "",
    ) -> dict[str, Score]:
        """Evaluate a model on ``tasks``, by default all.

        Args:
            model: a module, moved to Fabric's device, or what makes one when it is needed.
            fabric: gives device, precision and processes; all of them must call this.
            tasks: names out of ``task_names``.
            name: what the progress bar calls the model.
            fast_dev_run: only the first batch of each task.
            weights_sha256: the hash of the model's weights. With it, results that are known are
                taken from the cache, and new ones are kept.
            architecture: what else the model's answers depend on, beside the weights.
        """
        self.prepare(fabric)
        loading = Loading.for_device(self._dataloader_kwargs, fabric)
        module: nn.Module | None = None
        known: list[str] = []
        scores: dict[str, Score] = {}
        wanted = self.task_names if tasks is None else tasks
        # Tasks that another run is evaluating just now are left for later.
        patience = -1 if fabric.world_size == 1 else _PATIENCE
        for timeout, task in product((0, patience), wanted):
            if task in scores:
                continue
            samples = self._samples(task, loading.batch_size if fast_dev_run else None)
            key = self._key(task, samples, fabric, weights_sha256)
            if key is not None:
                key["architecture"] = architecture
            score = self._known(key, fabric)
            with self._alone(key if score is None else None, fabric, timeout) as mine:
                if not mine:
                    continue
                score = score or self._known(key, fabric)  # another run may have just kept it
                if score is not None:
                    known.append(task)
                else:
                    if module is None:
                        module = self._on_device(model, fabric)
                    score = evaluate(
                        fabric,
                        self._classifier(task, module, name, fabric),
                        self._prepared(task),
                        samples,
                        replace(loading, full_batches=self._compile),
                        f"evaluating {name} on {task}",
                        self._batch_limit,
                    )
                    if key is not None and self._results is not None and fabric.global_rank == 0:
                        self._results.save(key, score)
            scores[task] = score
        if known:
            log.info("'%s' was evaluated before on %s.", name, ", ".join(known))
        return {task: scores[task] for task in wanted}

    @contextmanager
    def _alone(self, key: dict[str, Any] | None, fabric: Fabric, timeout: float) -> Iterator[bool]:
        """Let the first process lock a result against other runs; yield whether it has the lock."""
        with ExitStack() as held:
            mine = True
            if key is None or self._results is None:
                yield mine
                return
            if fabric.global_rank == 0:
                mine = held.enter_context(self._results.alone(key, timeout))
            yield fabric.broadcast(mine) if fabric.world_size > 1 else mine

    def _on_device(self, model: nn.Module | Callable[[], nn.Module], fabric: Fabric) -> nn.Module:
        module = model if isinstance(model, nn.Module) else model()
        module = fabric.strategy.precision.convert_module(module)
        module = fabric.to_device(module).eval()
        if self._compile:
            getattr(module, "base_model", module).compile()
        return module

    def _samples(self, task: str, first: int | None) -> NDArray[np.int64]:
        """Return which samples are evaluated: all, a fixed random subset, or the first few."""
        count = len(self._data[task])
        samples = np.arange(count, dtype=np.int64)
        if self._max_samples is not None and self._max_samples < count:
            drawn = np.random.default_rng(_SUBSET_SEED).permutation(count)
            samples = np.sort(drawn[: self._max_samples]).astype(np.int64)
        return samples if first is None else samples[:first]

    def identity(self, task: str, fabric: Fabric) -> str | None:
        """Return a hash of what a result depends on besides the model; None if none is kept."""
        key = self._key(task, self._samples(task, None), fabric, "")
        return None if key is None else hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _key(
        self, task: str, samples: NDArray[np.int64], fabric: Fabric, weights_sha256: str | None
    ) -> dict[str, Any] | None:
        """Return all that a result depends on; None where it cannot be known again."""
        if weights_sha256 is None or self._results is None:
            return None
        data = self._data[task]
        return {
            "weights": weights_sha256,
            "images": [data.fingerprint, data.image_column, self._preprocessors[task].identity],
            "labels": data.labels_sha256,
            "samples": hashlib.sha256(samples.data).hexdigest(),
            "head": self.head_identity(task),
            "precision": str(fabric.strategy.precision.precision),
            "device": fabric.device.type,
            "compile": self._compile,
        }

    def _known(self, key: dict[str, Any] | None, fabric: Fabric) -> Score | None:
        """Return what the first process finds in the cache, so that all take the same way."""
        if key is None or self._results is None:
            return None
        found = self._results.load(key) if fabric.global_rank == 0 else None
        return fabric.broadcast(found) if fabric.world_size > 1 else found

    def _prepared(self, task: str) -> PreparedImages:
        if task not in self._images:
            self._images[task] = PreparedImages(
                self._data[task], self._preprocessors[task], self._cache_bytes
            )
        return self._images[task]


def _refuse_other_classes(
    place: DatasetPlace, task: str, names: list[str], expected: list[str]
) -> None:
    if names == expected:
        return
    alone = [name for name in names if name not in expected]
    lacking = [name for name in expected if name not in names]
    difference = f" It alone has {some(alone)}." if alone else ""
    difference += f" It lacks {some(lacking)}." if lacking else ""
    remedy = ""
    if bool(alone) != bool(lacking):
        remedy = f"If labels are text, list all in the task pool's 'tasks.{task}.class_names'."
    raise place.refusal(
        f"its classes are not those of '{task}'.{difference or ' They come in another order.'}",
        remedy,
    )


def differing_sizes(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each size in which two models' configs differ: its name and both values."""
    for field in _SIZES:
        values = getattr(one, field, None), getattr(other, field, None)
        if None not in values and values[0] != values[1]:
            yield field, *values


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    if not found:
        raise FusionBenchError(
            f"'{size}' is not a size. Write it like '50GB'.", place=("cache_size",)
        )
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * 1000**power)
