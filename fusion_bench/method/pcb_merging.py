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
from fusion_bench.weights.ops import task_vectors
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
        products = models**2 if self.variant == "paper" else 0
        pieces = 4 * PIECE * torch.get_num_threads() * products
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

    def products(*piece: *Piece) -> Iterator[Tensor]:
        """Yield one after the other in the same memory: new pages would take as long as they."""
        vectors = list(task_vectors(*piece))
        product = torch.empty_like(vectors[0])
        for i, j in pairs:
            yield torch.mul(vectors[i], vectors[j], out=product)

    ranges = extremes(inputs, products)

    # Differences below what a type resolves are none.
    tiny = 100 * torch.finfo(torch.float64 if inputs.is_double else torch.float32).tiny
    slopes = [1 / (high - low) / log(2) if high - low > tiny else 0.0 for low, high in ranges]

    def exponentials(*piece: *Piece) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield a pair's, and where a task is paired with itself those of its own softmax.

        All are at most 1, so that nothing overflows. Powers of 2 take a third of the time of those
        of e.
        """
        sharper = torch.empty_like(piece[2][0])
        for (i, j), product, slope, (_, high) in zip(
            pairs, products(*piece), slopes, ranges, strict=True
        ):
            own = None
            if i == j:  # some are large: nothing may be lost of the highest, which count most
                own = torch.sub(product, high, out=sharper).mul_(slope * len(tasks)).exp2_()
            shift = torch.tensor(-slope * high, dtype=product.dtype, device=product.device)
            yield torch.add(shift, product, alpha=slope, out=product).exp2_(), own

    def masses(*piece: *Piece) -> Iterator[Tensor]:
        for pair, own in exponentials(*piece):
            yield pair
            if own is not None:
                yield own

    found = iter(size / mass for mass in total(sums(inputs, masses, positive=True)))
    # A softmax is scaled to the mean 1, for each pair and for each task's own.
    scales = [(next(found), next(found) if i == j else 1.0) for i, j in pairs if size]

    def scores(*piece: *Piece) -> Iterator[Tensor]:
        between = [torch.zeros_like(tensor) for tensor in piece[2]]
        alone = []
        found = zip(pairs, scales, exponentials(*piece), strict=True)
        for (i, j), (scale, own_scale), (pair, own) in found:
            between[i].add_(pair, alpha=scale)
            if own is None:
                between[j].add_(pair, alpha=scale)
            else:
                alone.append(own.mul(own_scale))
        for softmax, shared in zip(alone, between, strict=True):
            yield shared.mul_(softmax)

    cutoffs = largest(inputs, scores, counts)

    def scored(*piece: *Piece) -> Iterator[tuple[Tensor, Tensor]]:
        key, start, *_ = piece
        found = zip(cutoffs, scores(*piece), task_vectors(*piece), strict=True)
        for cutoff, score, vector in found:
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
