r"""Localize-and-Stitch: $\theta = \theta_0 + \sum_t \gamma'_t \odot \tau_t$, without data.

The mask $\gamma_t$ has the largest elements of $\tau_t$ in the whole model; where several have an
element, they share it: $\gamma'_t = \gamma_t / \max(1, \sum_u \gamma_u)$.
He et al., Localize-and-Stitch, https://arxiv.org/abs/2408.13656
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.largest import largest, search_bytes
from fusion_bench.weights.ops import task_vectors


@dataclass(eq=False)
class LocalizeAndStitch(TensorwiseAlgorithm):
    """The pretrained model plus the largest changes, averaged where they overlap.

    Args:
        density: the share of each task vector of the whole model that is kept. Unchanged elements
            are never kept. One for all, one for each model by name, or a list in the pool's order.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    density: PerModel = 0.1

    def __post_init__(self) -> None:
        check_each_between("density", self.density, 0, 1)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        return search_bytes(inputs.count(), len(inputs.names))

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the cutoff of each task vector."""
        size, densities = inputs.count(), of_each(self.density, inputs.names)
        counts = [int(size * Fraction(str(density))) for density in densities]
        cutoffs = largest(inputs, task_vectors, counts)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            total, sharing = torch.zeros_like(base), torch.zeros_like(base)
            vectors = task_vectors(key, start, tensors, base)
            for cutoff, vector in zip(cutoffs, vectors, strict=True):
                kept = cutoff.keep(key, start, vector)
                total += kept
                sharing += kept.sign_().abs_()
            return total.div_(sharing.clamp_(min=1)).add_(base)

        return merge
