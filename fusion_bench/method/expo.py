r"""ExPO: $\theta = \theta_1 + \alpha\,(\theta_1 - \theta_0)$, beyond the aligned model.

Zheng et al., Model extrapolation expedites alignment, https://arxiv.org/abs/2404.16792
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


@dataclass(eq=False)
class ExPOAlgorithm(TensorwiseAlgorithm):
    """Extrapolation from the pretrained model beyond the aligned model.

    Args:
        extrapolation_factor: how far beyond, in lengths of the way so far; 0 gives the aligned
            model, -1 the pretrained one.
    """

    needs_pretrained = True
    elementwise = True
    shows_nonfinite = True

    extrapolation_factor: float = 0.1

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the extrapolated tensor; several aligned models are averaged first."""
        assert base is not None
        aligned = sum(tensors[1:], tensors[0].clone()) / len(tensors)
        return aligned + (aligned - base) * self.extrapolation_factor
