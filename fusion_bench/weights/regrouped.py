"""Weights in another layout: entries that are put together from ranges of other entries."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fusion_bench.weights.mapping import Origin, TensorSpec, Weights


@dataclass(frozen=True)
class Run:
    """Elements ``start`` to ``stop`` of the flattened entry ``key``."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Arrangement:
    """An entry as the sequence of the ranges that its flattened elements are.

    Attributes:
        shape: the entry's shape.
        runs: the ranges, one behind the other; as many elements as the shape has.
    """

    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @classmethod
    def whole(cls, key: str, shape: Sequence[int]) -> "Arrangement":
        """Return the entry ``key`` as it is."""
        return cls(tuple(shape), (Run(key, 0, prod(shape)),))

    @classmethod
    def of(cls, shape: Sequence[int], runs: Iterable[Run]) -> "Arrangement":
        """Return an arrangement of ``runs``, those that continue each other as one."""
        joined: list[Run] = []
        for run in runs:
            last = joined[-1] if joined else None
            if last is not None and last.key == run.key and last.stop == run.start:
                joined[-1] = Run(run.key, last.start, run.stop)
            else:
                joined.append(run)
        return cls(tuple(shape), tuple(joined))

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries that it is made of."""
        return tuple(dict.fromkeys(run.key for run in self.runs))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(run.stop - run.start for run in self.runs))

    def cut(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the ranges of the elements ``start`` to ``stop``."""
        for index in range(bisect_right(self._ends, start), len(self.runs)):
            run, end = self.runs[index], self._ends[index]
            begin = end - (run.stop - run.start)
            if begin >= stop or start == stop:
                return
            first, last = max(start, begin) - begin, min(stop, end) - begin
            yield Run(run.key, run.start + first, run.start + last)


def rearranged(
    wanted: Mapping[str, Arrangement],
    own: Mapping[str, Arrangement],
    shapes: Mapping[str, TensorSpec],
) -> dict[str, Arrangement]:
    """Return entries of one layout as arrangements of another's.

    Args:
        wanted: name to its arrangement of the entries that are wanted.
        own: the same names' arrangements of the entries that there are. A name that is in one of
            the two only, or has another shape there, is passed over.
        shapes: of the wanted entries.

    Returns:
        The wanted entries whose elements are all known, in the order of ``shapes``.
    """
    found: dict[str, list[tuple[Run, Iterator[Run]]]] = {}
    for name, arrangement in wanted.items():
        other = own.get(name)
        if other is None or other.shape != arrangement.shape:
            continue
        position = 0
        for run in arrangement.runs:
            stop = position + run.stop - run.start
            found.setdefault(run.key, []).append((run, other.cut(position, stop)))
            position = stop
    result = {}
    for key, spec in shapes.items():
        parts = sorted(found.get(key, ()), key=lambda part: part[0].start)
        ends = [0, *(run.stop for run, _ in parts)]
        if [run.start for run, _ in parts] == ends[:-1] and ends[-1] == spec.numel and parts:
            runs = (run for _, there in parts for run in there)
            result[key] = Arrangement.of(spec.shape, runs)
    return result


class Regrouped(Weights):
    """Weights whose entries are ranges of other weights' entries: stacked, joined, split.

    A piece of an entry is read from the pieces that it consists of, and nothing else is held.

    Args:
        weights: the original weights.
        entries: new key to its arrangement. Entries of several types have the widest of them.
    """

    def __init__(self, weights: Weights, entries: Mapping[str, Arrangement]):
        self._weights = weights
        self._entries = dict(entries)
        self._specs = {}
        first: dict[tuple[Run, ...], str] = {}
        self._tied_to = {}
        for key, entry in self._entries.items():
            dtypes = [weights.spec(source).dtype for source in entry.keys]
            dtype = dtypes[0]
            for other in dtypes[1:]:
                dtype = torch.promote_types(dtype, other)
            self._specs[key] = TensorSpec(entry.shape, dtype)
            runs = tuple(Run(weights.tied_to(run.key), run.start, run.stop) for run in entry.runs)
            self._tied_to[key] = first.setdefault(runs, key)
        self.in_pieces = weights.in_pieces
        self.show_progress = weights.show_progress

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind the entries."""
        return self._weights.files

    def __getitem__(self, key: str) -> Tensor:
        entry, spec = self._entries[key], self._specs[key]
        if len(entry.keys) == 1 and spec == self._weights.spec(entry.keys[0]):
            (only,) = entry.keys
            if entry.runs == (Run(only, 0, spec.numel),):
                return self._weights[only]
        return self.read(key, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        return self._specs[key]

    def tied_to(self, key: str) -> str:
        """Return the first key with the same elements."""
        return self._tied_to[key]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, read from where they are."""
        parts = [
            self._weights.read(run.key, run.start, run.stop)
            for run in self._entries[key].cut(start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self._specs[key].dtype)

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry."""
        total = 0.0
        for run in self._entries[key].runs:
            whole = self._weights.spec(run.key).numel
            total += self._weights.bytes_to_read(run.key) * (run.stop - run.start) / max(whole, 1)
        return round(total)

    def described(self) -> str:
        """Return a sentence on an entry that is stored otherwise; empty where none is."""
        other = [(key, entry) for key, entry in self._entries.items() if entry.keys != (key,)]
        if not other:
            return ""
        key, entry = max(other, key=lambda pair: len(pair[1].keys))
        more = f" and {len(entry.keys) - 1} more" if len(entry.keys) > 1 else ""
        return f"'{key}' is read from '{entry.keys[0]}'{more}."

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries of all ranges."""
        entry = self._entries[key]
        return tuple(origin for source in entry.keys for origin in self._weights.origins(source))

    def verify(self) -> None:
        """Raise errors that were found while reading."""
        self._weights.verify()
