r"""Isotropic merging: a sum of task vectors with equal singular values.

Iso-C: $\tau = \bar\sigma\, U V^\top$ where $U \Sigma V^\top = \sum_t \tau_t$, matrix by matrix.
Iso-CTS gives the smallest of those directions up for some that each task has of its own.
Marczak et al., No task left behind, https://arxiv.org/abs/2502.04959
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between
from fusion_bench.weights.matrices import is_matrix, orthogonal_product, svd, wide
from fusion_bench.weights.ops import add_scaled, task_vectors


@dataclass(eq=False)
class ISO_C_Merge(TensorwiseAlgorithm):  # noqa: N801
    """The pretrained model plus the sum of the task vectors with equal singular values.

    Entries that are not matrices get the mean task vector.

    Args:
        scaling_factor: scaling factor of the change.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
        rank_tol: leave out directions whose singular value is at most this share of the largest.
            With 0 all count the same, even those in which nothing changed.
    """

    needs_pretrained = True
    heavy = True

    scaling_factor: float = 1.0
    exclude_keys: Sequence[str] | None = None
    rank_tol: float = 0.0

    def __post_init__(self) -> None:
        check_between("rank_tol", self.rank_tol, 0, 1)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the scaled sum with equal singular values, or the mean."""
        assert base is not None
        if not is_matrix(key, base.shape, self.exclude_keys or ()):
            return _with_mean(key, tensors, base, self.scaling_factor)
        return _with(_flattened(_sum(key, tensors, base), self.rank_tol), base, self.scaling_factor)


@dataclass(eq=False)
class ISO_CTS_Merge(TensorwiseAlgorithm):  # noqa: N801
    """Iso-C with some task-specific directions outside the common ones.

    Entries that are not matrices get the mean task vector.

    Args:
        scaling_factor: scaling factor of the change.
        common_space_fraction: the share of directions that come from the sum; with 1 it is Iso-C.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
    """

    needs_pretrained = True
    heavy = True

    scaling_factor: float = 1.0
    common_space_fraction: float = 0.8
    exclude_keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_between("common_space_fraction", self.common_space_fraction, 0, 1)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the scaled common and own directions, or the mean."""
        assert base is not None
        if not is_matrix(key, base.shape, self.exclude_keys or ()):
            return _with_mean(key, tensors, base, self.scaling_factor)
        return _with(self._flat(key, tensors, base), base, self.scaling_factor)

    def _flat(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return a merged task vector with equal singular values."""
        rank = min(base.shape)
        total = _sum(key, tensors, base)
        own = self._own(rank, len(tensors))
        if own == 0:
            return _flattened(total, 0)
        common = svd(total, rank - own * len(tensors))
        parts = [common]
        for vector in task_vectors(key, 0, tensors, base):
            scale = float(vector.norm()) / math.sqrt(rank)
            rest = wide(vector)
            rest -= common[0] @ (common[0].T @ rest)
            parts.append(svd(rest, own, scale=scale))  # there may be nothing but rounding left
        u, s, vh = zip(*parts, strict=True)
        return orthogonal_product(torch.cat(u, 1), torch.cat(s).sum() / rank, torch.cat(vh))

    def _own(self, rank: int, models: int) -> int:
        """Return how many directions each task has of its own."""
        common = math.floor(rank * Fraction(str(self.common_space_fraction)))
        return min(round(Fraction(rank - common, models)), rank // models)


def _with(task_vector: Tensor, base: Tensor, factor: float) -> Tensor:
    """Return ``base`` plus a scaled task vector, which is used up."""
    return task_vector.to(base).mul_(factor).add_(base)


def _with_mean(key: str, tensors: Sequence[Tensor], base: Tensor, factor: float) -> Tensor:
    """Return ``base`` plus the scaled mean task vector."""
    return add_scaled(base, task_vectors(key, 0, tensors, base), factor / len(tensors))


def _sum(key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    return add_scaled(torch.zeros_like(base), task_vectors(key, 0, tensors, base), 1)


def _flattened(matrix: Tensor, rank_tol: float) -> Tensor:
    """Return the matrix with each singular value replaced by their mean."""
    u, s, vh = svd(matrix, tol=rank_tol)
    return (u * (s.sum() / max(len(s), 1))) @ vh
