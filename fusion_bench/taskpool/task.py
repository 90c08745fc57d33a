"""The contract of a task: what a task pool asks of each kind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.plan import Plan
from fusion_bench.results import Example, Metric, SampleScores
from fusion_bench.taskpool.datasets import DatasetPlace
from fusion_bench.taskpool.loading import BatchLimit, Loading
from fusion_bench.tokenizer import TokenizerSource


@dataclass(frozen=True)
class TaskDescription:
    """What a task measures, and on what.

    Attributes:
        kind: the kind of task, such as ``image_classification``.
        metrics: the most important one first.
        identity: hashes of what the figures depend on besides the model: what it is, in words, to
            its hash.
        owner: the model that was trained for the task, if the config names it.
        num_classes: of a task with classes.
        classes: their names, if results are wanted class by class.
    """

    kind: str
    metrics: Sequence[Metric]
    identity: Mapping[str, str | None]
    owner: str | None = None
    num_classes: int | None = None
    classes: Sequence[str] | None = None

    @property
    def main(self) -> Metric:
        """The most important metric."""
        return self.metrics[0]


@dataclass(frozen=True)
class Evaluation:
    """How a task is evaluated.

    Attributes:
        fabric: gives device, precision and processes.
        loading: how data come to the model.
        batch_limit: how many samples fit into memory at once, as far as is known.
        model: what messages call the model.
        progress: what is being done, for messages.
        computation: the hash of the model and of how it computes, under which answers to single
            requests are kept; ``None`` keeps none.
    """

    fabric: Fabric
    loading: Loading
    batch_limit: BatchLimit
    model: str
    progress: str
    computation: str | None = None


class LearningData(Protocol):
    """A task's data for a method to learn from, on Fabric's device."""

    @property
    def task(self) -> str:
        """The task's name."""

    @property
    def metric(self) -> Metric:
        """What the task is evaluated by."""

    @property
    def fingerprint(self) -> str:
        """The hash of the data."""

    @property
    def is_test(self) -> bool:
        """Whether models are evaluated on the same data."""

    @property
    def classify(self) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        """Return a model's function from images to logits for the task.

        Raises:
            FusionBenchError: the task has no classes.
        """

    def __len__(self) -> int: ...

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw samples without replacement; ``None`` takes all."""

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels."""

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever, in a new order in each epoch."""

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return how the model does on all samples."""

    def placed(self, *place: str | int) -> Self:
        """Return the same data, whose errors have ``place`` in front."""


class Task(Protocol):
    """A task; places in its errors are relative to the task pool."""

    @property
    def owner(self) -> str | None:
        """The model that was trained for the task, if the config names it."""

    def with_tokenizer(self, source: TokenizerSource) -> Self:
        """Return the task for models with this tokenizer; itself, where it has no texts."""

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Note in a plan what the task takes, and what is wrong; no data is read."""

    def prepare(self, fabric: Fabric) -> None:
        """Load the data; called once.

        Raises:
            FusionBenchError: a source that cannot be read, or data that are not the task's.
        """

    def __len__(self) -> int:
        """Return the number of samples, once ``prepare`` has run."""

    def describe(self) -> TaskDescription:
        """Return what the task measures, once ``prepare`` has run."""

    def key(self) -> Mapping[str, Any]:
        """Return, as plain values, all that scores depend on besides model and samples."""

    def evaluate(
        self, model: nn.Module, samples: NDArray[np.int64], how: Evaluation
    ) -> SampleScores:
        """Return the model's scores on samples; every process calls it, with the same result.

        Raises:
            EnvironmentProblem: there is not even memory for one sample.
            FusionBenchError: a model that does not fit the task.
        """

    def notes(self, model: str, scores: SampleScores) -> list[str]:
        """Return in sentences what readers of a model's scores should know."""

    def examples(self, samples: Sequence[int]) -> list[Example]:
        """Return samples as people read them; none of a task whose samples are no texts."""

    def plan_data(self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None) -> None:
        """Note in a plan what ``data`` takes; ``plan`` has run."""

    def data(self, name: str, node: Any, place: DatasetPlace, how: Evaluation) -> LearningData:
        """Return another dataset of the task, for methods to learn from.

        Args:
            name: the task's.
            node: the dataset's config node.
            place: its place, for messages.
            how: how models are evaluated on it.

        Raises:
            FusionBenchError: a dataset that cannot be read, or does not fit the task.
        """

    def on(self, data: LearningData) -> Self:
        """Return the task, evaluated on what ``data`` has returned."""
