"""The interfaces between fusion methods and their callers, pools and tasks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from fusion_bench.problems import Place
from fusion_bench.results import Metric, SampleScores
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.weights import Config, MergePolicy, Model, Weights
from fusion_bench.weights.blueprint import Blueprint

if TYPE_CHECKING:
    import numpy as np
    from lightning.fabric import Fabric
    from numpy.typing import NDArray

#: The part of the datasets that a method learns from. The test split is that of the task pool.
Split = Literal["train", "validation", "test"]

#: One fused model: weights for the config that the pool's models have, or a ``Model`` with its own.
Product = Weights | Model | nn.Module
#: What a method makes of a pool: one model, or several by name.
Fused = Product | Mapping[str, Product]
#: What ``run`` returns: the same, with state dicts instead of weights for a dict of modules.
Ran = Fused | dict[str, Tensor] | Mapping[str, dict[str, Tensor] | nn.Module]


@dataclass(frozen=True)
class Needs:
    """The requirements of a method, known before anything is opened.

    Attributes:
        base: the ``_pretrained_`` model.
        weights: models with the same tensors, which it merges; an ensemble takes any models.
        alike: models that have the same layers; a method that stacks layers takes others.
        split: the part of the datasets that it learns from; ``None`` where it learns from none.
        split_place: where in the method's config that is chosen.
        own_data: a dataset for each model, not just some datasets.
        labels: the datasets' labels.
    """

    base: bool = False
    weights: bool = True
    alike: bool = True
    split: Split | None = None
    own_data: bool = False
    labels: bool = False
    split_place: Place = ("split",)


class ModelPool(Protocol):
    """The interface of a model pool for methods: names, weights and modules."""

    @property
    def model_names(self) -> Sequence[str]:
        """The models to merge, without special names such as ``_pretrained_``."""

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a ``_pretrained_`` model."""

    @property
    def policy(self) -> MergePolicy:
        """What to do when the models differ."""

    @property
    def vocabulary(self) -> int | None:
        """The vocabulary size of the pretrained model, or else of the first, if it has one."""

    def weights(self, name: str) -> Weights:
        """Return a model's weights, which the caller must not write to."""

    def model(self, name: str) -> Model:
        """Return a model: its weights, and what else determines what it computes."""

    def load_model(self, name: str) -> nn.Module:
        """Return a model as a module in eval mode, on the CPU, which the caller may change."""

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Return a module with these weights; a ``Model`` is built by its own config."""


@runtime_checkable
class Comparing(Protocol):
    """A pool that can compare the models' configs and tokenizers.

    Attributes:
        notes: the differences found so far.
    """

    notes: list[str]

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        """Return the differences of some models, by default of all, as sentences.

        Args:
            names: of which models.
            layers: whether their layers are compared too.

        Raises:
            FusionBenchError: what the policy does not allow.
        """


@runtime_checkable
class Drawing(Protocol):
    """A pool that tells what a config describes."""

    def blueprint(self, config: Config) -> Blueprint | None:
        """Return what a config describes; ``None`` where that is not known.

        Raises:
            FusionBenchError: a config that nothing can be built by.
        """


@runtime_checkable
class Arranging(Protocol):
    """A pool that knows what the class it builds calls and groups the entries of its files."""

    def as_built(self, weights: Weights) -> tuple[Weights, nn.Module]:
        """Return the same weights as the class's entries, and a module of it without values."""


@runtime_checkable
class ReadingTexts(Protocol):
    """A pool whose models read texts."""

    @property
    def tokenizer(self) -> TokenizerSource:
        """The models' tokenizer, which need not exist."""


@runtime_checkable
class Composing(Protocol):
    """A method that merges by another one.

    Attributes:
        base_method: the other method.
    """

    base_method: object


@runtime_checkable
class Slicing(Protocol):
    """A method that merges each part of a model by a method of its own."""

    def slice_methods(self, pool: ModelPool) -> "Sequence[tuple[FusionMethod, ModelPool, Place]]":
        """Return the method of each part, the models as it sees them, and its place."""


@runtime_checkable
class Outlining(Protocol):
    """A method that tells by headers alone what it makes of which entries."""

    def outline(self, pool: ModelPool) -> "Weights | Model":
        """Return the result with its shapes, types and origins; its values cannot be read.

        Raises:
            FusionBenchError: as ``FusionMethod.check_pool``.
        """


class Saving(Protocol):
    """A pool that writes models."""

    def save_model(
        self,
        model: Product,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a model as a directory, with the run's config in its recipe."""


@runtime_checkable
class SavingTogether(Protocol):
    """A pool that writes several models in one pass over what they are made of."""

    def save_models(self, models: Sequence[tuple[Product, Path, Mapping[str, Any] | None]]) -> None:
        """Write models, each with its directory and the config for its recipe."""


class TaskData(Protocol):
    """A task's images for learning, on Fabric's device."""

    @property
    def metric(self) -> Metric:
        """What models are evaluated by."""

    @property
    def classify(self) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        """Return a model's function from images to logits for the task."""

    def __len__(self) -> int: ...

    def sample(self, count: int | None, seed: int = 0) -> "NDArray[np.int64]":
        """Draw samples without replacement; ``None`` takes all."""

    def batches(
        self, samples: "NDArray[np.int64]", batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels."""

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever, in a new order in each epoch."""

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return how the model does on all samples."""


Data = Mapping[str, TaskData]


@runtime_checkable
class Describing(Protocol):
    """A method that tells what it makes of a pool in a line of the plan."""

    def described(self, pool: ModelPool) -> str:
        """Return what it makes; no weight is read.

        Raises:
            FusionBenchError: as ``FusionMethod.check_pool``.
        """


@runtime_checkable
class Partial(Protocol):
    """A pool of some entries of a larger model.

    Attributes:
        elsewhere: names of entries of the rest, which patterns may match too.
    """

    elsewhere: Collection[str]


@runtime_checkable
class FusionMethod(Protocol):
    """The interface of a fusion method.

    ``TensorwiseAlgorithm`` and ``LearningAlgorithm`` are two ways to write one.
    """

    @property
    def needs(self) -> Needs:
        """What it asks for."""

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models that it cannot merge, by names and headers; no weight is read.

        Raises:
            FusionBenchError: an empty pool, a missing pretrained model, or weights that differ in
                keys, shapes or dtypes where it merges them.
        """

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Fused:
        """Return the fused model; merged weights are computed when they are read.

        Args:
            pool: the models.
            fabric: where to compute.
            data: a task's name to what the method learns from, if its needs name a split.

        Raises:
            FusionBenchError: as ``check_pool``, and data that do not serve.
        """

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Merge a pool, or a dict of modules by name, from Python."""
