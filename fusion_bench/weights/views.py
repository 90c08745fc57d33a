"""Weights seen under other names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fusion_bench.weights.mapping import TensorSpec, Weights


class Renamed(Weights):
    """Some entries of other weights, with new names and a new order.

    Args:
        weights: the original weights.
        names: new key to key in ``weights``.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]):
        self._weights = weights
        self._names = dict(names)
        self._new = {old: new for new, old in reversed(self._names.items())}
        self.in_pieces = weights.in_pieces
        self.show_progress = weights.show_progress

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind the entries."""
        return self._weights.files

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        return self._weights.spec(self._names[key])

    def tied_to(self, key: str) -> str:
        """Return the new name of the first key that shares the entry's memory."""
        return self._new.get(self._weights.tied_to(self._names[key]), key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry."""
        return self._weights.read(self._names[key], start, stop)

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces that the entry may be read in."""
        return self._weights.pieces(self._names[key], size)

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry."""
        return self._weights.bytes_to_read(self._names[key])

    def verify(self) -> None:
        """Raise errors that were found while reading."""
        self._weights.verify()


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
