r"""Isotropic merging: a sum of task vectors with equal singular values.

Iso-C: $\tau = \bar\sigma\, U V^\top$ where $U \Sigma V^\top = \sum_t \tau_t$, matrix by matrix.
Iso-CTS gives the smallest of those directions up for some that each task has of its own.
Marczak et al., No task left behind, https://arxiv.org/abs/2502.04959
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between
from fusion_bench.weights.matrices import is_matrix, orthogonal_product, svd, wide
from fusion_bench.weights.ops import add_scaled, task_vectors


class _Isotropic(TensorwiseAlgorithm):
    """Merges matrices by ``_flat``; other entries get the mean task vector."""

    needs_pretrained = True
    heavy = True

    def __init__(self, scaling_factor: float, exclude_keys: Sequence[str] | None):
        self.scaling_factor = scaling_factor
        self.exclude_keys = list(exclude_keys or ())

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the scaled merged task vector."""
        assert base is not None
        if is_matrix(key, base.shape, self.exclude_keys):
            return self._flat(key, tensors, base).to(base).mul_(self.scaling_factor).add_(base)
        vectors = task_vectors(key, 0, tensors, base)
        return add_scaled(base, vectors, self.scaling_factor / len(tensors))

    def _flat(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return a merged task vector with equal singular values."""
        raise NotImplementedError


class ISO_C_Merge(_Isotropic):  # noqa: N801
    """The pretrained model plus the sum of the task vectors with equal singular values.

    Entries that are not matrices get the mean task vector.

    Args:
        scaling_factor: scaling factor of the change.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
        rank_tol: leave out directions whose singular value is at most this share of the largest.
            With 0 all count the same, even those in which nothing changed.
    """

    def __init__(
        self,
        scaling_factor: float = 1.0,
        exclude_keys: Sequence[str] | None = None,
        rank_tol: float = 0.0,
    ):
        check_between("rank_tol", rank_tol, 0, 1)
        super().__init__(scaling_factor, exclude_keys)
        self.rank_tol = rank_tol

    def _flat(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
        return _flattened(_sum(key, tensors, base), self.rank_tol)


class ISO_CTS_Merge(_Isotropic):  # noqa: N801
    """Iso-C with some task-specific directions outside the common ones.

    Entries that are not matrices get the mean task vector.

    Args:
        scaling_factor: scaling factor of the change.
        common_space_fraction: the share of directions that come from the sum; with 1 it is Iso-C.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
    """

    def __init__(
        self,
        scaling_factor: float = 1.0,
        common_space_fraction: float = 0.8,
        exclude_keys: Sequence[str] | None = None,
    ):
        check_between("common_space_fraction", common_space_fraction, 0, 1)
        super().__init__(scaling_factor, exclude_keys)
        self.common_space_fraction = common_space_fraction

    def _flat(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
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


def _sum(key: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    return add_scaled(torch.zeros_like(base), task_vectors(key, 0, tensors, base), 1)


def _flattened(matrix: Tensor, rank_tol: float) -> Tensor:
    """Return the matrix with each singular value replaced by their mean."""
    u, s, vh = svd(matrix, tol=rank_tol)
    return (u * (s.sum() / max(len(s), 1))) @ vh
