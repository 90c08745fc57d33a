"""One model as it is: to convert its type, to scale it, and for layers of a stack.

Its values are copied bit by bit, unless they are scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, MergePiece, same_for_all


@dataclass(eq=False)
class PassthroughAlgorithm(TensorwiseAlgorithm):
    """One model, unchanged or scaled.

    Args:
        scale: what each element is multiplied with; also as a mapping of the model's name, so that
            rules compare patterns with the model's own names.

    Raises:
        FusionBenchError: a pool of several models; the pretrained model is not counted.
    """

    elementwise = True
    shows_nonfinite = True

    scale: PerModel = 1.0

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except one."""
        if len(inputs.names) != 1:
            raise FusionBenchError(
                f"Passthrough takes one model, and here are {len(inputs.names)}: "
                f"{', '.join(inputs.names)}.",
                "Name one, or choose a method that merges them.",
            )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that scales the model's tensor."""
        (scale,) = of_each(self.scale, inputs.names, "scale")

        def scaled(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            return tensors[0] * scale

        return same_for_all(scaled)
