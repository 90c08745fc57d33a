"""Classifying a dataset's images."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.addresses import Folders
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, did_you_mean, within
from fusion_bench.results import ACCURACY, LOSS, Example, Metric, SampleScores
from fusion_bench.storage import check_file_name
from fusion_bench.taskpool.datasets import DatasetPlace, load_split, plan_dataset
from fusion_bench.taskpool.images.classes import some
from fusion_bench.taskpool.images.evaluate import evaluate
from fusion_bench.taskpool.images.labelled import Columns, LabelledImages
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.taskpool.images.tuning import TuningImages
from fusion_bench.taskpool.metrics import chosen_metrics
from fusion_bench.taskpool.task import Evaluation, LearningData, TaskDescription
from fusion_bench.tasks import Task as Settings
from fusion_bench.tasks import load_task
from fusion_bench.tokenizer import TokenizerSource

#: What configs say of a model's form, as far as they say it.
_SIZES = ("hidden_size", "hidden_sizes", "depths", "patch_size", "image_size", "num_hidden_layers")

#: What a task measures of each image.
MEASURED = (ACCURACY, LOSS)

Classify = Callable[[Tensor], Tensor]


@runtime_checkable
class EnsembleClassifier(Protocol):
    """A module whose members are each evaluated, and whose logits are put together."""

    @property
    def members(self) -> Sequence[nn.Module]:
        """Models, each of which makes a classifier."""

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Return one tensor of logits from those of all members."""


class Classifiers(Protocol):
    """What makes a model a classifier of some tasks' images."""

    def preprocessor(self, task: str) -> Preprocessor:
        """Return what becomes of a task's images before a model takes them."""

    def head_identity(self, task: "ImageTask") -> str:
        """Return what a task's classifier depends on, the model aside."""

    def classifier(
        self, task: "ImageTask", model: nn.Module, name: str, fabric: Fabric
    ) -> Classify:
        """Return the function from images to logits that ``model`` makes for a task."""


class ImageTask:
    """The images of a dataset, and their classes.

    Args:
        name: the task's.
        node: the dataset's config node.
        settings: what is known of the dataset beyond its features.
        classifiers: make models classifiers.
        per_class: report each class's accuracy too.
        cache_bytes: what prepared images may take on disk.
        metrics: the most important one first.

    Attributes:
        columns: what was known of the dataset before it was loaded, once ``plan`` has run.
        images: the images and labels, once ``prepare`` has run.
    """

    def __init__(
        self,
        name: str,
        node: Any,
        settings: Settings,
        classifiers: Classifiers,
        per_class: bool,
        cache_bytes: int,
        metrics: Sequence[Metric] = MEASURED,
    ):
        self.name = name
        self.metrics = tuple(metrics)
        self.settings = settings
        self.columns: Columns | None = None
        self._node = node
        self._place = DatasetPlace(("test_datasets", name))
        self._classifiers = classifiers
        self._per_class = per_class
        self._cache_bytes = cache_bytes
        self._loaded_images: LabelledImages | None = None
        self._preprocessor: Preprocessor | None = None
        self._pixels: PreparedImages | None = None

    @property
    def owner(self) -> str | None:
        """The model that was trained for the task, if the config names it."""
        return self.settings.owner

    @property
    def images(self) -> LabelledImages:
        """The images and labels, once ``prepare`` has run."""
        assert self._loaded_images is not None
        return self._loaded_images

    @property
    def preprocessor(self) -> Preprocessor:
        """What becomes of images before a model takes them, once ``prepare`` has run."""
        assert self._preprocessor is not None
        return self._preprocessor

    def __len__(self) -> int:
        return len(self.images)

    def with_tokenizer(self, source: TokenizerSource) -> Self:
        """Return itself, for there are no texts."""
        return self

    def notes(self, model: str, scores: SampleScores) -> list[str]:
        """Return nothing: the scores say it all."""
        return []

    def examples(self, samples: Sequence[int]) -> list[Example]:
        """Return nothing, for there are no texts."""
        return []

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Compare what is known of the dataset with the task."""
        self.columns = self._describe(plan, self._node, self._place, scratch)

    def plan_data(self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None) -> None:
        """Likewise for another dataset of the task."""
        columns = self._describe(plan, node, place, scratch)
        names = columns and columns.class_names, self.columns and self.columns.class_names
        if names[0] and names[1]:
            _refuse_other_classes(place, self.name, names[0], names[1])

    def prepare(self, fabric: Fabric) -> None:
        """Load the dataset and what classifies its images.

        Raises:
            FusionBenchError: a source that cannot be read, a dataset without images or labels.
        """
        self._loaded_images = self._load(self._node, self._place)
        self._preprocessor = self._classifiers.preprocessor(self.name)
        self._classifiers.head_identity(self)  # so that what is not there is noticed now

    def describe(self) -> TaskDescription:
        """Return what the task measures, by default accuracy and loss."""
        own = [self.images.image_column, self.preprocessor.identity]
        return TaskDescription(
            kind="image_classification",
            metrics=self.metrics,
            identity={
                "dataset": self.images.fingerprint,
                "classes, prompts or text tower": _sha256(self._classifiers.head_identity(self)),
                "image preprocessing": _sha256(json.dumps(own)),
            },
            owner=self.owner,
            num_classes=len(self.images.class_names),
            classes=self.images.class_names if self._per_class else None,
        )

    def key(self) -> Mapping[str, Any]:
        """Return what scores depend on besides model and samples."""
        images = self.images
        return {
            "images": [images.fingerprint, images.image_column, self.preprocessor.identity],
            "labels": images.labels_sha256,
            "head": self._classifiers.head_identity(self),
        }

    def evaluate(
        self, model: nn.Module, samples: NDArray[np.int64], how: Evaluation
    ) -> SampleScores:
        """Return each sample's label, prediction and cross entropy."""
        if self._pixels is None:
            self._pixels = PreparedImages(self.images, self.preprocessor, self._cache_bytes)
        return evaluate(
            how.fabric,
            self.classifier(model, how.model, how.fabric),
            self._pixels,
            samples,
            how.loading,
            how.progress,
            how.batch_limit,
        )

    def data(self, name: str, node: Any, place: DatasetPlace, how: Evaluation) -> TuningImages:
        """Return another dataset's images for a method to learn from.

        Raises:
            FusionBenchError: a dataset that cannot be read, or classes that are not the task's.
        """
        with how.fabric.rank_zero_first():
            images = self._load(node, place)
        _refuse_other_classes(place, name, images.class_names, self.images.class_names)

        def classify(model: nn.Module) -> Classify:
            classifier = self.classifier(model, how.model, how.fabric)
            dtype = next(model.parameters()).dtype
            return lambda pixels: classifier(pixels.to(dtype))

        return TuningImages(
            name,
            str(images.dataset.split or ""),
            PreparedImages(images, self.preprocessor, self._cache_bytes),
            self.images,
            self.metrics[0],
            classify,
            how,
        )

    def on(self, data: LearningData) -> Self:
        """Return the task, evaluated on what ``data`` has returned."""
        assert isinstance(data, TuningImages)
        task = copy(self)
        task._loaded_images, task._pixels = data.data, data.images
        return task

    def classifier(self, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return the classifier that a model makes, or that its members make together."""
        make = self._classifiers.classifier
        if not isinstance(model, EnsembleClassifier):
            return make(self, model, name, fabric)
        members = [make(self, member, name, fabric) for member in model.members]
        return lambda images: model.combine([member(images) for member in members])

    def _describe(
        self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None
    ) -> Columns | None:
        """Note what a dataset takes; return its columns, as far as they can be known."""
        described = plan_dataset(plan, node, place, scratch)
        if described is None or described.features is None:
            return None
        columns = Columns(self.name, described.features, self.settings, place, quiet=True)
        split = node.get("split")
        if described.column is not None and (split in described.splits or not described.splits):
            columns.labels(described.column(split, columns.label_column))
        return columns

    def _load(self, node: Any, place: DatasetPlace) -> LabelledImages:
        with place.located():
            dataset = load_split(node)
        return LabelledImages(self.name, dataset, self.settings, place, Folders.of(node))


def image_tasks(
    test_datasets: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]] | None,
    classifiers: Classifiers,
    per_class: bool,
    cache_bytes: int,
    metrics: Sequence[str | Metric] | None,
) -> dict[str, ImageTask]:
    """Return the tasks that a config's datasets make.

    Args:
        test_datasets: task name to dataset node.
        tasks: task name to what differs from the known data.
        classifiers: make models classifiers.
        per_class: report each class's accuracy too.
        cache_bytes: what prepared images may take on disk.
        metrics: names of metrics, the most important one first.

    Raises:
        FusionBenchError: no task, a metric that is not there, or settings of a task that is not
            there or that cannot be.
    """
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
    with within("metrics"):
        chosen = chosen_metrics(metrics, MEASURED)
    found = {}
    for name, node in test_datasets.items():
        with within("test_datasets", name):
            check_file_name(name)
        with within("tasks", name):
            settings = Settings.from_mapping((tasks or {}).get(name, {}), base=load_task(name))
        found[name] = ImageTask(name, node, settings, classifiers, per_class, cache_bytes, chosen)
    return found


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


def cache_bytes(size: int | str) -> int:
    """Return a size such as ``50GB`` in bytes.

    Raises:
        FusionBenchError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    if not found:
        raise FusionBenchError(
            f"'{size}' is not a size. Write it like '50GB'.", place=("cache_size",)
        )
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * 1000**power)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
