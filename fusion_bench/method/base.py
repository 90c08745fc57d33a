"""What a fusion method is: the smallest file that can say its mathematics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError
from fusion_bench.weights import ModuleWeights, Weights, is_special, merge


class ModelPool(Protocol):
    """What a method sees of a model pool: names, and the weights behind them."""

    @property
    def model_names(self) -> Sequence[str]:
        """The models to fuse; special names such as ``_pretrained_`` are not among them."""

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a ``_pretrained_`` model."""

    def weights(self, name: str) -> Weights:
        """Return a model's weights, which the caller must not write to."""


class ModuleDict:
    """A plain dict of modules, ``{"_pretrained_": m0, "a": m1}``, seen as a model pool."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self.model_names = [name for name in modules if not is_special(name)]
        self.has_pretrained = "_pretrained_" in modules

    def weights(self, name: str) -> Weights:
        """Return a view of the module's state dict."""
        return ModuleWeights(self._modules[name])


class TensorwiseAlgorithm(ABC):
    """A method that makes each output tensor from the same tensor of every model.

    Subclasses implement ``merge_tensor``; those that need the pretrained model set
    ``needs_pretrained``.
    """

    needs_pretrained = False
    show_pbar = True
    inplace = False

    @abstractmethod
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the merged entry ``key``.

        Args:
            key: the entry's name.
            tensors: float32 copies, one a model, all of one shape; may be written to.
            base: the pretrained model's entry; ``None`` where the method needs none.
        """

    def run(self, modelpool: ModelPool | Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Merge the pool's models and return the merged state dict.

        The models stay as they are, unless ``inplace`` is set: then the merged values are written
        to the pretrained model's tensors, or without one to the first model's.

        Raises:
            FusionBenchError: an empty pool, a missing pretrained model, weights that differ in
                keys or shapes.
        """
        pool = ModuleDict(modelpool) if isinstance(modelpool, Mapping) else modelpool
        if self.needs_pretrained and not pool.has_pretrained:
            raise FusionBenchError(
                f"{type(self).__name__} needs the pretrained model: "
                "add '_pretrained_' to modelpool.models."
            )
        base = pool.weights("_pretrained_") if pool.has_pretrained else None
        models = {name: pool.weights(name) for name in pool.model_names}
        merged = merge(models, self.merge_tensor, base, progress=self.show_pbar)
        if self.inplace:
            target = base if base is not None else next(iter(models.values()))
            merged = {key: target[key].copy_(tensor) for key, tensor in merged.items()}
        return merged
