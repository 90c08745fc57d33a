"""What an extracted adapter will hold at most, told by headers alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fusion_bench.weights import Cost, Origin, TensorSpec, Weights

#: Bytes of memory for each element of a matrix that is factorised: the two models', their
#: difference, and copies, both sides and the working space of the decomposition in float64.
_BYTES_PER_ELEMENT = 80


@dataclass(frozen=True)
class AdapterEntry:
    """What an adapter has for an entry.

    Attributes:
        key: of the entry.
        spec: of what is stored; two factors are one matrix, [rank, out + in].
        factorised: the elements of the matrix that is factorised for it.
    """

    key: str
    spec: TensorSpec
    factorised: int = 0


def entry_of(key: str, shape: Sequence[int], dtype: torch.dtype, rank: int | None) -> AdapterEntry:
    """Return what an adapter has for an entry: factors of at most a rank; of rank 0 a copy."""
    if rank == 0:
        return AdapterEntry(key, TensorSpec(tuple(shape), dtype))
    rows, columns = shape[0], prod(shape[1:])
    largest = min(rows, columns, rank or rows)
    return AdapterEntry(key, TensorSpec((largest, rows + columns), dtype), rows * columns)


class AdapterOutline(Weights):
    """The entries that an adapter has something for; their values cannot be read.

    Args:
        entries: by the name of their module and their own name in it.
        models: whose entries an adapter is made of.
    """

    in_pieces = False

    def __init__(self, entries: Mapping[str, AdapterEntry], *models: Weights):
        self._entries = dict(entries)
        self._models = models

    def __getitem__(self, key: str) -> Tensor:
        raise RuntimeError(f"'{key}' of an outline has no values.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of what is stored."""
        return self._entries[key].spec

    def cost(self, key: str) -> Cost:
        """Return what making the entry takes."""
        own = self._entries[key]
        known = [model.cost(own.key) for model in self._models if own.key in model]
        peak = max((cost.peak_bytes for cost in known), default=0)
        peak += own.factorised * _BYTES_PER_ELEMENT
        return Cost(sum(cost.bytes_read for cost in known), peak)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the models' entries."""
        own = self._entries[key].key
        return tuple(o for model in self._models if own in model for o in model.origins(own))
