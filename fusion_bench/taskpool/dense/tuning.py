"""A dense task's images for methods that learn from evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError, within
from fusion_bench.results import Metric, SampleScores
from fusion_bench.taskpool.dense.data import DenseImages
from fusion_bench.taskpool.images.evaluate import batches
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.images.tuning import are_evaluated, drawn
from fusion_bench.taskpool.task import Evaluation

Evaluate = Callable[[nn.Module, NDArray[np.int64], Evaluation], SampleScores]


@dataclass(frozen=True)
class DenseData:
    """A task's images and targets for a method to learn from.

    Attributes:
        task: the task's name.
        images: the images.
        evaluated: those that models are evaluated on.
        metric: what the task is evaluated by.
        target: returns a sample's target.
        scores: returns a model's scores on samples.
        how: gives device, loading and memory.
        place: where ``classify`` is asked for; for its message.
    """

    task: str
    images: PreparedImages
    evaluated: DenseImages
    metric: Metric
    target: Callable[[DenseImages, int], Tensor]
    scores: Evaluate
    how: Evaluation
    place: tuple[str | int, ...] = ()

    @property
    def data(self) -> DenseImages:
        """The images and targets as the dataset holds them."""
        assert isinstance(self.images.data, DenseImages)
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
        split = str(self.data.dataset.split or "")
        by_content = self.data.has_pictures
        return are_evaluated(split, self.data, self.evaluated, by_content=by_content)

    @property
    def classify(self) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        """Refuse: the task has no classes of images.

        Raises:
            FusionBenchError: always, from the function.
        """

        def refuse(model: nn.Module) -> NoReturn:
            with within(*self.place, keyed_only=True, whole=True):
                raise FusionBenchError(
                    "it has an answer for each pixel, and the method learns from classes of "
                    "images.",
                    "Choose a method that needs no data, or a greedy soup.",
                    place=("tasks", self.task),
                )

        return refuse

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw samples without replacement; ``None`` takes all."""
        return drawn(len(self), count, seed)

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, as a model takes them, and targets, both on Fabric's device."""
        steps = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        loaded = batches(self.images, steps, replace(self.how.loading, batch_size=batch_size))
        device = self.how.fabric.device
        for step, pixels in zip(steps, loaded, strict=True):
            targets = torch.stack([self.target(self.data, int(index)) for index in step])
            yield self.images.preprocessor.finish(pixels.to(device)), targets.to(device)

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever, in a new order in each epoch."""
        random = np.random.default_rng(seed % 2**32)
        while True:
            yield from self.batches(random.permutation(len(self)), batch_size)

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return how the model does on all samples."""
        return self.scores(model, np.arange(len(self), dtype=np.int64), self.how)

    def placed(self, *place: str | int) -> "DenseData":
        """Return the same data, whose errors have ``place`` in front."""
        return replace(self, place=place)
