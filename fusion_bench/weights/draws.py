"""Random numbers that depend on a seed and a place alone.

They are the elements of an infinite sequence for each seed. So an entry may be drawn whole or in
pieces, in any order, on any machine, with the same result.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Elements that share a random stream; what is drawn does not depend on how entries are cut.
_BLOCK = 2**18


def bernoulli(
    keep: float, numel: int, seed: Sequence[object], start: int = 0
) -> NDArray[np.float32]:
    """Draw ``numel`` times 1 with the probability ``keep``, else 0.

    Args:
        keep: the probability.
        numel: how many to draw.
        seed: tells this sequence from others.
        start: the first one's place in the sequence.
    """
    if keep >= 1 or keep <= 0 or numel == 0:
        return np.full(numel, float(keep > 0), np.float32)
    # A byte decides, but for one value in 256, which leaves it to a second draw.
    whole = int(keep * 256)
    rest = float(Fraction(keep) * 256 - whole)
    parts = []
    for block, begin, end in _blocks(start, numel):
        draws = _bits(_generator(*seed, block), -(-end // 8)).view(np.uint8)[:end]
        kept = draws < whole
        if rest:
            undecided = np.flatnonzero(draws == whole)
            kept[undecided] = _generator(*seed, block, "again").random(len(undecided)) < rest
        parts.append(kept.view(np.int8)[begin:].astype(np.float32))
    return _joined(parts)


def uniform(numel: int, seed: Sequence[object], start: int = 0) -> NDArray[np.float32]:
    """Draw numbers from 0 to 1, with arguments as those of ``bernoulli``."""
    blocks = _blocks(start, numel)
    return _joined([_uniform_block(seed, block, end)[begin:] for block, begin, end in blocks])


class Uniform:
    """Numbers as ``uniform`` draws them, for pieces that do not end where blocks do.

    A block is drawn once for the pieces that share it, if these follow each other.

    Args:
        kept: so many blocks are remembered, of a megabyte each.
    """

    def __init__(self, kept: int):
        self._kept = kept
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[object, ...], _Once] = OrderedDict()

    def __call__(
        self, start: int, numel: int, size: int, seed: Sequence[object]
    ) -> NDArray[np.float32]:
        """Draw numbers of an entry of ``size`` elements, from ``start`` on."""
        parts = []
        for block, begin, end in _blocks(start, numel):
            length = min(_BLOCK, size - block * _BLOCK)
            with self._lock:
                whole = self._known.setdefault((*seed, block), _Once())
                self._known.move_to_end((*seed, block))
                if len(self._known) > self._kept:
                    self._known.popitem(last=False)
            drawn = whole.get(partial(_uniform_block, seed, block, length))
            parts.append(drawn[begin:end])
        return _joined(parts)


class _Once:
    """Something that the first thread makes, while the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: NDArray[np.float32] | None = None

    def get(self, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        with self._lock:
            if self._made is None:
                self._made = make()
            return self._made


def normal(numel: int, seed: Sequence[object], start: int = 0) -> NDArray[np.float32]:
    """Draw from the standard normal distribution, with arguments as those of ``bernoulli``."""
    return _joined(
        [
            _generator(*seed, block).standard_normal(end, dtype=np.float32)[begin:]
            for block, begin, end in _blocks(start, numel)
        ]
    )


def drop(
    vector: Tensor, rate: float, rescale: bool, seed: Sequence[object], start: int = 0
) -> Tensor:
    """Set elements to 0 with the probability ``rate`` (DARE).

    Yu et al., https://arxiv.org/abs/2311.03099

    Args:
        vector: a task vector, or a piece of one that starts at ``start``.
        rate: from 0 to 1; where it is 1, nothing is left.
        rescale: divide what is left by ``1 - rate``.
        seed: tells this draw from others.
        start: the first element's place in its entry.
    """
    if rate == 0:
        return vector
    kept = torch.from_numpy(bernoulli(1 - rate, vector.numel(), seed, start))
    dropped = kept.to(vector).view(vector.shape).mul_(vector)
    return dropped.div_(1 - rate) if rescale and rate < 1 else dropped


def _blocks(start: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Yield the blocks that a piece touches, each with the piece's first and last place in it."""
    for block in range(start // _BLOCK, -(-(start + numel) // _BLOCK)):
        first = block * _BLOCK
        yield block, max(start - first, 0), min(start + numel - first, _BLOCK)


def _joined(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])


def _uniform_block(seed: Sequence[object], block: int, numel: int) -> NDArray[np.float32]:
    """Return a block's first numbers: what the generator's ``random`` gives, in half the time."""
    drawn = _bits(_generator(*seed, block), -(-numel // 2)).view("<u4")[:numel]
    drawn >>= 8
    # As signed numbers they are converted faster.
    numbers = drawn.view("<i4").astype(np.float32)
    numbers *= 2.0**-24
    return numbers


def _bits(generator: np.random.Generator, words: int) -> NDArray[np.uint64]:
    """Draw words of 64 bits, the lowest byte first."""
    drawn = generator.integers(0, 2**64, words, dtype=np.uint64)
    return drawn.astype("<u8", copy=False)


def _generator(*seed: object) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, seed)).encode()).digest()
    words = np.frombuffer(digest, "<u4").astype(np.uint32, copy=False)
    return np.random.Generator(np.random.SFC64(words))
