"""Weights whose entries are weighted sums of parts of other entries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fusion_bench.weights.mapping import Origin, TensorSpec, Weights


@dataclass(frozen=True)
class Share:
    """A term of a sum: ``factor`` times the flattened entry ``key`` from ``start`` on."""

    key: str
    start: int
    factor: float


@dataclass(frozen=True)
class Sums:
    """An entry whose flattened elements are blocks of one size, each a sum of shares.

    Attributes:
        shape: the entry's shape.
        blocks: the shares of each block, in order.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[Share, ...], ...]

    @property
    def size(self) -> int:
        """The number of elements of a block."""
        return prod(self.shape) // len(self.blocks)


class Averaged(Weights):
    """Entries that are computed from ranges of other weights' entries, in pieces of any size.

    Sums are in float32, in float64 where the source is, and rounded once.

    Args:
        weights: what the shares are taken from.
        entries: key to what it is made of.
        dtype: the type of the entries; by default that of the first share.
    """

    def __init__(
        self, weights: Weights, entries: Mapping[str, Sums], dtype: torch.dtype | None = None
    ):
        self._weights = weights
        self._entries = dict(entries)
        self._dtype = dtype
        self.in_pieces = weights.in_pieces
        self.show_progress = weights.show_progress

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind the entries."""
        return self._weights.files

    def __getitem__(self, key: str) -> Tensor:
        spec = self.spec(key)
        return self.read(key, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        entry = self._entries[key]
        own = self._weights.spec(entry.blocks[0][0].key).dtype
        return TensorSpec(entry.shape, self._dtype or own)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, in float32 or float64."""
        entry = self._entries[key]
        size = entry.size
        parts = []
        for index in range(start // size, -(-stop // size)):
            first, last = max(start - index * size, 0), min(stop - index * size, size)
            parts.append(self._sum(entry.blocks[index], first, last))
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])

    def _sum(self, shares: tuple[Share, ...], first: int, last: int) -> Tensor:
        total: Tensor | None = None
        for share in shares:
            stored = self._weights.read(share.key, share.start + first, share.start + last)
            wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
            term = stored.to(wide, copy=True).mul_(share.factor)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry."""
        entry = self._entries[key]
        shares = [share.key for block in entry.blocks for share in block]
        whole = {name: self._weights.spec(name).numel for name in shares}
        found = (self._weights.bytes_to_read(name) * entry.size / whole[name] for name in shares)
        return round(sum(found))

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries that an entry is made of."""
        keys = dict.fromkeys(share.key for block in self._entries[key].blocks for share in block)
        return tuple(origin for own in keys for origin in self._weights.origins(own))

    def verify(self) -> None:
        """Raise errors that were found while reading."""
        self._weights.verify()
