r"""NuSLERP: along great circles from one task vector to the next, by the models' weights.

With $\Omega$ the angle between two vectors and $t = w_2 / (w_1 + w_2)$,
$(\sin((1-t)\Omega)\,\tau_1 + \sin(t\Omega)\,\tau_2) / \sin\Omega$. A third model follows from there
with $t = w_3 / (w_1 + w_2 + w_3)$, and so on.

Goddard, NuSLERP, 2024, as published with mergekit; with more than two models it is the merging step
of WARP: Ramé et al., https://arxiv.org/abs/2406.16768
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import along_arcs
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, MergePiece


@dataclass(eq=False)
class NuSlerpAlgorithm(TensorwiseAlgorithm):
    """A weighted mean along arcs: of the task vectors, or without a pretrained model of the models.

    Args:
        weights: one for each model by name, or a list in the pool's order; equal where not given.
            Only their ratios matter.
        axis: what counts as a vector: ``None`` for the whole tensor; -1 for each row, along the
            last dimension; 0 for each column, along the first.
    """

    weights: PerModel | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis not in (None, 0, -1):
            raise FusionBenchError(f"{self.axis!r} is not null, 0 or -1.", place=("axis",))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that interpolates."""
        weights = of_each(self.weights, inputs.names)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            vectors = (t.double() if base is None else (t - base).double() for t in tensors)
            point, total = next(vectors), weights[0]
            for vector, weight in zip(vectors, weights[1:], strict=True):
                total += weight
                t = weight / total if abs(total) >= 1e-6 else 0.5
                point = along_arcs(point, vector, t, self.axis if vector.ndim else None)
            merged = point.to(tensors[0].dtype)
            return merged if base is None else merged + base

        return merge
