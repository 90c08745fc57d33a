r"""MagMax: of each element's changes the largest, $\theta = \theta_0 + \lambda\,\tau_{t^*}$.

Here $t^* = \arg\max_t |\tau_t|$, element by element.
Marczak et al., MagMax, https://arxiv.org/abs/2407.06322
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


class MagMaxAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus, at each element, the task vector's value of largest magnitude.

    Args:
        scaling_factor: scales what is added.
        show_pbar: show a progress bar.
        inplace: write to the pretrained module, of modules given as a dict.
    """

    needs_pretrained = True
    elementwise = True

    def __init__(self, scaling_factor: float = 0.5, show_pbar: bool = True, inplace: bool = False):
        self.scaling_factor = scaling_factor
        self.show_pbar = show_pbar
        self.inplace = inplace

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the largest change; of equal ones the later model's."""
        assert base is not None
        largest = tensors[0] - base
        for tensor in tensors[1:]:
            task_vector = tensor - base
            largest = torch.where(task_vector.abs() >= largest.abs(), task_vector, largest)
        return base + largest * self.scaling_factor
