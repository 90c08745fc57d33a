"""Common steps of task-vector methods.

On a CPU, float32 arithmetic is ten times faster than selection by a mask, so masks are 0.0 and 1.0
here.
"""

import re
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fusion_bench.weights.mapping import TensorSpec

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


def less(one: Tensor | float, other: Tensor | float) -> Tensor:
    """Return where one is less than the other; at least one of them is a tensor.

    torch itself takes five times as long on a CPU.
    """
    if any(isinstance(own, Tensor) and not own.is_cpu for own in (one, other)):
        return torch.as_tensor(one < other)
    left, right = (own.numpy() if isinstance(own, Tensor) else own for own in (one, other))
    return torch.from_numpy(np.asarray(np.less(left, right)))


class Buffers(threading.local):
    """Tensors for what is computed piece by piece: each thread uses the same memory every time.

    New memory takes as long as what is written to it.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Tensor] = {}

    def like(self, name: Hashable, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape and type, with anything in it."""
        known = self._known.get(name)
        if known is None or known.numel() < tensor.numel() or known.dtype != tensor.dtype:
            known = self._known[name] = torch.empty_like(tensor).view(-1)
        return known[: tensor.numel()].view(tensor.shape)


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
    values, farthest = _Sums(), _Farthest()
    counts, divisors = _Counts(), _Sums()
    for vector, weight in zip(vectors, repeat(1.0) if weights is None else weights, strict=False):
        own = vector if weight == 1 else vector.mul_(weight)
        if func == "max":
            farthest.add(own)
            continue
        if func == "mean" and plain:
            counts.add(own)
        elif func == "mean":
            divisors.add(own.sign().double(), weight)
        values.add(own)
    sums = farthest if func == "max" else values
    sign: Tensor = sums.total.sign()
    if elected is not None:
        elected(sign)
    _settle(sign, sums.sizes, zero_sign)
    merged = sums.of(sign)
    if func == "mean" and plain:
        merged /= counts.of(sign).clamp_(min=1)
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


class _Counts:
    """How many values are above 0, and how many below: in bytes, as long as these can hold it."""

    def __init__(self) -> None:
        self._counted: list[tuple[Tensor, Tensor]] = []
        self._added = 0

    def add(self, values: Tensor) -> None:
        """Count more values."""
        here = less(0, values), less(values, 0)
        if self._added % 255 == 0:
            above, below = (own.to(torch.uint8) for own in here)
            self._counted.append((above, below))
        else:
            for counted, own in zip(self._counted[-1], here, strict=True):
                counted += own.view(torch.uint8)
        self._added += 1

    def of(self, sign: Tensor) -> Tensor:
        """Return how many have a sign; half of all for 0."""
        above, below = (
            sum((part.to(sign) for part in parts[1:]), parts[0].to(sign))
            for parts in zip(*self._counted, strict=True)
        )
        return torch.addcmul(above + below, above - below, sign).div_(2)


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
