"""Weights seen under other names, or in their stored types."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fusion_bench.weights.mapping import Cost, Origin, TensorSpec, Weights


class Stacked(Weights):
    """Entries of several weights under new names, in a new order.

    One entry may have several names; these are not tied. Entries that are tied in their weights
    stay tied.

    Args:
        parts: key to the weights with its entry, and the entry's key there.
    """

    def __init__(self, parts: Mapping[str, tuple[Weights, str]]):
        self._parts = dict(parts)
        self._weights = list({id(own): own for own, _ in self._parts.values()}.values())
        self.in_pieces = all(weights.in_pieces for weights in self._weights)
        self.show_progress = any(weights.show_progress for weights in self._weights)
        self._first: dict[tuple[int, str], str] = {}
        for key, (weights, name) in self._parts.items():
            group = id(weights), weights.tied_to(name)
            first = self._first.setdefault(group, key)
            if name == group[1] != self._parts[first][1]:  # what is first there is first here
                self._first[group] = key

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind the entries."""
        return tuple(dict.fromkeys(file for weights in self._weights for file in weights.files))

    def __getitem__(self, key: str) -> Tensor:
        weights, name = self._parts[key]
        return weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        weights, name = self._parts[key]
        return weights.spec(name)

    def tied_to(self, key: str) -> str:
        """Return the first key that shares the entry's memory under another name there."""
        weights, name = self._parts[key]
        first = self._first[id(weights), weights.tied_to(name)]
        return key if self._parts[first][1] == name else first

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry."""
        weights, name = self._parts[key]
        return weights.read(name, start, stop)

    def take(self, key: str, rows: Tensor, width: int) -> Tensor:
        """Return rows of an entry."""
        weights, name = self._parts[key]
        return weights.take(name, rows, width)

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces that the entry may be read in."""
        weights, name = self._parts[key]
        return weights.pieces(name, size)

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry."""
        weights, name = self._parts[key]
        return weights.bytes_to_read(name)

    def cost(self, key: str) -> Cost:
        """Return what reading the entry takes."""
        weights, name = self._parts[key]
        return weights.cost(name)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries that an entry is made of."""
        weights, name = self._parts[key]
        return weights.origins(name)

    def verify(self) -> None:
        """Raise errors that were found while reading."""
        for weights in self._weights:
            weights.verify()


class Renamed(Stacked):
    """Some entries of other weights, with new names and a new order.

    Args:
        weights: the original weights.
        names: new key to key in ``weights``.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]):
        super().__init__({new: (weights, old) for new, old in names.items()})

    def read_or_wait(self, key: str, start: int, stop: int) -> Tensor | None:
        """Return elements of the flattened entry, if they need not wait for others."""
        weights, name = self._parts[key]
        return weights.read_or_wait(name, start, stop)

    def tied_to(self, key: str) -> str:
        """Return the first key that shares the entry's memory, or is another name of it."""
        weights, name = self._parts[key]
        return self._first[id(weights), weights.tied_to(name)]


class Rounded(Stacked):
    """Weights whose entries are rounded to their own types when they are read, as if stored.

    Args:
        weights: the original weights, whose computed entries may be read in float32.
    """

    def __init__(self, weights: Weights):
        super().__init__({key: (weights, key) for key in weights})

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, in its type."""
        return super().read(key, start, stop).to(self.spec(key).dtype)

    def take(self, key: str, rows: Tensor, width: int) -> Tensor:
        """Return rows of an entry, in its type."""
        return super().take(key, rows, width).to(self.spec(key).dtype)


def without_prefix(keys: Mapping[str, object], known: Mapping[str, object]) -> str:
    """Return the prefix of ``keys`` relative to ``known``, possibly empty.

    A model and the same model inside a larger one (an encoder in a classifier) differ by it. It is
    found from one key and counts only if all ``known`` keys are there with it.
    """
    probe = next(iter(known), "")
    for key in keys:
        if key.endswith(f".{probe}"):
            prefix = key.removesuffix(probe)
            if all(f"{prefix}{name}" in keys for name in known):
                return prefix
    return ""
