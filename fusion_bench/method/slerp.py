r"""SLERP: interpolation of two models along a great circle, tensor by tensor.

With $\Omega$ the angle between the tensors taken as vectors,
$\theta = (\sin((1-t)\Omega)\,\theta_a + \sin(t\Omega)\,\theta_b) / \sin\Omega$.

Shoemake, Animating rotation with quaternion curves, https://doi.org/10.1145/325165.325242
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import arc, between, refuse_all_but_two, two_ends
from fusion_bench.problems import ConfigError
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.statistics import Piece, cosines_and_norms, products


@dataclass(eq=False)
class SlerpMergeAlgorithm(TensorwiseAlgorithm):
    """A point on the arc between two models; the pretrained model, if any, is the start.

    Args:
        t: how far to go: 0 is the start, and 1 the end. Beyond, the arc goes on.
        DOT_THRESHOLD: if the absolute cosine exceeds it, tensors are interpolated linearly.
        epsilon: a tensor whose norm is at most this has no direction.
    """

    elementwise = True

    t: float = 0.5
    DOT_THRESHOLD: float = 0.9995  # the name that existing configs use
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if isinstance(self.t, bool) or not isinstance(self.t, int | float) or not isfinite(self.t):
            raise ConfigError(f"{self.t!r} is not a number.", place=("t",))

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except two."""
        refuse_all_but_two(inputs, "SLERP")

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the angle of each entry, and return the function that goes along the arc."""

        def ends(*piece: *Piece) -> Sequence[Tensor]:
            return two_ends(*piece[2:])

        def shares(entry: Inputs) -> tuple[float, float]:
            (found,) = products(entry, ends).values()
            cosines, norms = cosines_and_norms(found)
            cos = float(cosines[0, 1]) if norms.amin() > self.epsilon else 0.0
            return (1 - self.t, self.t) if abs(cos) > self.DOT_THRESHOLD else arc(self.t, cos)

        found = inputs.each(shares)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            return between(*two_ends(tensors, base), found(key))

        return merge
