r"""PCB: parameters compete, $\theta = \theta_0 + \lambda \sum_t b_t \tau_t / \sum_t b_t$.

An element's score $b_t$ is larger, the larger its change is in its own task vector and the more it
agrees with the other tasks'; of each task only the elements of the highest scores count.
Du et al., Parameter competition balancing, https://arxiv.org/abs/2410.02396
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from math import log
from typing import Literal

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.problems import check_choice
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.largest import largest, search_bytes
from fusion_bench.weights.ops import Buffers, task_vectors
from fusion_bench.weights.statistics import Piece, extremes, sums, total
from fusion_bench.weights.stream import PIECE

Variant = Literal["paper", "released"]
#: Of a piece, for each model: the score of each element, 0 where it does not count, and its change.
Scored = Callable[[*Piece], Iterator[tuple[Tensor, Tensor]]]


@dataclass(eq=False)
class PCBMerging(TensorwiseAlgorithm):
    """The pretrained model plus the mean of the changes, weighted by their scores.

    Args:
        density: the share of each task vector's elements that count, from 0 to 1: one for all, one
            for each model by name, or a list in the pool's order.
        scaling_factor: scaling factor of the change.
        variant: how elements are scored: ``paper``, or ``released`` as in the authors' code.
    """

    needs_pretrained = True
    elementwise = True

    density: PerModel = 0.1
    scaling_factor: float = 1.0
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_each_between("density", self.density, 0, 1)
        check_choice("variant", self.variant, Variant)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        models = len(inputs.names)
        buffers = 2 * models + 1 if self.variant == "paper" else 0
        pieces = 4 * PIECE * torch.get_num_threads() * buffers
        return pieces + search_bytes(inputs.count(), models)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the ranges of all scores, and the elements to keep."""
        size, densities = inputs.count(), of_each(self.density, inputs.names)
        counts = [int(size * Fraction(str(density))) for density in densities]
        scored = (_as_in_the_paper if self.variant == "paper" else _as_released)(inputs, counts)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            result, scores = torch.zeros_like(base), torch.zeros_like(base)
            for score, vector in scored(key, start, tensors, base):
                scores.add_(score)
                result.add_(vector.mul_(score))
            scores.clamp_(min=torch.finfo(scores.dtype).tiny)
            return result.div_(scores).mul_(self.scaling_factor).add_(base)

        return merge


def _as_in_the_paper(inputs: Inputs, counts: Sequence[int]) -> Scored:
    r"""Score by $\mathrm{softmax}(T N(\tau_t^2)) \sum_u \mathrm{softmax}(N(\tau_t \tau_u))$.

    $N$ maps the whole model's values to the range from 0 to 1.
    """
    size, tasks = inputs.count(), range(len(inputs.names))
    pairs = list(combinations_with_replacement(tasks, 2))
    buffers = Buffers()

    def changes(*piece: *Piece) -> list[Tensor]:
        _, _, tensors, base = piece
        assert base is not None
        return [torch.sub(own, base, out=buffers.like(t, base)) for t, own in enumerate(tensors)]

    def products(*piece: *Piece) -> Iterator[Tensor]:
        vectors = changes(*piece)
        product = buffers.like("product", vectors[0])
        for i, j in pairs:
            yield torch.mul(vectors[i], vectors[j], out=product)

    ranges = dict(zip(pairs, extremes(inputs, products), strict=False))

    # Differences below what a type resolves are none.
    tiny = 100 * torch.finfo(torch.float64 if inputs.is_double else torch.float32).tiny
    slopes = {
        pair: 1 / (high - low) / log(2) if high - low > tiny else 0.0
        for pair, (low, high) in ranges.items()
    }

    # Exponentials are at most 1, so that nothing overflows. Powers of 2 take a third of the time of
    # those of e.
    def shared(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the exponentials of all pairs, one after the other in the same memory."""
        product = buffers.like("product", vectors[0])
        for i, j in pairs:
            slope, (_, high) = slopes[i, j], ranges[i, j]
            torch.mul(vectors[i], vectors[j], out=product)
            shift = torch.tensor(-slope * high, dtype=product.dtype, device=product.device)
            yield torch.add(shift, product, alpha=slope, out=product).exp2_()

    def own(vectors: Sequence[Tensor], task: int) -> Tensor:
        """Return a task's own exponentials; nothing is lost of the highest, which count most."""
        slope, (_, high) = slopes[task, task], ranges[task, task]
        square = torch.mul(vectors[task], vectors[task], out=buffers.like("product", vectors[0]))
        return square.sub_(high).mul_(slope * len(tasks)).exp2_()

    def masses(*piece: *Piece) -> Iterator[Tensor]:
        vectors = changes(*piece)
        yield from shared(vectors)
        for task in tasks:
            yield own(vectors, task)

    # A softmax is scaled to the mean 1, each pair's and each task's own.
    scales = [size / mass for mass in total(sums(inputs, masses, positive=True))]

    def both(*piece: *Piece) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the scores of each task, and its changes."""
        vectors = changes(*piece)
        between = [buffers.like(("between", task), vectors[0]).zero_() for task in tasks]
        for (i, j), scale, exponential in zip(pairs, scales, shared(vectors), strict=False):
            for task in {i, j}:
                between[task].add_(exponential, alpha=scale * scales[len(pairs) + task])
        for task, vector in enumerate(vectors):
            yield between[task].mul_(own(vectors, task)), vector

    cutoffs = largest(inputs, lambda *piece: (score for score, _ in both(*piece)), counts)

    def scored(*piece: *Piece) -> Iterator[tuple[Tensor, Tensor]]:
        key, start, *_ = piece
        for cutoff, (score, vector) in zip(cutoffs, both(*piece), strict=True):
            yield cutoff.keep(key, start, score), vector

    return scored


def _as_released(inputs: Inputs, counts: Sequence[int]) -> Scored:
    r"""Score by $\exp(T N(|\tau_t|)^2) \tanh(\tau_t \sum_u \tau_u)$, from the last that counts on.

    The magnitudes are clipped first: one in 10,000 at either end.
    """
    size, tasks = inputs.count(), len(inputs.names)

    def magnitudes(*piece: *Piece) -> Iterator[Tensor]:
        for vector in task_vectors(*piece):
            yield vector.abs_()

    def both_ends(*piece: *Piece) -> Iterator[Tensor]:
        for magnitude in magnitudes(*piece):
            yield from (magnitude, magnitude)

    clipped = size // 10_000
    ends = largest(inputs, both_ends, [size - clipped, clipped + 1] * tasks, ties=True)
    least = [low for low, _ in extremes(inputs, magnitudes)]
    limits = [
        (max(low, cutoff.value), high.value)
        for low, cutoff, high in zip(least, ends[::2], ends[1::2], strict=False)
    ]

    def signed_scores(*piece: *Piece) -> Iterator[Tensor]:
        vectors = list(task_vectors(*piece))
        together = sum(vectors[1:], vectors[0])
        for vector, (low, high) in zip(vectors, limits, strict=True):
            strength = vector.abs().clamp_(low, high).sub_(low).div_((high - low) or 1)
            agreement = (vector * together).tanh_()
            yield strength.square_().mul_(tasks).exp_().mul_(agreement)

    ranges = extremes(inputs, signed_scores)

    def scores(*piece: *Piece) -> Iterator[Tensor]:
        for score, (low, _) in zip(signed_scores(*piece), ranges, strict=True):
            yield score.sub_(low)

    cuts = largest(inputs, scores, [min(count + 1, size) for count in counts], ties=True)

    def scored(*piece: *Piece) -> Iterator[tuple[Tensor, Tensor]]:
        found = zip(scores(*piece), task_vectors(*piece), cuts, ranges, limits, strict=True)
        for score, vector, cut, (low, high), limit in found:
            score.sub_(cut.value).clamp_(min=0).div_((high - low - cut.value) or 1)
            yield score, vector.abs().clamp_(*limit).mul_(vector.sign_())

    return scored
