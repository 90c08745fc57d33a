"""Exact statistics of whole models, from weights that are read piece by piece.

The results do not depend on threads, the order of files, or the size of pieces.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from math import fsum
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fusion_bench.weights.inputs import Inputs
from fusion_bench.weights.matrices import inner_products
from fusion_bench.weights.stream import PIECE, NotYet

T = TypeVar("T")
#: What is measured of a piece: one tensor of its shape for each quantity.
Values = Callable[[str, int, Sequence[Tensor], Tensor | None], Iterable[Tensor]]
#: The arguments of such a function.
Piece = tuple[str, int, Sequence[Tensor], Tensor | None]
#: Elements that are summed at once, in one thread; and those that lose little in float32.
_ROW, _SHORT = 2**14, 128


def sums(inputs: Inputs, values: Values, *, positive: bool = False) -> dict[str, list[float]]:
    """Return, for each merged entry, the sum of each quantity over its elements, in float64.

    Args:
        inputs: the models.
        values: the quantities.
        positive: no value is negative. Then rows of 128 are summed in their own type first, in less
            than half the time: nothing cancels out, and what rounding takes is some 1e-9 of a sum.
    """
    parts: dict[str, dict[int, list[float]]] = {}
    sum_of = _sum_of_positive if positive else _sum

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        parts.setdefault(key, {})[start] = [
            fsum(map(sum_of, value.reshape(-1).split(PIECE)))
            for value in values(key, start, tensors, base)
        ]

    inputs.survey(look)
    return {
        key: [fsum(column) for column in zip(*parts[key].values(), strict=True)]
        for key in sorted(parts)
    }


def _sum(piece: Tensor) -> float:
    """Return the sum; by rows, for torch splits a long sum between its threads."""
    rows = len(piece) // _ROW
    heads = piece[: rows * _ROW].view(rows, _ROW).sum(1, dtype=torch.float64)
    return float(heads.sum() + piece[rows * _ROW :].sum(dtype=torch.float64))


def _sum_of_positive(piece: Tensor) -> float:
    rows = len(piece) // _SHORT
    heads = piece[: rows * _SHORT].view(rows, _SHORT).sum(1).sum(dtype=torch.float64)
    return float(heads + piece[rows * _SHORT :].sum(dtype=torch.float64))


def products(inputs: Inputs, vectors: Values) -> dict[str, Tensor]:
    """Return, for each entry to merge, the inner products of all pairs of quantities, in float64.

    Of the entries that ``inputs.asking`` leaves out there are none.
    """
    parts: dict[str, dict[int, list[list[float]]]] = {}

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        found = inner_products(list(vectors(key, start, tensors, base)))
        # As numbers: small tensors that stay break up the memory of large ones that go.
        parts.setdefault(key, {})[start] = found.tolist()

    inputs.asked().survey(look)
    return {
        key: torch.tensor(
            [parts[key][start] for start in sorted(parts[key])], dtype=torch.float64
        ).sum(0)
        for key in inputs
        if key in parts
    }


def cosines_and_norms(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and norms of vectors that have these inner products.

    One that is zero has no direction: its cosines are 0.
    """
    norms = products.diagonal().sqrt()
    length = torch.where(norms > 0, norms, 1)
    return (products / length / length[:, None]).clamp_(-1, 1), norms


def total(sums: dict[str, list[float]]) -> list[float]:
    """Return each quantity's sum over all entries."""
    return [fsum(column) for column in zip(*sums.values(), strict=True)]


def extremes(inputs: Inputs, values: Values) -> list[tuple[float, float]]:
    """Return each quantity's smallest and largest value in the whole model."""
    found: list[list[list[float]]] = []

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        ends = [torch.stack(v.aminmax()).double() for v in values(key, start, tensors, base)]
        found.append(torch.stack(ends).tolist())

    inputs.survey(look)
    if not found:
        return []
    low, high = torch.tensor(found, dtype=torch.float64).unbind(-1)
    return list(zip(low.amin(0).tolist(), high.amax(0).tolist(), strict=True))


def once(compute: Callable[[], T]) -> Callable[[], T]:
    """Return a function that computes once; other threads wait for the first call."""
    lock = threading.Lock()
    found: list[T] = []

    def get() -> T:
        with lock:
            if not found:
                found.append(compute())
            return found[0]

    return get


class Majority:
    """The sign that most elements of a model have, counted while the model is merged.

    Args:
        inputs: the models.
        signs: of a piece, the sign at each element.
    """

    def __init__(self, inputs: Inputs, signs: Callable[[*Piece], Tensor]):
        self._inputs = inputs
        self._signs = signs
        self._sums: dict[tuple[str, int], int] = {}
        self._size, self._counted = inputs.count(), 0
        self._lock = threading.Lock()
        self._found = once(self._look)

    def add(self, key: str, start: int, signs: Tensor) -> None:
        """Count the signs of a piece, if it is one of those that the models are cut into."""
        piece = start, start + signs.numel()
        if (key, start) not in self._sums and piece in self._inputs.pieces(key, PIECE):
            # Sums of so few are whole numbers in float32 too.
            own = sum(int(part.sum()) for part in signs.reshape(-1).split(2**24))
            with self._lock:
                self._counted += 0 if (key, start) in self._sums else signs.numel()
                self._sums[key, start] = own

    def __call__(self) -> int:
        """Return the sign: -1, 0 or 1.

        Raises:
            NotYet: not all pieces are counted.
        """
        if self._counted < self._size:
            raise NotYet(self._found)
        return int(np.sign(sum(self._sums.values())))

    def _look(self) -> None:
        """Count the pieces that are not."""

        def look(*piece: *Piece) -> None:
            if piece[:2] not in self._sums:
                self.add(*piece[:2], self._signs(*piece))

        if self._counted < self._size:
            self._inputs.survey(look)
