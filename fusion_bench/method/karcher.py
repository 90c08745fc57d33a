r"""Karcher mean: the point on the sphere with the smallest mean squared distance to all models.

Each tensor's direction $u$ moves along $\sum_t \alpha_t \log_u(u_t)$ until it rests; its length is
the mean of the models' lengths. Karcher, Riemannian center of mass and mollifier smoothing, 1977,
https://doi.org/10.1002/cpa.3160300502
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import combined, themselves
from fusion_bench.problems import check_between
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.statistics import cosines_and_norms, products


@dataclass(eq=False)
class KarcherMeanAlgorithm(TensorwiseAlgorithm):
    """The mean on the sphere of any number of models, tensor by tensor.

    Opposite directions have no mean; then the first model's direction is used.

    Args:
        max_iter: maximum number of steps.
        tol: smaller steps, angles and norms count as zero.
    """

    elementwise = True

    max_iter: int = 10
    tol: float = 1e-5

    def __post_init__(self) -> None:
        check_between("max_iter", self.max_iter, 0, math.inf)
        check_between("tol", self.tol, 0, math.inf)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find each entry's weights; the pretrained model is not part of the mean."""
        weights = {key: self._weights(own) for key, own in products(inputs, themselves).items()}

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            return combined(tensors, weights[key])

        return merge

    def _weights(self, products: Tensor) -> Tensor:
        """Return how much of each model is in the mean."""
        cosines, norms = cosines_and_norms(products)
        there = norms > self.tol
        weights = torch.zeros_like(norms)
        if there.any():
            weights[there] = self._mean(cosines[there][:, there]) / norms[there]
        return weights * norms.mean()

    def _mean(self, cosines: Tensor) -> Tensor:
        """Return the mean direction as a sum of directions that have these cosines.

        All steps stay within what the directions span, so that the cosines are all it takes.
        """

        def length(direction: Tensor) -> Tensor:
            return (direction @ cosines @ direction).clamp(min=0).sqrt()

        mean = torch.full_like(cosines[0], 1 / len(cosines))
        if length(mean) <= self.tol:
            mean = torch.zeros_like(mean)
            mean[0] = 1
        mean = mean / length(mean)
        for _ in range(self.max_iter):
            to_mean = (cosines @ mean).clamp(-1, 1)
            angles = torch.arccos(to_mean)
            scales = torch.where(angles > self.tol, angles / torch.sin(angles), 0)
            step = (scales - (scales @ to_mean) * mean) / len(mean)
            distance = length(step)
            if distance <= self.tol:
                break
            mean = torch.cos(distance) * mean + torch.sin(distance) / distance * step
            mean = mean / length(mean)
        return mean
