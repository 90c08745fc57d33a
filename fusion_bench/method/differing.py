"""A model beside the one that it was made from."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from fusion_bench.method.modules import Layer
from fusion_bench.weights import Aligned, MergePolicy, Stacked, Weights
from fusion_bench.weights.stream import PIECE, ROOM


class Differing:
    """A model beside its base."""

    def __init__(self, found: Aligned, policy: MergePolicy, device: torch.device):
        self._model = found.models["model"]
        self._base = found.reference
        self._copied = found.copied
        self._policy = policy
        self._device = device
        self._known: dict[str, bool] = {}

    @property
    def threads(self) -> int:
        """How many matrices are factorised at once: those of a GPU one after the other."""
        if self._device.type != "cpu":
            return 1
        largest = max((self._base.spec(key).numel for key in self._base), default=0)
        return max(1, min(torch.get_num_threads(), ROOM // max(1, 8 * largest)))

    def bytes_of(self, layer: Layer) -> int:
        """Return how many bytes are read for a layer."""
        keys = layer.keys.values()
        return sum(self._model.bytes_to_read(key) + self._base.bytes_to_read(key) for key in keys)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of the factors of an entry's change."""
        return self._policy.torch_dtype or self._model.spec(key).dtype

    def differs(self, key: str) -> bool:
        """Return whether an entry differs from the base's."""
        if key in self._copied:
            return False
        if self._model.spec(key).shape != self._base.spec(key).shape:
            return True
        if key not in self._known:
            self._known[key] = any(
                not torch.equal(one.to(torch.promote_types(one.dtype, other.dtype)), other)
                for one, other in self._pieces(key)
            )
        return self._known[key]

    def outside(self, covered: Collection[str]) -> Iterator[str]:
        """Yield the entries that neither are ``covered`` nor tied to one that is."""
        tied = {self._base.tied_to(key) for key in covered if key in self._base}
        return (k for k in self._base if k not in covered and self._base.tied_to(k) not in tied)

    def has_shapes(self, layer: Layer) -> bool:
        """Return whether a layer's entries have the shapes that they have in the base."""
        keys = layer.keys.values()
        return all(self._model.spec(key).shape == self._base.spec(key).shape for key in keys)

    def only(self, changed: Collection[str], layer: Layer) -> Weights:
        """Return a layer's entries, those that are not among the ``changed`` from the base."""
        keys = layer.keys.values()
        return Stacked({k: (self._model if k in changed else self._base, k) for k in keys})

    def change(self, key: str) -> Tensor:
        """Return the difference of an entry, in float32."""
        spec = self._base.spec(key)
        own, base = (each.read(key, 0, spec.numel) for each in (self._model, self._base))
        return own.to(self._device, torch.float32).sub(base.to(self._device)).view(spec.shape)

    def zeros(self, key: str) -> Tensor:
        """Return zeros in the shape of an entry."""
        return torch.zeros(self._base.spec(key).shape, device=self._device)

    def _pieces(self, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        size = PIECE if self._model.in_pieces else max(self._base.spec(key).numel, 1)
        for start, stop in self._model.pieces(key, size):
            yield self._model.read(key, start, stop), self._base.read(key, start, stop)
