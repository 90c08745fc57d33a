r"""Simple average: $\theta = \frac{1}{T} \sum_t \theta_t$.

Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Sequence

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


class SimpleAverageAlgorithm(TensorwiseAlgorithm):
    """The mean of all models, without the pretrained model."""

    elementwise = True
    shows_nonfinite = True

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the mean of ``tensors``."""
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        return total.div_(len(tensors))
