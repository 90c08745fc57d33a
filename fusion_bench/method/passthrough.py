"""One model as it is: to convert its type, to scale it, and for layers of a stack.

Its values are copied bit by bit, unless they are scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs


@dataclass(eq=False)
class PassthroughAlgorithm(TensorwiseAlgorithm):
    """One model, unchanged or scaled.

    Args:
        scale: what each element is multiplied with.

    Raises:
        FusionBenchError: a pool of several models; the pretrained model is not counted.
    """

    elementwise = True
    shows_nonfinite = True

    scale: float = 1.0

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except one."""
        if len(inputs.names) != 1:
            raise FusionBenchError(
                f"Passthrough takes one model, and here are {len(inputs.names)}: "
                f"{', '.join(inputs.names)}.",
                "Name one, or choose a method that merges them.",
            )

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the model's tensor, scaled."""
        return tensors[0] * self.scale
