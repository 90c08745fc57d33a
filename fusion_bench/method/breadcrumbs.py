r"""Model Breadcrumbs: $\theta = \theta_0 + \lambda \sum_t m_t \odot \tau_t$ without both tails.

The mask $m_t$ removes each tensor's largest changes, which are outliers, and its smallest, which
are noise.
Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between, check_choice
from fusion_bench.weights.ops import add_scaled, keep_largest, ranks, task_vectors

Scope = Literal["tensor", "row"]


@dataclass(eq=False)
class ModelBreadcrumbs(TensorwiseAlgorithm):
    """Task arithmetic with the elements of medium magnitude.

    Args:
        scaling_factor: scaling factor of the sum of the kept elements.
        density: the share of elements that is kept, at most all except the largest.
        gamma: the share of the largest elements, which are dropped.
        scope: shares of the whole ``tensor``, or of each ``row`` along its last dimension. Shares
            are rounded down. Entries with a single value are kept.
    """

    needs_pretrained = True

    scaling_factor: float = 0.3
    density: float = 0.1
    gamma: float = 0.01
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        check_between("density", self.density, 0, 1)
        check_between("gamma", self.gamma, 0, 1)
        check_choice("scope", self.scope, Scope)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the scaled sum of what is kept."""
        assert base is not None
        vectors = map(self._medium, task_vectors(key, 0, tensors, base))
        return add_scaled(base, vectors, self.scaling_factor)

    def _medium(self, vector: Tensor) -> Tensor:
        """Return a task vector without the largest and the smallest elements."""
        if not vector.ndim:
            return vector
        size = vector.shape[-1] if self.scope == "row" else vector.numel()
        top, kept = (int(size * Fraction(str(share))) for share in (self.gamma, self.density))
        if self.scope == "tensor":
            return keep_largest(vector, top + kept) - keep_largest(vector, top)
        place = size - 1 - ranks(vector)  # from the largest on
        return vector * ((place >= top) & (place < top + kept))
