r"""Task arithmetic: $\theta = \theta_0 + \lambda \sum_t (\theta_t - \theta_0)$.

Ilharco et al., Editing models with task arithmetic, https://arxiv.org/abs/2212.04089
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


@dataclass(eq=False)
class TaskArithmeticAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus the scaled sum of all task vectors.

    Args:
        scaling_factor: of the sum; usually tuned on validation data. A negative value makes the
            model forget the tasks.
    """

    needs_pretrained = True
    elementwise = True
    shows_nonfinite = True

    scaling_factor: float = 0.3

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus ``scaling_factor`` times the sum of the differences to it."""
        assert base is not None
        task_vectors = tensors[0] - base
        for tensor in tensors[1:]:
            task_vectors += tensor - base
        return task_vectors.mul_(self.scaling_factor).add_(base)
