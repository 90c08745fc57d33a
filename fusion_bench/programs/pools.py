"""The interfaces of pools for programs, and adapters that add their config key to errors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.method import contract
from fusion_bench.method.contract import Arranging, Product
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, Place, within
from fusion_bench.results import Example, SampleScores
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.weights import Config, MergePolicy, Model, TensorWeights, Weights, zeros_like
from fusion_bench.weights.blueprint import Blueprint

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData, TaskDescription

#: A name to a dataset's node.
Nodes = Mapping[str, object]


class ModelPool(contract.ModelPool, contract.Saving, Protocol):
    """The interface of a model pool for programs; places in errors are relative to the pool."""

    @property
    def notes(self) -> list[str]:
        """The accepted differences between compared models."""

    @property
    def train_datasets(self) -> Nodes:
        """The datasets for learning."""

    @property
    def val_datasets(self) -> Nodes:
        """The datasets for tuning."""

    @property
    def test_datasets(self) -> Nodes:
        """The datasets for adaptation, without labels."""

    @property
    def tokenizer(self) -> TokenizerSource:
        """The models' tokenizer, which need not exist."""

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        """Return the pool's plan; no weight is read."""

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        """Return in sentences what differs in some models, by default in all."""

    def blueprint(self, config: Config) -> Blueprint | None:
        """Return what a config describes; ``None`` if unknown."""

    def architecture(self, name: str | None = None) -> str | None:
        """Return a hash of a model's computation, without weights; ``None`` if unknown."""

    def open_saved(self, path: Path) -> Weights:
        """Return the weights that ``save_model`` wrote."""


@runtime_checkable
class Shortening(Protocol):
    """A pool that saves an approximation of what is merged."""

    def as_saved(self, weights: Weights) -> Weights:
        """Return merged weights as ``save_model`` writes them."""


@runtime_checkable
class _Plans(Protocol):
    """A pool with a ``plan``; reading its other attributes would read the models' headers."""

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan: ...

    def open_saved(self, path: Path) -> Weights: ...


def _is_whole(pool: object) -> TypeGuard[ModelPool]:
    return isinstance(pool, _Plans)


def placed(pool: object, place: Place = ("modelpool",)) -> "PlacedModelPool":
    """Return a pool, possibly a user's object, whose problems have their full key."""
    return PlacedModelPool(pool if _is_whole(pool) else _PlainPool(pool), place)


class PlacedModelPool:
    """A pool with its place in the config.

    It prepends its place to the errors of its calls, because methods may call them too. The places
    in a plan stay relative. A problem without a key, such as a damaged file, stays without.
    """

    def __init__(self, pool: ModelPool, place: Place):
        self._pool = pool
        self.place = place

    @property
    def model_names(self) -> list[str]:
        """As in ``ModelPool``."""
        return list(self._pool.model_names)

    @property
    def has_pretrained(self) -> bool:
        """As in ``ModelPool``."""
        return self._pool.has_pretrained

    @property
    def policy(self) -> MergePolicy:
        """The pool's policy, with its full key."""
        return replace(self._pool.policy, place=(*self.place, "policy"))

    @property
    def vocabulary(self) -> int | None:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.vocabulary

    @property
    def notes(self) -> list[str]:
        """As in ``ModelPool``."""
        return list(self._pool.notes)

    @property
    def train_datasets(self) -> Nodes:
        """As in ``ModelPool``."""
        return self._pool.train_datasets

    @property
    def val_datasets(self) -> Nodes:
        """As in ``ModelPool``."""
        return self._pool.val_datasets

    @property
    def test_datasets(self) -> Nodes:
        """As in ``ModelPool``."""
        return self._pool.test_datasets

    @property
    def tokenizer(self) -> TokenizerSource:
        """As in ``ModelPool``."""
        return self._pool.tokenizer

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.plan(scratch, built=built)

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.compare(names, layers=layers)

    def blueprint(self, config: Config) -> Blueprint | None:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.blueprint(config)

    def weights(self, name: str) -> Weights:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.weights(name)

    def architecture(self, name: str | None = None) -> str | None:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.architecture(name)

    def model(self, name: str) -> Model:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.model(name)

    def load_model(self, name: str) -> nn.Module:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.load_model(name)

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.build_model(weights)

    def as_built(self, weights: Weights) -> tuple[Weights, nn.Module]:
        """As in ``Arranging``; of a pool that is none, the keys are those of its modules."""
        with self._here():
            if isinstance(self._pool, Arranging):
                return self._pool.as_built(weights)
            return weights, self._pool.build_model(zeros_like(weights))

    def open_saved(self, path: Path) -> Weights:
        """As in ``ModelPool``."""
        with self._here():
            return self._pool.open_saved(path)

    def save_model(
        self,
        model: Product,
        path: str | Path,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """As in ``ModelPool``."""
        with self._here():
            self._pool.save_model(model, path, config)

    def _here(self) -> AbstractContextManager[None]:
        return within(*self.place, keyed_only=True, whole=True)


class _PlainPool:
    """Adapts a user's object to a pool; missing parts are empty or raise an error."""

    def __init__(self, pool: object):
        self._pool = pool
        self.model_names: Sequence[str] = getattr(pool, "model_names", ())
        self.has_pretrained = bool(getattr(pool, "has_pretrained", False))
        self.policy: MergePolicy = getattr(pool, "policy", MergePolicy())
        self.vocabulary: int | None = getattr(pool, "vocabulary", None)
        self.train_datasets: Nodes = getattr(pool, "train_datasets", {})
        self.val_datasets: Nodes = getattr(pool, "val_datasets", {})
        self.test_datasets: Nodes = getattr(pool, "test_datasets", {})
        self.tokenizer = TokenizerSource(lambda: getattr(pool, "tokenizer", None))

    @property
    def notes(self) -> list[str]:
        return list(getattr(self._pool, "notes", ()))

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        plan: Plan = self._call("plan", scratch, built=built) if self._has("plan") else Plan()
        return plan

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        if not self._has("compare"):
            return []
        return list(self._call("compare", names, **({} if layers else {"layers": False})))

    def blueprint(self, config: Config) -> Blueprint | None:
        drawn: Blueprint | None = None
        return self._call("blueprint", config) if self._has("blueprint") else drawn

    def weights(self, name: str) -> Weights:
        if not self._has("weights"):
            return TensorWeights(self.load_model(name).state_dict())
        weights: Weights = self._call("weights", name)
        return weights

    def architecture(self, name: str | None = None) -> str | None:
        known = self._call("architecture", name) if self._has("architecture") else None
        return None if known is None else str(known)

    def model(self, name: str) -> Model:
        if not self._has("model"):
            return Model(self.weights(name), None, type(self._pool).__name__)
        model: Model = self._call("model", name)
        return model

    def load_model(self, name: str) -> nn.Module:
        model: nn.Module = self._call("load_model", name)
        return model

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        model: nn.Module = self._call("build_model", weights)
        return model

    def open_saved(self, path: Path) -> Weights:
        weights: Weights = self._call("open_saved", path)
        return weights

    def save_model(
        self,
        model: Product,
        path: str | Path,
        config: Mapping[str, object] | None = None,
    ) -> None:
        self._call("save_model", model, path, config)

    def _has(self, name: str) -> bool:
        return hasattr(self._pool, name)

    def _call(self, name: str, *args: object, **options: object) -> Any:
        if not self._has(name):
            raise FusionBenchError(
                f"a {type(self._pool).__name__} has no '{name}', which is required."
            )
        return getattr(self._pool, name)(*args, **options)


@runtime_checkable
class TaskPool(Protocol):
    """The interface of a task pool for programs; places in errors are relative to the pool."""

    save_predictions: bool

    @property
    def task_names(self) -> list[str]:
        """The tasks' names."""

    @property
    def notes(self) -> list[str]:
        """The report's notes on the evaluation."""

    @property
    def test_datasets(self) -> Nodes:
        """The datasets for the evaluation, if a method may learn from them."""

    def owners(self) -> dict[str, str | None]:
        """Return the model that the config names as trained for each task."""

    def plan(self, scratch: Path | None = None) -> Plan:
        """Return the pool's plan; no data is read."""

    def plan_tuning(self, datasets: Nodes, place: Place, scratch: Path | None = None) -> Plan:
        """Return the plan for the datasets of ``tuning``, after ``plan``.

        ``place`` is the datasets' whole place in the config; their problems have it too.
        """

    def prepare(self, fabric: Fabric) -> None:
        """Load the tasks' data, once."""

    def tuning(self, datasets: Nodes, fabric: Fabric, place: Place) -> "dict[str, LearningData]":
        """Return the data for learning, by dataset name.

        ``place`` is the datasets' whole place in the config; their problems have it too.
        """

    def evaluating(self, data: "Mapping[str, LearningData]") -> "TaskPool":
        """Return a copy of this pool that evaluates on the data of ``tuning``."""

    def describe(self, task: str) -> "TaskDescription":
        """Return what a task measures, after ``prepare``."""

    def identity(self, task: str, fabric: Fabric) -> str | None:
        """Return the cache key of a task's results, without the model; ``None`` without a cache."""

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
    ) -> dict[str, SampleScores]:
        """Evaluate a model on ``tasks``, by default all."""


@runtime_checkable
class ForeseesWork(Protocol):
    """A task pool that says how much there is to evaluate, and whether the results are kept."""

    @property
    def keeps_results(self) -> bool:
        """Whether results are kept for the next run."""

    def num_samples(self, task: str, fabric: Fabric, *, fast_dev_run: bool = False) -> int:
        """Return the number of samples that ``evaluate`` takes, once ``prepare`` has run."""


@runtime_checkable
class EvaluatesParts(Protocol):
    """A task pool that evaluates some samples of a task, and keeps what it finds of each."""

    def samples(
        self, task: str, fabric: Fabric, *, fast_dev_run: bool = False
    ) -> NDArray[np.int64]:
        """Return the samples that ``evaluate`` takes, in ascending order, after ``prepare``."""

    def part(self, samples: Mapping[str, NDArray[np.int64]]) -> TaskPool:
        """Return a pool that evaluates only these samples of these tasks."""


@runtime_checkable
class ReadsTexts(Protocol):
    """A task pool whose tasks may need the models' tokenizer."""

    def with_tokenizer(self, source: TokenizerSource) -> TaskPool:
        """Return the pool for models with this tokenizer."""

    def examples(self, task: str, samples: Sequence[int]) -> list[Example]:
        """Return samples as people read them; none of a task whose samples are no texts."""


def as_taskpool(made: object) -> TaskPool:
    """Return an object as a task pool.

    Raises:
        FusionBenchError: it is none.
    """
    if isinstance(made, TaskPool):
        return made
    raise FusionBenchError(
        f"a {type(made).__name__} is not a task pool.",
        "Use one such as fusion_bench.taskpool.CLIPVisionModelTaskPool.",
    )
