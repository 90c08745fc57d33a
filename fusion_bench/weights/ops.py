"""Common steps of task-vector methods.

On a CPU, float32 arithmetic is ten times faster than selection by a mask, so masks are 0.0 and 1.0
here.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights.mapping import TensorSpec

#: Elements that share a random stream; what is drawn does not depend on how entries are cut.
_BLOCK = 2**18

#: A block's stack and its place there: the outermost, where blocks have layers of their own.
_BLOCK_KEY = re.compile(r"(.*?(?:^|\.)(?:layers?|blocks?|resblocks|stages|h))\.(\d+)\.")

MergeFunc = Literal["mean", "sum", "max"]
Rescale = Literal["inverse_keep", "l1", "none"]

#: What is left of weights that sum to zero, in float64.
_NOTHING = 1e-12


def task_vectors(
    key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Iterator[Tensor]:
    """Yield each model's task vector; the caller may write to it."""
    assert base is not None
    for tensor in tensors:
        yield tensor - base


def is_linear_weight(key: str, spec: TensorSpec) -> bool:
    """Return whether an entry is the matrix of a linear layer, by name and shape."""
    return len(spec.shape) == 2 and key.endswith("weight") and not _is_embedding(key)


def _is_embedding(key: str) -> bool:
    parts = key.split(".")
    return any("embed" in part or part in ("wte", "wpe", "shared") for part in parts)


def block(key: str) -> tuple[str, int] | None:
    """Return the stack of blocks of an entry, and its block's index."""
    match = _BLOCK_KEY.match(key)
    return (match[1], int(match[2])) if match else None


def by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """Return, at each element, the one of ``values`` at its rank in its row by magnitude.

    Args:
        rows: they lie along the last dimension. The smallest magnitude has the rank 0; of equal
            ones the first comes first.
        values: one for each rank.
    """
    order = _order(rows.abs().reshape(-1, rows.shape[-1]))
    found = torch.empty(order.numel(), dtype=values.dtype, device=values.device)
    return found.scatter_(0, order, values.repeat(order.numel() // len(values))).view(rows.shape)


def _order(magnitudes: Tensor) -> Tensor:
    """Return where in the flattened rows their elements are, each row from the smallest on."""
    rows, columns = magnitudes.shape
    if magnitudes.dtype == torch.float32 and magnitudes.is_cpu and magnitudes.numel() < 2**32:
        # The bits of magnitudes sort as integers do, and numpy sorts these ten times as fast as
        # torch finds an order. The lower half of an integer is the place, which settles ties.
        keys = magnitudes.numpy().view(np.int32).astype(np.int64)
        keys <<= 32
        keys |= np.arange(keys.size).reshape(rows, columns)
        keys.sort(axis=1)
        keys &= 2**32 - 1
        return torch.from_numpy(keys).view(-1)
    starts = torch.arange(rows, device=magnitudes.device)[:, None] * columns
    return (magnitudes.argsort(dim=-1, stable=True) + starts).view(-1)


def add_scaled(
    base: Tensor, vectors: Iterable[Tensor], factor: float, weights: Iterable[float] | None = None
) -> Tensor:
    """Return ``base`` plus ``factor`` times the sum of ``vectors``, each times its weight."""
    total = torch.zeros_like(base)
    if weights is None:
        for vector in vectors:
            total += vector
    else:
        for vector, weight in zip(vectors, weights, strict=True):
            total.add_(vector, alpha=weight)
    return total.mul_(factor).add_(base)


def divisor(weights: Iterable[float]) -> float:
    """Return what turns a sum with these weights into a mean; 1 if they cancel out."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def weighted(vectors: Iterable[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """Yield each vector times its weight; they are written to."""
    for vector, weight in zip(vectors, weights, strict=True):
        yield vector if weight == 1 else vector.mul_(weight)


def disjoint_merge(
    vectors: Iterable[Tensor],
    func: MergeFunc,
    zero_sign: Callable[[], int],
    weights: Sequence[float] | None = None,
    elected: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Elect a sign for each element, and merge the values with this sign.

    The elected sign is that of the sum. Zeros take no part.
    Yadav et al., https://arxiv.org/abs/2306.01708

    Args:
        vectors: task vectors, sparse ones as a rule; they are written to.
        func: how values that agree are merged; ``max`` takes the largest of them.
        zero_sign: gives the sign, -1, 0 (nothing is merged) or 1, of elements whose sum is 0
            though not all values are; it is called only if there are such elements.
        weights: factors of the vectors, by which they vote and are merged. A mean is divided by the
            sum of those that agree, and not divided where that is 0.
        elected: is told the signs of the sums, before ``zero_sign`` is asked.
    """
    plain = weights is None or all(weight == 1 for weight in weights)
    values, divisors, farthest = _Sums(), _Sums(), _Farthest()
    for vector, weight in zip(vectors, repeat(1.0) if weights is None else weights, strict=False):
        own = vector if weight == 1 else vector.mul_(weight)
        if func == "max":
            farthest.add(own)
            continue
        signs = own.sign() if func == "mean" else None
        values.add(own)
        if signs is not None:
            divisors.add(signs if plain else signs.double(), weight)
    sums = farthest if func == "max" else values
    sign: Tensor = sums.total.sign()
    if elected is not None:
        elected(sign)
    _settle(sign, sums.sizes, zero_sign)
    merged = sums.of(sign)
    if func == "mean" and plain:
        merged /= divisors.of(sign).clamp_(min=1)
    elif func == "mean":
        divisor = divisors.of(sign.double())
        merged /= divisor.masked_fill_(divisor.abs() < _NOTHING, 1)
    return merged.mul_(sign)


def _settle(sign: Tensor, sizes: Tensor, zero_sign: Callable[[], int]) -> None:
    """Give a sign to elements whose sum is 0 though not all values are: their size is not."""
    # An element that is not finite must not hide the others.
    contested = (1 - sign.abs()).mul_(sizes).nan_to_num_()
    if contested.numel() and contested.amax() > 0:
        sign.add_(contested.sign_(), alpha=zero_sign())


class _Sums:
    """Sums, from which the sum over the values of either sign follows."""

    total: Any = 0.0
    sizes: Any = 0.0

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Add values, times a weight; they are written to."""
        self.total += values if weight == 1 else values * weight
        self.sizes += values.abs_() if weight == 1 else values.abs_().mul_(weight)

    def of(self, sign: Tensor) -> Tensor:
        """Return the sum of the magnitudes of those values that have a sign; half of all for 0."""
        return torch.addcmul(self.sizes, self.total, sign).div_(2)


class _Farthest:
    """The sum of values, and those farthest from 0 for each sign."""

    total: Any = 0.0
    above: Any = 0.0
    below: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Look at more values."""
        self.total += values
        self.above = values.clamp(min=self.above)
        self.below = values.clamp(max=self.below)

    @property
    def sizes(self) -> Tensor:
        """What is 0 where all values are."""
        size: Tensor = self.above - self.below
        return size

    def of(self, sign: Tensor) -> Tensor:
        """Return the magnitude on the side of a sign; 0 for 0."""
        above: Tensor = self.above * sign.clamp(min=0)
        return above.add_(self.below * sign.clamp(max=0))


def elected_signs(vectors: Iterable[Tensor]) -> Tensor:
    """Return the sign of the sum at each element."""
    total = torch.zeros(())
    for vector in vectors:
        total = vector + total
    return total.sign()


def bernoulli(
    keep: float, numel: int, seed: Sequence[object], start: int = 0
) -> NDArray[np.float32]:
    """Draw ``numel`` times 1 with the probability ``keep``, else 0.

    The draws are the elements from ``start`` of an infinite sequence for ``seed``. So an entry may
    be drawn whole or in pieces, in any order, on any machine, with the same result.
    """
    if keep >= 1 or keep <= 0 or numel == 0:
        return np.full(numel, float(keep > 0), np.float32)
    # A byte decides, but for one value in 256, which leaves it to a second draw.
    whole = int(keep * 256)
    rest = float(Fraction(keep) * 256 - whole)
    parts = []
    for block, begin, end in _blocks(start, numel):
        words = -(-end // 8)
        draw = _generator(*seed, block).integers(0, 2**64, words, dtype=np.uint64)
        draws = draw.astype("<u8", copy=False).view(np.uint8)[:end]
        kept = draws < whole
        if rest:
            undecided = np.flatnonzero(draws == whole)
            kept[undecided] = _generator(*seed, block, "again").random(len(undecided)) < rest
        parts.append(kept.view(np.int8)[begin:].astype(np.float32))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def uniform(numel: int, seed: Sequence[object], start: int = 0) -> NDArray[np.float32]:
    """Draw numbers from 0 to 1, with ``seed`` and ``start`` as in ``bernoulli``."""
    parts = [
        _generator(*seed, block).random(end, dtype=np.float32)[begin:]
        for block, begin, end in _blocks(start, numel)
    ]
    return np.concatenate([np.empty(0, np.float32), *parts])


def normal(numel: int, seed: Sequence[object], start: int = 0) -> NDArray[np.float32]:
    """Draw from the standard normal distribution, with ``seed`` and ``start`` as above."""
    parts = [
        _generator(*seed, block).standard_normal(end, dtype=np.float32)[begin:]
        for block, begin, end in _blocks(start, numel)
    ]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _blocks(start: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Yield the blocks that a piece touches, each with the piece's first and last place in it."""
    for block in range(start // _BLOCK, -(-(start + numel) // _BLOCK)):
        first = block * _BLOCK
        yield block, max(start - first, 0), min(start + numel - first, _BLOCK)


def _generator(*seed: object) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, seed)).encode()).digest()
    return np.random.Generator(np.random.SFC64(np.frombuffer(digest, "<u4").tolist()))


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
