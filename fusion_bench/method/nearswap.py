r"""NearSwap: take over the other model where it is near the pretrained one.

$\theta = \theta_0 + \operatorname{clip}(t / |\tau|, 0, 1)\,\tau$ at each element: a change of at
most $t$ is taken whole, and of a larger one $t$.

Published with mergekit, as by alchemonaut, 2024.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import refuse_all_but_two
from fusion_bench.problems import check_between
from fusion_bench.weights import Inputs

#: Smaller changes count as one of this size.
_LEAST = 1e-6


@dataclass(eq=False)
class NearSwapAlgorithm(TensorwiseAlgorithm):
    """The pretrained model with at most ``t`` of another model's change at each element.

    Args:
        t: the largest change of an element, at least 0.
    """

    needs_pretrained = True
    elementwise = True
    shows_nonfinite = True

    t: float = 0.001

    def __post_init__(self) -> None:
        check_between("t", self.t, 0, math.inf)

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except two."""
        refuse_all_but_two(inputs, "NearSwap")

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the limited change."""
        assert base is not None
        change = tensors[0] - base
        share = change.abs().clamp_(min=_LEAST).reciprocal_().mul_(self.t).clamp_(max=1)
        return change.mul_(share).add_(base)
