r"""Linear interpolation: $\theta = (1 - t)\,\theta_a + t\,\theta_b$.

With the pretrained model as $\theta_a$ it is WiSE-FT: Wortsman et al., Robust fine-tuning of
zero-shot models, https://arxiv.org/abs/2109.01903
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import lerp, refuse_all_but_two, two_ends
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs


@dataclass(eq=False)
class LinearInterpolationAlgorithm(TensorwiseAlgorithm):
    """A point on the line between two models; the pretrained model, if any, is the start.

    Args:
        t: how far to go, from 0 to 1.
    """

    elementwise = True
    shows_nonfinite = True

    t: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise FusionBenchError(f"{self.t} is not between 0 and 1.", place=("t",))

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except two."""
        refuse_all_but_two(inputs, "Linear interpolation")

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the point between the two."""
        return lerp(*two_ends(tensors, base), self.t)
