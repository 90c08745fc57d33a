r"""ExPO: $\theta = \theta_1 + \alpha\,(\theta_1 - \theta_0)$, beyond the aligned model.

Zheng et al., Model extrapolation expedites alignment, https://arxiv.org/abs/2404.16792
"""

from collections.abc import Sequence

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


class ExPOAlgorithm(TensorwiseAlgorithm):
    """A step from the pretrained model through the aligned one and beyond it.

    Args:
        extrapolation_factor: how far beyond, in lengths of the way so far; 0 gives the aligned
            model, -1 the pretrained one.
        show_pbar: show a progress bar.
        inplace: write to the pretrained module, of modules given as a dict.
    """

    needs_pretrained = True
    elementwise = True
    shows_nonfinite = True

    def __init__(
        self, extrapolation_factor: float = 0.1, show_pbar: bool = True, inplace: bool = False
    ):
        self.extrapolation_factor = extrapolation_factor
        self.show_pbar = show_pbar
        self.inplace = inplace

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the extrapolated tensor; several aligned models are averaged first."""
        assert base is not None
        aligned = sum(tensors[1:], tensors[0].clone()) / len(tensors)
        return aligned + (aligned - base) * self.extrapolation_factor
