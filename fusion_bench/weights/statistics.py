"""Exact statistics of whole models, from weights that are read piece by piece.

The results do not depend on threads, the order of files, or the size of pieces.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isnan
from typing import Any, TypeVar

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
#: Bins of a histogram that spans all floats, and the most of one that resolves single floats.
_COARSE, _FINE = 2**16, 2**21
#: An estimate looks at one piece of ``_SAMPLE_PIECE`` elements in so many.
_SAMPLED, _SAMPLE_PIECE = 128, 2**11
#: How many places of elements near the cutoffs are remembered, so that no other look is needed.
_REMEMBERED = 2**24
#: Elements that are summed at once, in one thread.
_ROW = 2**14
#: How far off, as a share of all elements, an estimated rank may be.
_MARGIN = 0.006


def sums(inputs: Inputs, values: Values) -> dict[str, list[float]]:
    """Return, for each merged entry, the sum of each quantity over its elements, in float64."""
    parts: dict[str, dict[int, list[float]]] = {}

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        parts.setdefault(key, {})[start] = [
            fsum(map(_sum, value.reshape(-1).split(PIECE)))
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
            # Sums of so few are whole numbers in float32 too; what is not finite has no sign.
            total = sum(float(part.sum()) for part in signs.reshape(-1).split(2**24))
            with self._lock:
                self._counted += 0 if (key, start) in self._sums else signs.numel()
                self._sums[key, start] = 0 if isnan(total) else int(total)

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


@dataclass(frozen=True)
class Cutoff:
    """The cutoff of a model's largest elements.

    Attributes:
        value: the smallest magnitude that is kept.
        last: key and index of the last element of just that magnitude that is kept, in the order
            of keys; ``None`` keeps all of them.
    """

    value: float
    last: tuple[str, int] | None = None

    def keep(self, key: str, start: int, values: Tensor) -> Tensor:
        """Return ``values``, elements of ``key`` from ``start`` on; 0 where they are cut off."""
        if self.value == 0:
            return values
        # hardshrink keeps what is strictly larger than a number of the values' own type.
        number = np.float64 if values.dtype == torch.float64 else np.float32
        nearest = float(number(self.value))
        smaller = float(np.nextafter(number(nearest), number(0)))
        below = smaller if nearest >= self.value else nearest
        limit = smaller if nearest > self.value else nearest
        if self.last is None or key < self.last[0]:
            return torch.nn.functional.hardshrink(values, below)
        kept = torch.nn.functional.hardshrink(values, limit)
        if key == self.last[0]:
            stop = max(0, self.last[1] + 1 - start)
            head = values.reshape(-1)[:stop]
            kept.view(-1)[:stop] = torch.nn.functional.hardshrink(head, below)
        return kept


def largest(
    inputs: Inputs,
    values: Values,
    counts: Sequence[int],
    *,
    ties: bool = False,
    wide: bool = False,
) -> list[Cutoff]:
    """Find, for each quantity, its ``count`` elements of largest magnitude in the whole model.

    The value of that rank is found in a histogram over the bits of the magnitudes, which sort as
    the magnitudes do. An estimate from a sample narrows it, so that one look at everything is
    enough; where the estimate fails, another look follows.

    Args:
        inputs: the models.
        values: the quantities; floats, which are written to.
        counts: how many elements to keep of each quantity.
        ties: keep all elements of the smallest magnitude kept, instead of just ``count`` in all.
            Where some are to go, those with the last key and index go.
        wide: the quantities are float64; they are float32 unless the models are that too.
    """
    size = inputs.count()
    wide = wide or inputs.is_double
    room = 0 if ties else _REMEMBERED // max(1, len(counts))
    searches = [_Search(min(count, size), size, 64 if wide else 32, room) for count in counts]
    if inputs.in_pieces and size > _SAMPLED * _COARSE:
        _look(inputs, values, searches, sample=True)
        for search in searches:
            search.guess()
    while any(not search.found for search in searches):
        _look(inputs, values, searches)
        for search in searches:
            search.narrow()
    numbers = [search.value() for search in searches]
    lasts: list[tuple[str, int] | None] = [None] * len(searches)
    if not ties:
        lasts = [search.last_tie() for search in searches]
        unknown = {
            index: keep
            for index, search in enumerate(searches)
            if lasts[index] is None and (keep := search.ties_to_keep()) is not None
        }
        if unknown:
            lasts = _last_ties(inputs, values, numbers, lasts, unknown)
    return [Cutoff(value, last) for value, last in zip(numbers, lasts, strict=True)]


def search_bytes(size: int, quantities: int) -> int:
    """Return the bytes that ``largest`` holds at most, for so many elements of each quantity."""
    near = min(_REMEMBERED, int(2 * _MARGIN * size) * quantities)
    return 8 * near + 8 * 2 * _COARSE * quantities  # a place and the bits there; the histogram


class _Search:
    """The search for the ``rank``-th largest value: a bracket of bits that grows narrower."""

    def __init__(self, rank: int, size: int, bits: int, room: int):
        self.rank = rank
        self.room = room
        self.size = size
        self.word = np.int64 if bits == 64 else np.int32
        self.end = 2 ** (bits - 1)
        self.found = rank in (0, size)
        self.equal = 0  # elements of the value that was found
        self._bracket(0, self.end)

    def _bracket(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = 0
        if high - low > _FINE:
            self.shift = max(0, (high - low - 1).bit_length() - _COARSE.bit_length() + 1)
        bins = ((high - low - 1) >> self.shift) + 1
        self.histogram = torch.zeros(bins, dtype=torch.int64)
        self.above = 0
        # What is in the bracket: the indices in a piece, the bits, and by key and start of a piece
        # where these are. There is one array, for many small ones would break up the memory.
        self.inside: dict[tuple[str, int], slice] = {}
        self.remembers = self.shift == 0 and self.low > 0
        self.remembered = 0
        self.indices = np.empty(self.room if self.remembers else 0, np.int32)
        self.bits = np.empty(len(self.indices), self.word)

    def add(self, key: str, start: int, values: Tensor, lock: threading.Lock) -> None:
        """Count values, which are written to."""
        bits: Any = values.abs_().cpu().numpy().reshape(-1).view(self.word)
        above, here = 0, None
        if self.high < self.end or self.low > 0:
            beyond = bits >= self.high
            above = int(np.count_nonzero(beyond))
            here = np.flatnonzero((bits >= self.low) ^ beyond).astype(np.int32)
            bits = bits[here]
        bins = torch.from_numpy((bits - self.word(self.low)) >> self.word(self.shift))
        ones = torch.ones(1, dtype=torch.int64).expand(len(bins))
        with lock:
            self.above += above
            self.histogram.index_add_(0, bins, ones)
            own = slice(self.remembered, self.remembered + len(bits))
            self.remembered = own.stop
            if self.remembers and own.stop > self.room:
                self.remembers = False
                self.inside.clear()
                self.indices, self.bits = np.empty(0, np.int32), np.empty(0, self.word)
            elif self.remembers and here is not None:
                self.indices[own], self.bits[own] = here, bits
                self.inside[key, start] = own

    def guess(self) -> None:
        """Take the bracket from the counts of a sample."""
        if self.found:
            return
        seen = int(self.histogram.sum())
        rank, margin = self.rank / self.size * seen, _MARGIN * seen
        from_top = self.histogram.flip(0).cumsum(0)
        first, last = (
            int(torch.searchsorted(from_top, torch.tensor(max(1, min(seen, int(place))))))
            for place in (rank - margin, rank + margin)
        )
        width, bins = 1 << self.shift, len(self.histogram)
        self._bracket((bins - 1 - last) * width, min(self.end, (bins - first) * width))

    def narrow(self) -> None:
        """Take the bracket from the counts of everything."""
        if self.found:
            return
        inside = int(self.histogram.sum())
        if self.rank <= self.above:
            self._bracket(self.high, self.end)
            return
        if self.rank > self.above + inside:
            self._bracket(0, self.low)
            return
        from_top = self.histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, torch.tensor(self.rank - self.above)))
        chosen = len(self.histogram) - 1 - place
        if self.shift == 0:
            self.found = True
            self.equal = int(self.histogram[chosen])
            self.above += int(from_top[place]) - self.equal
            self.low += chosen
            return
        low = self.low + (chosen << self.shift)
        self._bracket(low, min(self.high, low + (1 << self.shift)))

    def value(self) -> float:
        """Return the value: of rank 0 it is infinity, of the last rank at most 0."""
        if self.rank == 0:
            return float("inf")
        if self.rank == self.size:
            return 0.0
        return float(
            np.array([self.low], self.word).view(np.float64 if self.end > 2**31 else np.float32)[0]
        )

    def ties_to_keep(self) -> int | None:
        """Return how many of the elements of that value are kept; ``None`` where it is all."""
        keep = self.rank - self.above
        return None if self.rank in (0, self.size) or keep == self.equal else keep

    def last_tie(self) -> tuple[str, int] | None:
        """Return the place of the last element of that value that is kept, if it is known."""
        keep = self.ties_to_keep()
        if keep is None or not self.remembers:
            return None
        for key, start in sorted(self.inside):
            own = self.inside[key, start]
            ties = self.indices[own][self.bits[own] == self.low]
            if len(ties) >= keep:
                return key, start + int(ties[keep - 1])
            keep -= len(ties)
        return None


def _look(
    inputs: Inputs,
    values: Values,
    searches: Sequence[_Search],
    sample: bool = False,
) -> None:
    lock = threading.Lock()

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        for search, found in zip(searches, values(key, start, tensors, base), strict=True):
            if not search.found:
                wide = search.end > 2**31
                search.add(key, start, found.double() if wide else found, lock)

    if sample:
        inputs.survey(look, _SAMPLE_PIECE, _SAMPLED)
    else:
        inputs.survey(look)


def _last_ties(
    inputs: Inputs,
    values: Values,
    numbers: Sequence[float],
    lasts: Sequence[tuple[str, int] | None],
    unknown: Mapping[int, int],
) -> list[tuple[str, int] | None]:
    """Return the places of the last elements of just the cutoff that are kept.

    ``unknown`` maps indices to the number of such elements to find.
    """
    lasts = list(lasts)
    wanted = {index: keep for index, keep in unknown.items() if numbers[index] > 0}
    if not wanted:
        return lasts
    found: dict[tuple[str, int], dict[int, int]] = {}

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        counts = {
            i: int(torch.count_nonzero(value.abs().double() == numbers[i]))
            for i, value in enumerate(values(key, start, tensors, base))
            if i in wanted
        }
        found[key, start] = counts

    inputs.survey(look)
    for i, keep in wanted.items():
        for key, start in sorted(found):
            here = found[key, start][i]
            if here >= keep:
                lasts[i] = key, start + _nth_tie(inputs, values, numbers[i], (key, start), i, keep)
                break
            keep -= here
    return lasts


def _nth_tie(
    inputs: Inputs, values: Values, number: float, place: tuple[str, int], which: int, nth: int
) -> int:
    """Return where in a piece the ``nth`` element of that value stands."""
    key, start = place
    stop = next(stop for begin, stop in inputs.pieces(key, PIECE) if begin == start)
    every = list(values(key, start, *inputs.read(key, start, stop)))
    return int((every[which].reshape(-1).abs().double() == number).nonzero()[nth - 1])
