"""What a fusion method is: the smallest file that can say its mathematics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError
from fusion_bench.weights import (
    Aligned,
    MergedWeights,
    MergePolicy,
    MergeTensor,
    TensorWeights,
    Weights,
    align,
    in_memory,
    is_special,
)


class ModelPool(Protocol):
    """What a method sees of a model pool: names, and the weights behind them."""

    @property
    def model_names(self) -> Sequence[str]:
        """The models to fuse; special names such as ``_pretrained_`` are not among them."""

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a ``_pretrained_`` model."""

    @property
    def policy(self) -> MergePolicy:
        """What to do where the models differ."""

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the pretrained model, or without one the first, has; if it has any."""

    def weights(self, name: str) -> Weights:
        """Return a model's weights, which the caller must not write to."""


class ModuleDict:
    """A plain dict of modules, ``{"_pretrained_": m0, "a": m1}``, seen as a model pool."""

    policy = MergePolicy()
    vocabulary = None

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self.model_names = [name for name in modules if not is_special(name)]
        self.has_pretrained = "_pretrained_" in modules

    def weights(self, name: str) -> Weights:
        """Return a view of the module's state dict."""
        return TensorWeights(self._modules[name].state_dict())


class TensorwiseAlgorithm(ABC):
    """A method that makes each output tensor from the same tensor of every model.

    Subclasses implement ``merge_tensor``; those that need the pretrained model set
    ``needs_pretrained``, and those whose result at each element depends on that element alone set
    ``elementwise``; if it is a weighted sum, ``linear`` too, which saves looking for NaN twice.
    """

    needs_pretrained = False
    elementwise = False
    linear = False
    show_pbar = True
    inplace = False

    def merger(self, aligned: Aligned) -> MergeTensor:
        """Return what merges one entry of these models, ``merge_tensor`` itself in most methods.

        The place to refuse models that the method cannot merge, and for a first pass over all
        weights where the method needs a statistic of the whole model.
        """
        return self.merge_tensor

    @abstractmethod
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the merged entry ``key``.

        It is called from several threads, and must not write to what it is given.

        Args:
            key: the entry's name.
            tensors: in float32, one a model, all of one shape; a tensor is converted each time
                that it is taken out of the sequence. With ``elementwise`` they are 1-d pieces of
                the flattened entry.
            base: the pretrained model's; ``None`` where there is none.
        """

    def run(self, modelpool: ModelPool | Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """Merge the pool's models.

        Returns:
            For a pool, weights whose entries are computed when they are read. For a dict of
            modules a state dict. The modules stay as they are, unless ``inplace`` is set: then the
            merged values are written to the pretrained model's tensors, or without one to the
            first model's.

        Raises:
            FusionBenchError: an empty pool, a missing pretrained model, weights that differ in
                keys, shapes or dtypes.
        """
        pool = ModuleDict(modelpool) if isinstance(modelpool, Mapping) else modelpool
        if self.needs_pretrained and not pool.has_pretrained:
            raise FusionBenchError(
                f"{type(self).__name__} needs the pretrained model: "
                "add '_pretrained_' to modelpool.models."
            )
        base = pool.weights("_pretrained_") if pool.has_pretrained else None
        models = {name: pool.weights(name) for name in pool.model_names}
        aligned = align(models, base, pool.policy, pool.vocabulary)
        lazy = MergedWeights(
            aligned,
            self.merger(aligned),
            elementwise=self.elementwise,
            linear=self.linear,
            policy=pool.policy,
            show_progress=self.show_pbar,
        )
        if not isinstance(modelpool, Mapping):
            return lazy
        merged = in_memory(lazy)
        if self.inplace:
            target = base if base is not None else next(iter(models.values()))
            merged = {key: target[key].copy_(tensor) for key, tensor in merged.items()}
        return merged
