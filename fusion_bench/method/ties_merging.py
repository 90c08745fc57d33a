r"""TIES: trim, elect sign, and merge, $\theta = \theta_0 + \lambda\,\tau$.

In each task vector, the elements with the largest magnitude are kept. For each element, the sign of
the sum is elected, and the values with this sign are merged. Yadav et al., TIES-Merging,
https://arxiv.org/abs/2306.01708
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Literal

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import ModelPool
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.problems import check_choice
from fusion_bench.weights import Inputs, MergedWeights, MergePiece, Weights
from fusion_bench.weights.entries import restoring_l1
from fusion_bench.weights.largest import Cutoff, largest, search_bytes
from fusion_bench.weights.ops import (
    MergeFunc,
    add_scaled,
    disjoint_merge,
    divisor,
    elected_signs,
    task_vectors,
    weighted,
)
from fusion_bench.weights.statistics import Majority, Values

Scope = Literal["model", "tensor"]
Keep = Literal["exact_topk", "ge_kth", "at_least_one"]
ZeroSign = Literal["global_majority", "positive"]
Restore = Literal["none", "l1"]


@dataclass(eq=False)
class TiesMergingAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus the merged task vector of the elements that agree in sign.

    Args:
        scaling_factor: scaling factor of the change.
        threshold: how much of each task vector is kept: a percentage above 1, otherwise a share;
            one for all, one for each model by name, or a list in the pool's order.
        remove_keys: entries that are copied from the pretrained model.
        merge_func: how values of the elected sign are merged: ``mean``, ``sum`` or ``max``.
        scope: where the largest elements are searched: in the whole ``model`` or in each
            ``tensor``.
        keep: ``exact_topk`` keeps just so many, rounded down; ``at_least_one`` keeps one where that
            is none; ``ge_kth`` keeps one more, and all that equal it, as common code does.
        zero_sign: the sign where the sum is 0: that of the ``global_majority``, or ``positive``.
        weights: factors of the task vectors, by which they vote and are merged: one for all, one
            for each model by name, or a list in the pool's order. A negative one turns a model's
            vote.
        rescale: ``l1`` restores each tensor's sum of magnitudes, as before it was trimmed.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    scaling_factor: float = 1.0
    threshold: PerModel = 20
    remove_keys: Sequence[str] = ()
    merge_func: MergeFunc = "mean"
    scope: Scope = "model"
    keep: Keep = "exact_topk"
    zero_sign: ZeroSign = "global_majority"
    weights: PerModel = field(default=1.0, kw_only=True)
    rescale: Restore = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        check_each_between("threshold", self.threshold, 0, 100)
        check_choice("merge_func", self.merge_func, MergeFunc)
        check_choice("scope", self.scope, Scope)
        check_choice("keep", self.keep, Keep)
        check_choice("zero_sign", self.zero_sign, ZeroSign)
        check_choice("rescale", self.rescale, Restore)
        self.shows_nonfinite = self.scope == "model"

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        if self.scope == "tensor":
            size = max(map(inputs.merged, inputs), default=0)
        else:
            size = inputs.count()
        return search_bytes(size, len(inputs.names))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the cutoff of each task vector."""
        return self.merger_of(inputs, task_vectors)

    def merger_of(self, inputs: Inputs, vectors: Values) -> MergePiece:
        """Return the function that trims and merges ``vectors``, one per model."""
        merged = inputs.without(self.remove_keys)
        weights, thresholds = (
            tuple(of_each(own, inputs.names)) for own in (self.weights, self.threshold)
        )
        how = (self.scope, self.keep, self.merge_func, self.zero_sign, self.rescale)
        about = (vectors, weights, thresholds, how)
        change = merged.of_piece(about, lambda: self._change(merged, vectors))

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            if not merged.merged(key):
                return base.clone()
            return (change(key, start, tensors, base) * self.scaling_factor).add_(base)

        return merge

    def _change(self, inputs: Inputs, vectors: Values) -> MergePiece:
        """Return the function that trims ``vectors`` and merges what agrees in sign."""
        trimmed = self._trimmed(inputs, vectors)
        weights = of_each(self.weights, inputs.names)
        majority = self._majority(inputs, trimmed)
        zero_sign = majority if self.zero_sign == "global_majority" else _positive

        def change(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            kept = trimmed(key, start, tensors, base)
            elected = partial(majority.add, key, start)
            return disjoint_merge(kept, self.merge_func, zero_sign, weights, elected)

        return change

    def summing(self, inputs: Inputs, vectors: Values) -> MergePiece:
        """Return the function that adds ``vectors``, or their mean, without an election."""
        weights = of_each(self.weights, inputs.names)
        factor = self.scaling_factor / (divisor(weights) if self.merge_func == "mean" else 1)

        def add(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            return add_scaled(base, vectors(key, start, tensors, base), factor, weights)

        return add

    def agreeing(self, modelpool: ModelPool) -> dict[str, Weights]:
        """Return each model with only those changes that are kept and have the elected sign."""
        inputs = Inputs(aligned(modelpool), modelpool.policy)
        merged = inputs.without(self.remove_keys)
        trimmed = self._trimmed(merged, task_vectors)
        weights = of_each(self.weights, inputs.names)
        majority = self._majority(merged, trimmed)
        zero_sign = majority if self.zero_sign == "global_majority" else _positive

        def keep(
            index: int, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Tensor:
            assert base is not None
            if not merged.merged(key):
                return base.clone()
            kept = list(weighted(trimmed(key, start, tensors, base), weights))
            signs = elected_signs(kept)
            majority.add(key, start, signs)
            signs[signs == 0] = zero_sign()
            return base + kept[index] * (kept[index].sign() == signs)

        return {
            name: MergedWeights(inputs, partial(keep, index))
            for index, name in enumerate(modelpool.model_names)
        }

    def _trimmed(self, inputs: Inputs, vectors: Values) -> Values:
        """Return the function that keeps only the largest elements of ``vectors``."""
        thresholds = of_each(self.threshold, inputs.names)

        def cutoffs(part: Inputs) -> list[Cutoff]:
            counts = [self._count(part.count(), threshold) for threshold in thresholds]
            return largest(part, vectors, counts, ties=self.keep == "ge_kth")

        if self.scope == "tensor":
            found = inputs.each(cutoffs)
        else:
            about = (vectors, *thresholds, self.keep)
            of_all = inputs.remember(about, lambda: cutoffs(inputs))

            def found(key: str) -> list[Cutoff]:
                return of_all

        def trimmed(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            for cutoff, vector in zip(found(key), vectors(key, start, tensors, base), strict=True):
                yield cutoff.keep(key, start, vector)

        return restoring_l1(inputs, trimmed, vectors) if self.rescale == "l1" else trimmed

    def _count(self, size: int, threshold: float) -> int:
        """Return how many of ``size`` elements are kept."""
        share = Fraction(str(threshold)) / (100 if threshold > 1 else 1)
        count = int(size * share) + (self.keep == "ge_kth")
        return min(size, max(count, 1) if self.keep == "at_least_one" else count)

    def _majority(self, inputs: Inputs, trimmed: Values) -> Majority:
        """Return the sign that most of the elected signs have."""
        weights = of_each(self.weights, inputs.names)
        return Majority(inputs, lambda *piece: elected_signs(weighted(trimmed(*piece), weights)))


def _positive() -> int:
    return 1
