"""The largest elements of whole models, exactly, from weights that are read piece by piece.

The results do not depend on threads, the order of files, or the size of pieces.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights.inputs import Inputs
from fusion_bench.weights.statistics import Values
from fusion_bench.weights.stream import PIECE

#: Bins of a histogram that spans all floats, and the most of one that resolves single floats.
_COARSE, _FINE = 2**16, 2**21
#: Of more than ``_FEW`` elements an estimate looks at one in ``_SAMPLED`` or more, so that samples
#: together have ``_SAMPLES`` at most. Ranks may be so many standard deviations off.
_FEW, _SAMPLED, _SAMPLES, _DEVIATIONS = 2**17, 61, 2**21, 4
#: How many elements near the cutoffs are remembered, so that no other look is needed.
_REMEMBERED = 2**24


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

    The bits of magnitudes sort as the magnitudes do. A sample tells between which two of them the
    value of that rank is, so that one look at everything is enough: it counts what is above, and
    remembers what is between. Where the sample was wrong, or too many are between, a histogram of
    the bits narrows it down.

    Args:
        inputs: the models.
        values: the quantities; floats, which are written to. One may come several times in a row.
        counts: how many elements to keep of each quantity.
        ties: keep all elements of the smallest magnitude kept, instead of just ``count`` in all.
            Where some are to go, those with the last key and index go.
        wide: the quantities are float64; they are float32 unless the models are that too.
    """
    size = inputs.count()
    wide = wide or inputs.is_double
    room = _REMEMBERED // max(1, len(counts))
    searches = [_Search(min(count, size), size, wide, room, places=not ties) for count in counts]
    if size > _FEW and inputs.is_quick and not all(search.found for search in searches):
        _look(inputs, values, searches, wide, _every(size, len(counts)))
    while any(not search.found for search in searches):
        _look(inputs, values, searches, wide)
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
    drawn = size // _every(size, quantities) if size > _FEW else size
    near = min(size, int(_DEVIATIONS * size / drawn**0.5) + drawn) if drawn else 0
    # A place and bits of what is near, the sample with a copy, and a histogram of two words.
    return (
        8 * min(_REMEMBERED, near * quantities) + (8 * min(size, drawn) + 16 * _COARSE) * quantities
    )


def _every(size: int, quantities: int) -> int:
    """Return one in how many elements makes a sample; odd, for rows have even lengths."""
    return max(_SAMPLED, size * quantities // _SAMPLES) | 1


class _Search:
    """The search for the ``rank``-th largest value: a bracket of bits that grows narrower.

    What is in the bracket is remembered where there is room for it, else it is counted by its bits.
    """

    def __init__(self, rank: int, size: int, wide: bool, room: int, places: bool):
        self.rank = rank
        self.room = room
        self.size = size
        self.places = places
        self.word: type[np.integer[Any]] = np.int64 if wide else np.int32
        self.end = 2 ** (63 if wide else 31)
        self.found = rank in (0, size)
        self.equal = 0  # elements of the value that was found
        self.sample: list[NDArray[Any]] = []
        self._bracket(0, self.end, size if size <= _FEW else None)

    def _bracket(self, low: int, high: int, inside: int | None) -> None:
        """Look from ``low`` to below ``high``, where about so many elements are."""
        self.low, self.high = low, high
        self.above = 0
        self.remembers = inside is not None and inside <= self.room
        self.remembered = 0
        # By key and start of a piece, what of these is its own: the indices in the piece, and the
        # bits. There is one array, for many small ones would break up the memory.
        self.inside: dict[tuple[str, int], slice] = {}
        room = self.room if self.remembers else 0
        self.indices = np.empty(room if self.places else 0, np.int32)
        self.bits = np.empty(room, self.word)
        self.shift = 0
        if high - low > _FINE:
            self.shift = max(0, (high - low - 1).bit_length() - _COARSE.bit_length() + 1)
        bins = 0 if self.remembers else ((high - low - 1) >> self.shift) + 1
        self.histogram = torch.zeros(bins, dtype=torch.int64)

    def add(self, key: str, start: int, bits: NDArray[Any], lock: threading.Lock) -> None:
        """Look at the bits of a piece's magnitudes."""
        above, here = 0, None
        if self.high < self.end or self.low > 0:
            inside = bits >= self.word(self.low)
            if self.high < self.end:
                beyond = bits >= self.word(self.high)
                above = int(np.count_nonzero(beyond))
                inside ^= beyond
            here = np.flatnonzero(inside)
            bits = bits[here]
        if not self.remembers:
            bins = torch.from_numpy((bits - self.word(self.low)) >> self.word(self.shift))
            ones = torch.ones(1, dtype=torch.int64).expand(len(bins))
        with lock:
            self.above += above
            own = slice(self.remembered, self.remembered + len(bits))
            self.remembered = own.stop
            if not self.remembers:
                self.histogram.index_add_(0, bins, ones)
            elif own.stop <= self.room:
                self.bits[own] = bits
                self.inside[key, start] = own
                if self.places:
                    self.indices[own] = np.arange(len(bits)) if here is None else here

    def guess(self) -> None:
        """Take the bracket from a sample."""
        drawn = np.concatenate(self.sample) if self.sample else np.empty(0, self.word)
        self.sample.clear()
        number, share = len(drawn), self.rank / self.size
        if not number:
            return
        margin = 1 + _DEVIATIONS * (share * (1 - share) * number) ** 0.5
        first, last = int((1 - share) * number - margin), int((1 - share) * number + margin)
        drawn.partition([max(0, first), min(last, number - 1)])
        low = int(drawn[first]) if first >= 0 else 0
        high = int(drawn[last]) + 1 if last < number else self.end
        inside = int(np.count_nonzero((drawn >= low) & (drawn < high)))
        self._bracket(low, high, int(1.2 * inside / number * self.size))

    def narrow(self) -> None:
        """Take the bracket, or the value, from everything."""
        inside = self.remembered
        if self.rank <= self.above:
            self._bracket(self.high, self.end, None)
        elif self.rank > self.above + inside:
            self._bracket(0, self.low, None)
        elif self.remembers and inside > self.room:
            self._bracket(self.low, self.high, None)
        elif self.remembers:
            place = inside - (self.rank - self.above)
            ordered = np.partition(self.bits[:inside], place)
            self._find(int(ordered[place]), ordered[place:])
        else:
            self._narrow_to_bin()

    def _find(self, value: int, from_there: NDArray[Any]) -> None:
        """Take the value; of it and larger ones are these."""
        self.equal = int(np.count_nonzero(self.bits[: self.remembered] == value))
        self.above += int(np.count_nonzero(from_there > value))
        self.low, self.found = value, True

    def _narrow_to_bin(self) -> None:
        from_top = self.histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, torch.tensor(self.rank - self.above)))
        chosen = len(self.histogram) - 1 - place
        here = int(self.histogram[chosen])
        if self.shift == 0:
            self.equal, self.found = here, True
            self.above += int(from_top[place]) - here
            self.low += chosen
            return
        low = self.low + (chosen << self.shift)
        self._bracket(low, min(self.high, low + (1 << self.shift)), here)

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
        if keep is None or not (self.remembers and self.places):
            return None
        for key, start in sorted(self.inside):
            own = self.inside[key, start]
            ties = self.indices[own][self.bits[own] == self.low]
            if len(ties) >= keep:
                return key, start + int(ties[keep - 1])
            keep -= len(ties)
        return None


def _look(
    inputs: Inputs, values: Values, searches: Sequence[_Search], wide: bool, every: int = 1
) -> None:
    """Look at everything, or at a sample, and narrow the brackets."""
    lock = threading.Lock()
    open_ones = [search for search in searches if not search.found]

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        last, bits = None, np.empty(0)
        for search, found in zip(searches, values(key, start, tensors, base), strict=True):
            if search.found:
                continue
            if found is not last:  # several searches may look at one quantity
                exact = found.double() if wide else found
                last, bits = found, exact.abs_().cpu().numpy().reshape(-1).view(search.word)
            if every > 1:
                search.sample.append(bits.copy())
            else:
                search.add(key, start, bits, lock)

    inputs.survey(look, every)
    for search in open_ones:
        search.narrow() if every == 1 else search.guess()


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
