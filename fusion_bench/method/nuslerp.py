r"""NuSLERP: along great circles from one task vector to the next, by the models' weights.

With $\Omega$ the angle between two vectors and $t = w_2 / (w_1 + w_2)$,
$(\sin((1-t)\Omega)\,\tau_1 + \sin(t\Omega)\,\tau_2) / \sin\Omega$. A third model follows from there
with $t = w_3 / (w_1 + w_2 + w_3)$, and so on.

Goddard, NuSLERP, 2024, as published with mergekit; with more than two models it is the merging step
of WARP: Ramé et al., https://arxiv.org/abs/2406.16768
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import along_arcs, themselves
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.entries import column_products
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import products


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

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that the rows of tensors stay whole where these or columns are vectors."""
        return "elements" if self.axis is None else "rows"

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the models' shares in each entry, column or row."""
        vectors = themselves if inputs.aligned.base is None else task_vectors
        weights = of_each(self.weights, inputs.names)

        def find(entry: Inputs) -> Tensor:
            if self.axis == 0:
                return along_arcs(column_products(entry, vectors), weights)
            (found,) = products(entry, vectors).values()
            return along_arcs(found, weights)

        shares = inputs.each(find)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            own = torch.stack([v.double() for v in vectors(key, start, tensors, base)])
            if self.axis == -1 and own.ndim > 1:
                rows = torch.einsum("i...n,j...n->ij...", own, own)
                found = along_arcs(rows, weights).unsqueeze(-1)
            else:
                found = shares(key)
            merged = torch.einsum("i...,i...->...", own, found.to(own)).to(tensors[0].dtype)
            return merged if base is None else merged + base

        return merge
