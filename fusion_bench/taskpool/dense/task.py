"""What all tasks with an answer for each pixel have in common."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.fabric import Fabric
from numpy import float64, generic, int64
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, Place
from fusion_bench.results import Example, Metric, SampleScores
from fusion_bench.taskpool.datasets import DatasetPlace, load_split, plan_dataset
from fusion_bench.taskpool.dense.data import DenseImages, find_columns, load_images
from fusion_bench.taskpool.dense.heads import DenseHead, Predict
from fusion_bench.taskpool.dense.measures import resized
from fusion_bench.taskpool.dense.tuning import DenseData
from fusion_bench.taskpool.images.evaluate import Measured, measured
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.taskpool.images.task import EnsembleClassifier, cache_bytes
from fusion_bench.taskpool.task import Evaluation, LearningData, TaskDescription
from fusion_bench.tokenizer import TokenizerSource


class DenseTask(ABC):
    """Images with an answer for each pixel; a head on the encoder predicts it.

    A prediction is resized to its target's resolution, and measured there.

    Attributes:
        name: the task's.
        settings: the task's place in the task pool.
        head: the head.

    Args:
        dataset: the dataset's config node.
        head: a folder, a repository on the Hub or a ``zoo:`` name with a ``PatchHead``; or a module
            from features, (n, hidden, rows, columns), to values, (n, channels, h, w).
        target_column: the column that holds the targets.
        image_column: the column that holds the images; by default the only one.
        processor: the image processor; by default the one beside the head.
        owner: the model that was trained for the task; by default the one of the same name.
        cache_size: what prepared images may take on disk, such as ``50GB``; 0 keeps none.
        name: the task's; the task pool gives it.
        channels: how many values the head gives for a pixel; ``None`` if only the head knows.
    """

    kind: ClassVar[str]
    metrics: ClassVar[Sequence[Metric]]

    def __init__(
        self,
        dataset: Any,
        head: Any,
        target_column: str,
        image_column: str | None = None,
        processor: Any = None,
        owner: str | None = None,
        cache_size: int | str = "50GB",
        name: str = "",
        *,
        channels: int | None,
    ):
        self.name = name
        self._owner = owner
        self.settings: Place = ("tasks", name) if name else ()
        self._node = dataset
        self._place = DatasetPlace((*self.settings, "dataset"))
        self._given = {"image_column": image_column, "target_column": target_column}
        self.head = DenseHead(head, processor, channels, self.settings)
        self._cache_bytes = cache_bytes(cache_size)
        self._images: DenseImages | None = None
        self._pixels: PreparedImages | None = None

    @property
    def owner(self) -> str | None:
        """The model that was trained for the task, if the config names it."""
        return self._owner

    @property
    def images(self) -> DenseImages:
        """The images and targets, once ``prepare`` has run."""
        assert self._images is not None
        return self._images

    @property
    def preprocessor(self) -> Preprocessor:
        """What becomes of images before a model takes them."""
        return self.head.preprocessor

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
        """Look for the dataset, its columns, the head and the image processor."""
        with plan.collect():
            self.plan_data(plan, self._node, self._place, scratch)
        self.head.plan(plan, scratch)

    def plan_data(self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None) -> None:
        """Likewise for another dataset of the task."""
        described = plan_dataset(plan, node, place, scratch)
        if described is not None and described.features is not None:
            find_columns(described.features, self._given, place, self.settings)

    def prepare(self, fabric: Fabric) -> None:
        """Load the dataset and the head.

        Raises:
            FusionBenchError: a source that cannot be read, or a first sample that is not the
                task's.
        """
        self._images = self._load(self._node, self._place)
        _ = self.head.identity, self.head.preprocessor  # what is not there is noticed now

    def describe(self) -> TaskDescription:
        """Return what the task measures."""
        return TaskDescription(
            kind=self.kind,
            metrics=self.metrics,
            identity={
                "dataset": self.images.fingerprint,
                "targets": self.images.targets_sha256,
                "head": hashlib.sha256(self.head.identity.encode()).hexdigest(),
                "image preprocessing": hashlib.sha256(
                    f"{self.images.image_column} {self.preprocessor.identity}".encode()
                ).hexdigest(),
            },
            owner=self.owner,
            num_classes=self.num_classes,
        )

    def key(self) -> Mapping[str, Any]:
        """Return what scores depend on besides model and samples."""
        images = self.images
        return {
            "kind": [self.kind, dict(self.options)],
            "images": [images.fingerprint, images.image_column, self.preprocessor.identity],
            "targets": images.targets_sha256,
            "head": self.head.identity,
        }

    def evaluate(self, model: nn.Module, samples: NDArray[int64], how: Evaluation) -> SampleScores:
        """Return what is counted of each sample."""
        if self._pixels is None:
            self._pixels = PreparedImages(self.images, self.preprocessor, self._cache_bytes)
        return self._scores(self._pixels, model, samples, how)

    def data(self, name: str, node: Any, place: DatasetPlace, how: Evaluation) -> DenseData:
        """Return another dataset of the task, for methods that learn from evaluations.

        Raises:
            FusionBenchError: a dataset that cannot be read, or does not fit the task.
        """
        with how.fabric.rank_zero_first():
            images = self._load(node, place)
        pixels = PreparedImages(images, self.preprocessor, self._cache_bytes)
        return DenseData(
            name,
            pixels,
            self.images,
            self.metrics[0],
            self.target,
            lambda model, samples, how: self._scores(pixels, model, samples, how),
            how,
        )

    def on(self, data: LearningData) -> Self:
        """Return the task, evaluated on what ``data`` has returned."""
        assert isinstance(data, DenseData)
        task = copy(self)
        task._images, task._pixels = data.data, data.images
        return task

    @property
    def options(self) -> Mapping[str, Any]:
        """What figures depend on besides data, head and model."""
        return {}

    @property
    def num_classes(self) -> int | None:
        """The number of classes, of a task that has some."""
        return None

    @abstractmethod
    def target(self, images: DenseImages, index: int) -> Tensor:
        """Return a sample's target as ``measure`` takes it, on the CPU.

        Raises:
            FusionBenchError: it is not the task's.
        """

    @abstractmethod
    def measure(self, found: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Return the statistics of a sample, one for each of ``metrics``.

        Args:
            found: the head's values, (channels, height, width), float32.
            target: the target, of the same height and width, on the same device.
        """

    @abstractmethod
    def wanted(self, device: torch.device) -> Measured:
        """Return the shape and dtype of each metric's statistics."""

    def _load(self, node: Any, place: DatasetPlace) -> DenseImages:
        with place.located():
            dataset = load_split(node)
        images = load_images(dataset, self._given, place, self.settings, node)
        self.target(images, 0)  # so that a column of another kind is noticed now
        return images

    def _predictor(self, model: nn.Module, how: Evaluation) -> Predict:
        """Return the head on a model, or on the members of an ensemble of classifiers."""
        if not isinstance(model, EnsembleClassifier):
            return self.head.on(model, how.model, how.fabric)
        if self.num_classes is None:
            raise FusionBenchError(
                "it has no classes, whose logits or probabilities an ensemble puts together.",
                "Let it put outputs together: method.of=outputs.",
                place=self.settings,
            )
        members = [self.head.on(member, how.model, how.fabric) for member in model.members]

        def predict(images: Tensor) -> Tensor:
            logits = [member(images).movedim(1, -1) for member in members]
            return model.combine(logits).movedim(-1, 1)

        return predict

    def _scores(
        self, pixels: PreparedImages, model: nn.Module, samples: NDArray[int64], how: Evaluation
    ) -> SampleScores:
        images = pixels.data
        assert isinstance(images, DenseImages)
        names = [metric.name for metric in self.metrics]

        def measure(outputs: Tensor, places: Tensor) -> dict[str, Tensor]:
            rows = []
            for output, place in zip(outputs, places.tolist(), strict=True):
                target = self.target(images, int(samples[place]))
                if target.is_floating_point():
                    target = target.to(float_dtype(outputs.device))
                target = target.to(outputs.device)
                rows.append(self.measure(resized(output, target), target))
            parts = zip(*rows, strict=True)
            return {name: torch.stack(part) for name, part in zip(names, parts, strict=True)}

        found = measured(
            how.fabric,
            self._predictor(model, how),
            measure,
            self.wanted(how.fabric.device),
            pixels,
            samples,
            how.loading,
            how.progress,
            how.batch_limit,
        )
        return SampleScores(samples, {name: found[name].astype(float64) for name in names})


def plane(images: DenseImages, index: int) -> NDArray[generic]:
    """Return a target of one number a pixel, of shape (height, width).

    Raises:
        FusionBenchError: it has another shape.
    """
    found = images.target(index)
    if found.ndim == 3 and 1 in (found.shape[0], found.shape[-1]):
        found = found[0] if found.shape[0] == 1 else found[..., 0]
    if found.ndim != 2:
        raise wrong_shape(images, index, found, "one number for each pixel: (height, width)")
    return found


def wrong_shape(
    images: DenseImages, index: int, found: NDArray[generic], expected: str
) -> FusionBenchError:
    """Return what to raise where a target has another shape than ``expected``."""
    reason = f"has the shape {found.shape}; expected is {expected}."
    return images.wrong(index, images.target_column, reason, "Name another 'target_column'.")


def float_dtype(device: torch.device) -> torch.dtype:
    """Return what errors are computed and added in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
