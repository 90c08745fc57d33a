r"""Task arithmetic: $\theta = \theta_0 + \lambda \sum_t w_t\,(\theta_t - \theta_0)$.

Ilharco et al., Editing models with task arithmetic, https://arxiv.org/abs/2212.04089
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.weights import Inputs, MergePiece, same_for_all
from fusion_bench.weights.ops import divisor, task_vectors, weighted


@dataclass(eq=False)
class TaskArithmeticAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus the scaled sum of all task vectors.

    Args:
        scaling_factor: of the sum; usually tuned on validation data. A negative value makes the
            model forget the tasks.
        weights: factors of the task vectors: one for all, one for each model by name, or a list in
            the pool's order.
        normalize: divide the weights by their sum.
    """

    needs_pretrained = True
    elementwise = True
    shows_nonfinite = True

    scaling_factor: float = 0.3
    weights: PerModel = field(default=1.0, kw_only=True)
    normalize: bool = field(default=False, kw_only=True)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds the scaled sum of the differences to the base."""
        weights = tuple(of_each(self.weights, inputs.names))
        if type(self) is not TaskArithmeticAlgorithm:  # which may have a merge_tensor of its own
            own = replace(self, weights=weights) if isinstance(self.weights, Mapping) else self
            return same_for_all(own.merge_tensor)
        total = inputs.of_piece((_sum, weights), lambda: partial(_sum, weights))
        factor = self.scaling_factor / (divisor(weights) if self.normalize else 1)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            return (total(key, start, tensors, base) * factor).add_(base)

        return merge

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus ``scaling_factor`` times the sum of the differences to it."""
        assert base is not None
        weights = of_each(self.weights, [""] * len(tensors))
        factor = self.scaling_factor / (divisor(weights) if self.normalize else 1)
        return _sum(weights, key, 0, tensors, base).mul_(factor).add_(base)


def _sum(
    weights: Sequence[float], key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Tensor:
    """Return the weighted sum of the task vectors."""
    vectors = weighted(task_vectors(key, start, tensors, base), weights)
    total = next(vectors)
    for vector in vectors:
        total += vector
    return total
