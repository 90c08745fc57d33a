"""What methods that learn from data have in common."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fusion_bench.method.base import ModelPool, refuse_disagreeing
from fusion_bench.problems import FusionBenchError, check_between
from fusion_bench.tasks import canonical_name
from fusion_bench.threads import fixed_threads
from fusion_bench.weights import MergeTensor, Weights, merge

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
M = TypeVar("M")
P = ParamSpec("P")

#: The part of the datasets that a method learns from. The test split is that of the task pool.
Split = Literal["train", "validation", "test"]


class TrainablePool(ModelPool, Protocol):
    """A model pool that makes modules, which a method may run and change."""

    def load_model(self, name: str) -> nn.Module:
        """Load a model afresh, in eval mode, on the CPU."""

    def build_model(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a module with these weights."""


class TaskData(Protocol):
    """A task's images for a method to learn from; all on Fabric's device."""

    @property
    def classify(self) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        """Gives the function from images to logits that a model makes for the task."""

    def __len__(self) -> int: ...

    def sample(self, count: int | None, seed: int = 0) -> Any:
        """Draw so many samples, none twice; all where there are no more, or for ``None``."""

    def batches(self, samples: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels."""

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever, in a new order each time round."""

    def evaluate(self, model: nn.Module) -> Any:
        """Return the model's answers on all images: ``num_correct`` of ``num_samples``."""


Data = Mapping[str, TaskData]


def check_sampling(name: str, count: int | None, batch_size: int) -> None:
    """Refuse fewer than one sample, whose number is called ``name``, or less than one a batch.

    Raises:
        FusionBenchError: there is less.
    """
    if count is not None:
        check_between(name, count, 1, math.inf)
    check_between("batch_size", batch_size, 1, math.inf)


def the_same_everywhere(
    run: Callable[Concatenate[M, TrainablePool, "Fabric", P], Weights],
) -> Callable[Concatenate[M, TrainablePool, "Fabric", P], Weights]:
    """Let a method's ``run`` learn the same on a processor of any number of cores."""

    @wraps(run)
    def fixed(
        method: M, modelpool: TrainablePool, fabric: "Fabric", *args: P.args, **kwargs: P.kwargs
    ) -> Weights:
        first = [modelpool.weights(name) for name in modelpool.model_names[:1]]
        elements = sum(weights.spec(key).numel for weights in first for key in weights)
        with fixed_threads(elements, fabric.device):
            return run(method, modelpool, fabric, *args, **kwargs)

    return fixed


def own_data(names: Sequence[str], data: Mapping[str, T]) -> dict[str, T]:
    """Return each model's own task's data; methods that call it set ``needs_own_data``.

    Raises:
        FusionBenchError: a model without.
    """
    known = {canonical_name(name): task for name, task in data.items()}
    for name in names:
        if canonical_name(name) not in known:
            raise FusionBenchError(
                f"There is no data for the model '{name}'. Name its dataset beside the others', "
                f"as '{name}': there is {', '.join(data) or 'none'}."
            )
    return {name: known[canonical_name(name)] for name in names}


def parameter_keys(module: nn.Module, weights: Weights) -> list[str]:
    """Return the keys of a module's parameters, which must be the weights' own.

    Raises:
        FusionBenchError: the module calls them otherwise than the files do.
    """
    keys = [name for name, _ in module.named_parameters()]
    if unknown := [key for key in keys if key not in weights]:
        raise FusionBenchError(
            f"The module calls a parameter '{unknown[0]}' that its weights do not have: this "
            f"method cannot learn with a {type(module).__name__}."
        )
    return keys


def wide(tensor: Tensor) -> Tensor:
    """Return it in float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def merged(
    pool: ModelPool,
    models: Mapping[str, Weights],
    merge_tensor: MergeTensor,
    *,
    weighted_sum: bool = True,
) -> Weights:
    """Return what ``merge_tensor`` makes of the models, by the pool's policy.

    Args:
        pool: where the models are from.
        models: by name.
        merge_tensor: the method.
        weighted_sum: it sums at each element apart, with weights that are the same all over.

    Raises:
        FusionBenchError: models that differ in keys, shapes or dtypes.
    """
    refuse_disagreeing(pool)
    return merge(
        models,
        merge_tensor,
        pool.weights("_pretrained_") if pool.has_pretrained else None,
        elementwise=weighted_sum,
        shows_nonfinite=weighted_sum,
        policy=pool.policy,
        vocabulary=pool.vocabulary,
    )


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Refuse what is no regular expression; ``name`` is the patterns' own key.

    Raises:
        FusionBenchError: one that is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FusionBenchError(f"'{pattern}' is no pattern: {error}.", place=(name,)) from error


def excluded(key: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the regular expressions is found in a parameter's name."""
    return any(re.search(pattern, key) for pattern in patterns)
