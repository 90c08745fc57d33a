"""What methods learn from: a task's images, and models as classifiers of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.taskpool.described import split_names
from fusion_bench.taskpool.evaluate import BatchLimit, Loading, batches, evaluate
from fusion_bench.taskpool.images import LabelledImages
from fusion_bench.taskpool.pixels import PreparedImages
from fusion_bench.taskpool.results import Score

#: As a share, how many images may be evaluated as well as learned from.
_TOLERATED = 0.05


def is_test_split(split: str) -> bool:
    """Return whether a split's name says that models are evaluated on it, or on a part of it."""
    return any(name.startswith("test") for name in split_names(split))


@dataclass(frozen=True)
class TuningImages:
    """A task's images for a method to learn from.

    Attributes:
        task: the task's name.
        split: what the dataset calls the part that the images are from.
        classify: gives the function from images to logits that a model makes for the task; the
            logits follow the model's parameters, so that they can be differentiated.
        batch_limit: how many images fit into memory at once, as far as is known.
    """

    task: str
    split: str
    images: PreparedImages
    classify: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    fabric: Fabric
    loading: Loading
    batch_limit: BatchLimit

    @property
    def data(self) -> LabelledImages:
        """The images and labels as the dataset holds them."""
        return self.images.data

    def __len__(self) -> int:
        return len(self.data)

    def is_test(self, evaluated: LabelledImages) -> bool:
        """Return whether models are evaluated on such images: by the split's name, or by content.

        A few images may be in both splits of a published dataset.
        """
        named = is_test_split(self.split)
        same = self.data.fingerprint == evaluated.fingerprint
        return named or same or self.data.share_within(evaluated) > _TOLERATED

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw ``count`` samples, none twice; all, in order, where there are no more or ``None``.

        A dataset may be sorted by class: its first samples would be of few classes.
        """
        everything = np.arange(len(self), dtype=np.int64)
        if count is None or count >= len(self):
            return everything
        return np.sort(np.random.default_rng(seed % 2**32).permutation(everything)[:count])

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, as a model takes them, and labels, both on Fabric's device."""
        steps = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        loaded = batches(self.images, steps, replace(self.loading, batch_size=batch_size))
        for step, pixels in zip(steps, loaded, strict=True):
            images = self.images.preprocessor.finish(pixels.to(self.fabric.device))
            labels = torch.from_numpy(self.images.labels[step]).to(self.fabric.device)
            yield images, labels

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever, in a new order each time round."""
        random = np.random.default_rng(seed % 2**32)
        while True:
            yield from self.batches(random.permutation(len(self)), batch_size)

    def evaluate(self, model: nn.Module) -> Score:
        """Return the model's answers on all images."""
        samples = np.arange(len(self), dtype=np.int64)
        classify = self.classify(model)
        what = f"tuning on {self.task}"
        return evaluate(
            self.fabric, classify, self.images, samples, self.loading, what, self.batch_limit
        )
