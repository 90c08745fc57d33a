r"""Model Breadcrumbs: $\theta = \theta_0 + \lambda \sum_t m_t \odot \tau_t$ without both tails.

The mask $m_t$ removes each tensor's largest changes, which are outliers, and its smallest, which
are noise.
Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.della import Merge
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.method.ties_merging import Restore, TiesMergingAlgorithm, ZeroSign
from fusion_bench.problems import check_choice
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.entries import restoring_l1
from fusion_bench.weights.largest import Cutoff, largest, search_bytes
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.ranks import by_rank
from fusion_bench.weights.statistics import Piece

Scope = Literal["tensor", "row"]
MeanOrSum = Literal["sum", "mean"]
GivesWay = Literal["density", "gamma"]


@dataclass(eq=False)
class ModelBreadcrumbs(TensorwiseAlgorithm):
    """Task arithmetic with the elements of medium magnitude.

    Args:
        scaling_factor: scaling factor of the sum of the kept elements.
        density: the share of elements that is kept: one for all, one for each model by name, or a
            list in the pool's order.
        gamma: the share of the largest elements, which are dropped, in the same forms.
        scope: shares of the whole ``tensor``, or of each ``row`` along its last dimension. Shares
            are rounded down. Entries with a single value are kept.
        gives_way: which of the two shares is made smaller where they are more than 1 together.
        weights: factors of the task vectors, in the same forms as ``density``.
        merge: ``linear`` adds what is kept; ``elect`` elects a sign at each element, as TIES does.
        merge_func: how the values are merged: ``sum`` or ``mean``, which divides by the sum of the
            weights, of those that agree where a sign is elected.
        zero_sign: the elected sign where the sum is 0: that of the ``global_majority``, or
            ``positive``.
        rescale: ``l1`` restores each tensor's sum of magnitudes.
    """

    needs_pretrained = True

    scaling_factor: float = 0.3
    density: PerModel = 0.1
    gamma: PerModel = 0.01
    scope: Scope = "tensor"
    gives_way: GivesWay = field(default="density", kw_only=True)
    weights: PerModel = field(default=1.0, kw_only=True)
    merge: Merge = field(default="linear", kw_only=True)
    merge_func: MeanOrSum = field(default="sum", kw_only=True)
    zero_sign: ZeroSign = field(default="global_majority", kw_only=True)
    rescale: Restore = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        check_each_between("density", self.density, 0, 1)
        check_each_between("gamma", self.gamma, 0, 1)
        check_choice("scope", self.scope, Scope)
        check_choice("gives_way", self.gives_way, GivesWay)
        check_choice("merge", self.merge, Merge)
        check_choice("merge_func", self.merge_func, MeanOrSum)
        check_choice("zero_sign", self.zero_sign, ZeroSign)
        check_choice("rescale", self.rescale, Restore)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that rows stay whole where shares are of a row."""
        return "rows" if self.scope == "row" else "elements"

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        size = max(map(inputs.merged, inputs), default=0)
        return 0 if self.scope == "row" else search_bytes(size, 2 * len(inputs.names))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that merges what is kept of the task vectors."""
        densities, gammas = (of_each(value, inputs.names) for value in (self.density, self.gamma))
        cutoffs = inputs.each(partial(self._cutoffs, densities, gammas))

        def medium(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            vectors = task_vectors(key, start, tensors, base)
            if not inputs.spec(key).shape:
                yield from vectors
            elif self.scope == "row":
                yield from map(self._medium, vectors, densities, gammas)
            else:
                for vector, (kept, outliers) in zip(vectors, cutoffs(key), strict=True):
                    yield kept.keep(key, start, vector) - outliers.keep(key, start, vector)

        kept = restoring_l1(inputs, medium, task_vectors) if self.rescale == "l1" else medium
        elected = TiesMergingAlgorithm(
            self.scaling_factor,
            threshold=1,  # nothing more is trimmed
            merge_func=self.merge_func,
            zero_sign=self.zero_sign,
            weights=self.weights,
        )
        if self.merge == "elect":
            return elected.merger_of(inputs, kept)
        return elected.summing(inputs, kept)

    def _cutoffs(
        self, densities: Sequence[float], gammas: Sequence[float], entry: Inputs
    ) -> list[tuple[Cutoff, Cutoff]]:
        """Return, for each model, the cutoffs of what is kept with the outliers, and of these."""

        def twice(*piece: *Piece) -> Iterator[Tensor]:
            for vector in task_vectors(*piece):
                yield from (vector, vector)

        counts = [
            self._counts(entry.count(), *shares) for shares in zip(densities, gammas, strict=True)
        ]
        both = [count for top, kept in counts for count in (top + kept, top)]
        found = largest(entry, twice, both)
        return list(zip(found[::2], found[1::2], strict=True))

    def _counts(self, size: int, density: float, gamma: float) -> tuple[int, int]:
        """Return how many of ``size`` elements are outliers, and how many are kept."""
        top, kept = (int(size * Fraction(str(share))) for share in (gamma, density))
        return (min(top, size - kept) if self.gives_way == "gamma" else top), kept

    def _medium(self, rows: Tensor, density: float, gamma: float) -> Tensor:
        """Return rows without their largest and smallest elements."""
        size = rows.shape[-1]
        top, kept = self._counts(size, density, gamma)
        place = size - 1 - torch.arange(size, device=rows.device)  # from the largest on
        return rows * by_rank(rows, ((place >= top) & (place < top + kept)).to(rows))
