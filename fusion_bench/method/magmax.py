r"""MagMax: the largest change of each element, $\theta = \theta_0 + \lambda\,\tau_{t^*}$.

Here $t^* = \arg\max_t |\tau_t|$, element by element.
Marczak et al., MagMax, https://arxiv.org/abs/2407.06322
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.weights.ops import task_vectors


@dataclass(eq=False)
class MagMaxAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus the change of largest magnitude, elementwise.

    Args:
        scaling_factor: scaling factor of the change.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    scaling_factor: float = 0.5

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the largest change; in a tie, the later model's."""
        assert base is not None
        # Faster than to choose between two at a time: the extremes of both signs, and the larger.
        up, down = torch.zeros_like(base), torch.zeros_like(base)
        for vector in task_vectors(key, 0, tensors, base):
            torch.maximum(up, vector, out=up)
            torch.minimum(down, vector, out=down)
        sign = (up + down).sign_()
        opposite = (1 - sign.abs()).mul_(up).nan_to_num_()  # equally large ones
        if opposite.numel() and opposite.amax() > 0:
            return base + self._of_equals(key, tensors, base) * self.scaling_factor
        largest = up.mul_(sign.clamp(min=0)).sub_(down.mul_(sign.clamp_(max=0)))
        return largest.mul_(self.scaling_factor).add_(base)

    def _of_equals(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the largest changes where the order of the models decides between opposites."""
        largest = torch.zeros_like(base)
        for vector in task_vectors(key, 0, tensors, base):
            largest = torch.where(vector.abs() >= largest.abs(), vector, largest)
        return largest
