r"""DELLA: drop small changes more often than large ones, elect a sign, and merge.

$\tilde\tau_t = m_t \odot \tau_t / q_t$ with $m_t \sim \mathrm{Bernoulli}(q_t)$, where $q_t$ rises
along each row with the rank of the magnitude.
Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.method.ties_merging import TiesMergingAlgorithm, ZeroSign
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.draws import Uniform
from fusion_bench.weights.entries import restoring_l1
from fusion_bench.weights.ops import MergeFunc, Rescale, less, task_vectors
from fusion_bench.weights.ranks import by_rank

Window = Literal["full", "half"]
Merge = Literal["elect", "linear"]
#: Blocks of random numbers that are remembered for each model: threads are at one each, or two.
_KEPT = 4


@dataclass(eq=False)
class DellaMerging(TensorwiseAlgorithm):
    """The pretrained model plus merged task vectors, made sparse by magnitude.

    Args:
        scaling_factor: scaling factor of the change.
        density: the probability that an element is kept, on average over its row; 1 keeps all. One
            for all, one for each model by name, or a list in the pool's order.
        epsilon: the range of this probability along a row, in the same forms.
        window: ``full``: ``epsilon`` is the difference between the largest and the smallest
            element of a row; ``half``: between each of them and the average, as common code has it.
        rescale: ``inverse_keep`` divides what is left by its probability; ``l1`` restores each
            tensor's sum of magnitudes; ``none`` does neither.
        merge: ``elect`` a sign at each element, as TIES does, or be ``linear``.
        merge_func: how the values are merged: ``mean``, ``sum`` or, of elected ones, ``max``.
        seed: the random seed.
        weights: factors of the task vectors, in the same forms; a mean is divided by their sum.
        zero_sign: the elected sign where the sum is 0: that of the ``global_majority``, or
            ``positive``.
    """

    needs_pretrained = True
    shows_nonfinite = True

    scaling_factor: float = 1.0
    density: PerModel = 0.7
    epsilon: PerModel = 0.14
    window: Window = "full"
    rescale: Rescale = "inverse_keep"
    merge: Merge = "elect"
    merge_func: MergeFunc = "mean"
    seed: int | None = None
    weights: PerModel = field(default=1.0, kw_only=True)
    zero_sign: ZeroSign = field(default="global_majority", kw_only=True)

    def __post_init__(self) -> None:
        check_each_between("density", self.density, 0, 1)
        check_each_between("epsilon", self.epsilon, 0, 1)
        check_choice("window", self.window, Window)
        check_choice("rescale", self.rescale, Rescale)
        check_choice("merge", self.merge, Merge)
        check_choice("merge_func", self.merge_func, MergeFunc)
        check_choice("zero_sign", self.zero_sign, ZeroSign)
        if isinstance(self.density, int | float) and isinstance(self.epsilon, int | float):
            self._half_window(self.density, self.epsilon)
        if self.merge == "linear" and self.merge_func == "max":
            raise FusionBenchError("'max' is only for merge=elect.", place=("merge_func",))

    def check(self, inputs: Inputs) -> None:
        """Refuse probabilities of a model that are none."""
        self._windows(inputs)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that rows stay whole."""
        return "rows"

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that makes the task vectors sparse and merges them."""
        windows = self._windows(inputs)
        draws = Uniform(_KEPT * len(inputs.names))

        def pruned(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            vectors = task_vectors(key, start, tensors, base)
            for name, vector, (density, half) in zip(inputs.names, vectors, windows, strict=True):
                if density == 1:
                    yield vector
                    continue
                size, seed = inputs.merged(key), (self.seed or 0, name, key)
                drawn = torch.from_numpy(draws(start, vector.numel(), size, seed))
                yield self._pruned(vector, density, half, drawn.to(vector))

        sparse = restoring_l1(inputs, pruned, task_vectors) if self.rescale == "l1" else pruned
        elected = TiesMergingAlgorithm(
            self.scaling_factor,
            threshold=1,  # nothing more is trimmed
            merge_func=self.merge_func,
            zero_sign=self.zero_sign,
            weights=self.weights,
        )
        if self.merge == "elect":
            return elected.merger_of(inputs, sparse)
        return elected.summing(inputs, sparse)

    def _windows(self, inputs: Inputs) -> list[tuple[float, float]]:
        """Return each model's density, and how far probabilities are from it at most."""
        given = (self.density, self.epsilon)
        densities, epsilons = (of_each(value, inputs.names) for value in given)
        found = zip(densities, epsilons, strict=True)
        return [(density, self._half_window(density, epsilon)) for density, epsilon in found]

    def _half_window(self, density: float, epsilon: float) -> float:
        half = epsilon / 2 if self.window == "full" else epsilon
        least, most = density - half, density + half
        if density < 1 and not 0 < least <= most <= 1:
            raise FusionBenchError(
                f"with density {density} elements would be kept with probabilities from "
                f"{least:g} to {most:g}, which must be greater than 0 and at most 1.",
                place=("epsilon",),
            )
        return half

    def _pruned(self, vector: Tensor, density: float, half: float, draws: Tensor) -> Tensor:
        """Return sparse rows of a task vector: rows lie along all dimensions except the first."""
        rows = vector.flatten(1) if vector.ndim > 1 else vector.reshape(1, -1)
        last = rows.shape[1] - 1
        # From -1 for the smallest to 1 for the largest; 0 for one that is alone.
        place = torch.arange(last + 1).to(rows).mul_(2).sub_(last).div_(max(last, 1))
        keep = by_rank(rows, place.mul_(half).add_(density))
        left = less(draws.view_as(rows), keep).view(torch.int8).to(rows).mul_(rows)
        if self.rescale == "inverse_keep":
            left.div_(keep)
        return left.view(vector.shape)
