r"""Karcher mean: the point on the sphere with the smallest mean squared distance to all models.

Each tensor's direction $u$ moves along $\sum_t \alpha_t \log_u(u_t)$ until it rests; its length is
the mean of the models' lengths. Karcher, Riemannian center of mass and mollifier smoothing, 1977,
https://doi.org/10.1002/cpa.3160300502
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import combined, themselves
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.problems import FusionBenchError, check_between
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.statistics import cosines_and_norms, products


@dataclass(eq=False)
class KarcherMeanAlgorithm(TensorwiseAlgorithm):
    """The mean on the sphere of any number of models, tensor by tensor.

    Opposite directions have no mean; then the first model's direction is used.

    Args:
        max_iter: maximum number of steps.
        tol: smaller steps, angles and norms count as zero.
        weights: of the models, of which only the ratios matter: one for all, one for each model by
            name, or a list in the pool's order.
    """

    elementwise = True

    max_iter: int = 10
    tol: float = 1e-5
    weights: PerModel = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_between("max_iter", self.max_iter, 0, math.inf)
        check_between("tol", self.tol, 0, math.inf)
        check_each_between("weights", self.weights, 0, math.inf)

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that are all zero."""
        if not any(of_each(self.weights, inputs.names)):
            raise FusionBenchError("they are all zero.", place=("weights",))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find each entry's weights; the pretrained model is not part of the mean."""
        shares = torch.tensor(of_each(self.weights, inputs.names), dtype=torch.float64)
        found = products(inputs, themselves)
        weights = {key: self._weights(own, shares / shares.sum()) for key, own in found.items()}

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            return combined(tensors, weights[key])

        return merge

    def _weights(self, products: Tensor, shares: Tensor) -> Tensor:
        """Return how much of each model is in the mean."""
        cosines, norms = cosines_and_norms(products)
        there = (norms > self.tol) & (shares > 0)
        weights = torch.zeros_like(norms)
        if there.any():
            own = shares[there] / shares[there].sum()
            weights[there] = self._mean(cosines[there][:, there], own) / norms[there]
        return weights * (norms @ shares)

    def _mean(self, cosines: Tensor, shares: Tensor) -> Tensor:
        """Return the mean direction as a sum of directions that have these cosines.

        All steps stay within what the directions span, so that the cosines are all it takes.
        """

        def length(direction: Tensor) -> Tensor:
            return (direction @ cosines @ direction).clamp(min=0).sqrt()

        mean = shares.clone()
        if length(mean) <= self.tol:
            mean = torch.zeros_like(mean)
            mean[0] = 1
        mean = mean / length(mean)
        for _ in range(self.max_iter):
            to_mean = (cosines @ mean).clamp(-1, 1)
            angles = torch.arccos(to_mean)
            scales = torch.where(angles > self.tol, angles / torch.sin(angles), 0) * shares
            step = scales - (scales @ to_mean) * mean
            distance = length(step)
            if distance <= self.tol:
                break
            mean = torch.cos(distance) * mean + torch.sin(distance) / distance * step
            mean = mean / length(mean)
        return mean
