r"""Model Breadcrumbs: $\theta = \theta_0 + \lambda \sum_t m_t \odot \tau_t$ without both tails.

The mask $m_t$ removes each tensor's largest changes, which are outliers, and its smallest, which
are noise.
Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between, check_choice
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.ops import add_scaled, ranks, task_vectors
from fusion_bench.weights.statistics import Cutoff, Piece, largest

Scope = Literal["tensor", "row"]


@dataclass(eq=False)
class ModelBreadcrumbs(TensorwiseAlgorithm):
    """Task arithmetic with the elements of medium magnitude.

    Args:
        scaling_factor: scaling factor of the sum of the kept elements.
        density: the share of elements that is kept, at most all except the largest.
        gamma: the share of the largest elements, which are dropped.
        scope: shares of the whole ``tensor``, or of each ``row`` along its last dimension. Shares
            are rounded down. Entries with a single value are kept.
    """

    needs_pretrained = True

    scaling_factor: float = 0.3
    density: float = 0.1
    gamma: float = 0.01
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        check_between("density", self.density, 0, 1)
        check_between("gamma", self.gamma, 0, 1)
        check_choice("scope", self.scope, Scope)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that rows stay whole where shares are of a row."""
        return "rows" if self.scope == "row" else "elements"

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds what is kept; find the cutoffs of each tensor."""
        cutoffs = inputs.each(self._cutoffs)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            vectors = task_vectors(key, start, tensors, base)
            if self.scope == "row":
                vectors = map(self._medium, vectors)
            elif inputs.spec(key).shape:
                vectors = (
                    smallest.keep(key, start, vector) - outlier.keep(key, start, vector)
                    for (smallest, outlier), vector in zip(cutoffs(key), vectors, strict=True)
                )
            return add_scaled(base, vectors, self.scaling_factor)

        return merge

    def _cutoffs(self, entry: Inputs) -> list[tuple[Cutoff, Cutoff]]:
        """Return, for each model, the cutoffs of what is kept with the outliers, and of these."""

        def twice(*piece: *Piece) -> Iterator[Tensor]:
            for vector in task_vectors(*piece):
                yield from (vector, vector)

        top, kept = self._counts(entry.count())
        found = largest(entry, twice, [top + kept, top] * len(entry.names))
        return list(zip(found[::2], found[1::2], strict=True))

    def _counts(self, size: int) -> tuple[int, int]:
        """Return how many of ``size`` elements are outliers, and how many are kept."""
        top, kept = (int(size * Fraction(str(share))) for share in (self.gamma, self.density))
        return top, kept

    def _medium(self, rows: Tensor) -> Tensor:
        """Return rows without their largest and smallest elements."""
        if not rows.ndim:
            return rows
        size = rows.shape[-1]
        top, kept = self._counts(size)
        place = size - 1 - ranks(rows)  # from the largest on
        return rows * ((place >= top) & (place < top + kept))
