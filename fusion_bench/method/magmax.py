r"""MagMax: the largest change of each element, $\theta = \theta_0 + \lambda\,\tau_{t^*}$.

Here $t^* = \arg\max_t |\tau_t|$, element by element.
Marczak et al., MagMax, https://arxiv.org/abs/2407.06322
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.ops import task_vectors, weighted


@dataclass(eq=False)
class MagMaxAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus the change of largest magnitude, elementwise.

    Args:
        scaling_factor: scaling factor of the change.
        weights: factors of the task vectors, by which they are compared and merged: one for all,
            one for each model by name, or a list in the pool's order.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    scaling_factor: float = 0.5
    weights: PerModel = field(default=1.0, kw_only=True)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds the largest change; in a tie, the later model's."""
        weights = of_each(self.weights, inputs.names)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            # Faster than to choose between two at a time: the extremes of both signs, and the
            # larger.
            up, down = torch.zeros_like(base), torch.zeros_like(base)
            for vector in weighted(task_vectors(key, start, tensors, base), weights):
                torch.maximum(up, vector, out=up)
                torch.minimum(down, vector, out=down)
            sign = (up + down).sign_()
            opposite = (1 - sign.abs()).mul_(up).nan_to_num_()  # equally large ones
            if opposite.numel() and opposite.amax() > 0:
                vectors = weighted(task_vectors(key, start, tensors, base), weights)
                return _of_equals(vectors, base).mul_(self.scaling_factor).add_(base)
            largest = up.mul_(sign.clamp(min=0)).sub_(down.mul_(sign.clamp_(max=0)))
            return largest.mul_(self.scaling_factor).add_(base)

        return merge


def _of_equals(vectors: Iterable[Tensor], base: Tensor) -> Tensor:
    """Return the largest changes where the order of the models decides between opposites."""
    largest = torch.zeros_like(base)
    for vector in vectors:
        largest = torch.where(vector.abs() >= largest.abs(), vector, largest)
    return largest
