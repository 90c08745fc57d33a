"""What methods learn from: a task's images, and models as classifiers of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.problems import within
from fusion_bench.results import Metric, SampleScores
from fusion_bench.taskpool.datasets import split_names
from fusion_bench.taskpool.images.evaluate import batches, evaluate
from fusion_bench.taskpool.images.labelled import DatasetImages, LabelledImages
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.task import Evaluation

#: As a share, how many images may be evaluated as well as learned from.
TOLERATED = 0.05


def is_test_split(split: str) -> bool:
    """Return whether a split's name says that models are evaluated on it, or on a part of it."""
    return any(name.startswith("test") for name in split_names(split))


def are_evaluated(
    split: str, images: DatasetImages, evaluated: DatasetImages, *, by_content: bool = True
) -> bool:
    """Return whether models are evaluated on such images: by the split's name, or by content.

    A few images may be in both splits of a published dataset.

    Args:
        split: what the dataset calls the part that the images are from.
        images: those in question.
        evaluated: those that models are evaluated on.
        by_content: look for the images themselves, too.
    """
    same = images.fingerprint == evaluated.fingerprint
    return (
        is_test_split(split) or same or (by_content and images.share_within(evaluated) > TOLERATED)
    )


def drawn(size: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` of ``size`` samples, none twice; all, in order, where there are no more.

    A dataset may be sorted by class: its first samples would be of few classes.
    """
    everything = np.arange(size, dtype=np.int64)
    if count is None or count >= size:
        return everything
    return np.sort(np.random.default_rng(seed % 2**32).permutation(everything)[:count])


@dataclass(frozen=True)
class TuningImages:
    """A task's images for a method to learn from.

    Attributes:
        task: the task's name.
        split: what the dataset calls the part that the images are from.
        images: the images.
        evaluated: those that models are evaluated on.
        metric: what the task is evaluated by.
        classify: gives the function from images to logits that a model makes for the task; the
            logits follow the model's parameters, so that they can be differentiated.
        how: gives device, loading and memory.
    """

    task: str
    split: str
    images: PreparedImages
    evaluated: LabelledImages
    metric: Metric
    classify: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    how: Evaluation

    @property
    def data(self) -> LabelledImages:
        """The images and labels as the dataset holds them."""
        assert isinstance(self.images.data, LabelledImages)
        return self.images.data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def fingerprint(self) -> str:
        """The hash of the data."""
        return self.data.fingerprint

    @property
    def is_test(self) -> bool:
        """Whether models are evaluated on such images: by the split's name, or by content."""
        return are_evaluated(self.split, self.data, self.evaluated)

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw ``count`` samples, none twice; all, in order, where there are no more."""
        return drawn(len(self), count, seed)

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, as a model takes them, and labels, both on Fabric's device."""
        steps = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        loaded = batches(self.images, steps, replace(self.how.loading, batch_size=batch_size))
        for step, pixels in zip(steps, loaded, strict=True):
            images = self.images.preprocessor.finish(pixels.to(self.how.fabric.device))
            labels = torch.from_numpy(self.data.labels[step]).to(self.how.fabric.device)
            yield images, labels

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever, in a new order each time round."""
        random = np.random.default_rng(seed % 2**32)
        while True:
            yield from self.batches(random.permutation(len(self)), batch_size)

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return the model's scores on all images."""
        samples = np.arange(len(self), dtype=np.int64)
        return evaluate(
            self.how.fabric,
            self.classify(model),
            self.images,
            samples,
            self.how.loading,
            self.how.progress,
            self.how.batch_limit,
        )

    def placed(self, *place: str | int) -> "TuningImages":
        """Return the same images; what ``classify`` raises has ``place`` in front."""

        def classify(model: nn.Module) -> Callable[[Tensor], Tensor]:
            with within(*place, keyed_only=True, whole=True):
                return self.classify(model)

        return replace(self, classify=classify)
