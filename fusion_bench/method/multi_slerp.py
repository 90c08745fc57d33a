r"""Multi-SLERP: the weighted mean of the directions, scaled to the weighted mean of the norms.

With $u_t = \theta_t / \|\theta_t\|$ the result is
$\frac{\sum_t w_t u_t}{\|\sum_t w_t u_t\|} \sum_t w_t \|\theta_t\|$.
The published method then moves along the mean of the parts of the $u_t$ that are orthogonal to
that direction; but this mean is always zero.

Goddard, Multi-SLERP, 2024, as published with mergekit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import combined, themselves
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError, check_between
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import cosines_and_norms, products

#: What is left of a length of 0 that is computed from its square, in float64.
_ROUNDING = 1e-7


@dataclass(eq=False)
class MultiSlerpAlgorithm(TensorwiseAlgorithm):
    """A mean of any number of models that keeps their norms, tensor by tensor.

    With a pretrained model its task vectors are averaged and added to it.

    Args:
        weights: one for each model by name, or a list in the pool's order; equal where not given.
        normalize_weights: divide the weights by their sum.
        eps: smaller norms count as zero.
    """

    elementwise = True

    weights: PerModel | None = None
    normalize_weights: bool = True
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_between("eps", self.eps, 0, math.inf)

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that do not fit the models."""
        if self.normalize_weights and sum(of_each(self.weights, inputs.names)) == 0:
            raise FusionBenchError("they sum to zero.", place=("weights",))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find each entry's weights: of the tensors, or of the task vectors."""
        given = of_each(self.weights, inputs.names)
        vectors = themselves if inputs.aligned.base is None else task_vectors
        weights = {
            key: self._weights(key, inputs.merged(key), own, given)
            for key, own in products(inputs, vectors).items()
        }

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            merged = combined(list(vectors(key, start, tensors, base)), weights[key])
            return merged if base is None else merged.add_(base)

        return merge

    def _weights(self, key: str, size: int, products: Tensor, given: Sequence[float]) -> Tensor:
        """Return the weight of each tensor in the mean."""
        cosines, norms = cosines_and_norms(products)
        weights = torch.tensor(given, dtype=torch.float64)
        if self.normalize_weights:
            weights = weights / weights.sum()
        length = (weights @ cosines @ weights).clamp(min=0).sqrt()
        if length < max(self.eps, _ROUNDING):
            # A number alone has no direction but its sign, which often cancels out.
            if len(norms) > 2 and norms.any() and size > 1:
                raise FusionBenchError(
                    f"Multi-SLERP: the models' directions cancel out in '{key}'. Use other weights."
                )
            return weights
        lengths = torch.where(norms > 0, norms + self.eps, 1)
        return weights / lengths / length * (weights @ norms)
