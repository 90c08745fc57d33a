"""Parameters as data: a read-only, ordered mapping from key to tensor."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """What is known of an entry without loading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Mapping[str, Tensor]):
    """A model's named tensors, in the model's own order; whoever reads one must not write to it."""

    @abstractmethod
    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry without loading it."""

    def tied_to(self, key: str) -> str:
        """Return the first key that shares its memory with ``key``; ``key`` itself where untied."""
        return key


class ModuleWeights(Weights):
    """The state dict of a module in memory; tensors are views, not copies."""

    def __init__(self, module: nn.Module):
        self._tensors: dict[str, Tensor] = {k: v.detach() for k, v in module.state_dict().items()}
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        self._tied_to = {
            key: first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), key)
            if tensor.numel()
            else key
            for key, tensor in self._tensors.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        tensor = self._tensors[key]
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    def tied_to(self, key: str) -> str:
        """Return the first key whose tensor is the same memory."""
        return self._tied_to[key]


def is_special(name: str) -> bool:
    """Tell whether a model's name, such as ``_pretrained_``, keeps it out of the fusion."""
    return name.startswith("_") or name.endswith("_")
