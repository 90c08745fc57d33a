r"""Isotropic merging: a sum of task vectors with equal singular values.

Iso-C: $\tau = \bar\sigma\, U V^\top$ where $U \Sigma V^\top = \sum_t \tau_t$, matrix by matrix.
Iso-CTS gives the smallest of those directions up for some that each task has of its own.
Marczak et al., No task left behind, https://arxiv.org/abs/2502.04959
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.entries import (
    Measure,
    cut_of_matrices,
    folded,
    right_factors,
    right_product,
)
from fusion_bench.weights.matrices import (
    NEGLIGIBLE,
    flattened,
    is_matrix,
    orthogonal_product,
    side_by_side,
    svd,
    wide,
)
from fusion_bench.weights.ops import add_scaled, task_vectors
from fusion_bench.weights.statistics import Piece


@dataclass(eq=False)
class ISO_C_Merge(TensorwiseAlgorithm):  # noqa: N801
    """The pretrained model plus the sum of the task vectors with equal singular values.

    Entries that are not matrices get the mean task vector.

    Args:
        scaling_factor: scaling factor of the change.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
        rank_tol: leave out directions whose singular value is at most this share of the largest.
            With 0 all count the same, even those in which nothing changed, except in large tall
            matrices such as embeddings.
    """

    needs_pretrained = True
    heavy = True

    scaling_factor: float = 1.0
    exclude_keys: Sequence[str] | None = None
    rank_tol: float = 0.0

    def __post_init__(self) -> None:
        check_between("rank_tol", self.rank_tol, 0, 1)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that of large tall matrices, such as embeddings, only rows stay whole."""
        return cut_of_matrices(key, shape, self.exclude_keys or ())

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return what merges; of large tall matrices find what the sum is multiplied by."""
        factors = inputs.each(partial(_flattening, self.rank_tol))

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            if self.cut(key, inputs.spec(key).shape) != "rows":
                return self.merge_tensor(key, tensors, base)
            assert base is not None
            flat = wide(_sum(key, tensors, base)) @ factors(key)
            return _with(flat, base, self.scaling_factor)

        return merge

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the scaled sum with equal singular values, or the mean."""
        assert base is not None
        if not is_matrix(key, base.shape, self.exclude_keys or ()):
            return _with_mean(key, tensors, base, self.scaling_factor)
        return _with(flattened(_sum(key, tensors, base), self.rank_tol), base, self.scaling_factor)


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

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that of large tall matrices, such as embeddings, only rows stay whole."""
        return cut_of_matrices(key, shape, self.exclude_keys or ())

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return what merges; of large tall matrices find what the rows are multiplied by."""
        factors = inputs.each(self._tall)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            if self.cut(key, inputs.spec(key).shape) != "rows":
                return self.merge_tensor(key, tensors, base)
            assert base is not None
            left, right = factors(key)
            return _with(left(key, start, tensors, base) @ right, base, self.scaling_factor)

        return merge

    def _tall(self, entry: Inputs) -> tuple[Measure, Tensor]:
        """Return what gives rows of the directions' left sides, and what these are multiplied by.

        A direction's left side is the task vector, or what is left of it, times its right side.
        """
        (key,) = entry
        rank, models = entry.spec(key).shape[1], range(len(entry.names))
        own = self._own(rank, len(models))
        if own == 0:
            flattening = _flattening(0, entry)
            return lambda *piece: wide(_summed(*piece)), flattening
        values, common = right_factors(entry, _summed, rank - own * len(models))
        taken: list[Tensor] = []
        inner, s, right = [common / values], [values], [common]

        def rest(model: int, *piece: *Piece) -> Tensor:
            return wide(_change(model, *piece)) - wide(_summed(*piece)) @ taken[model]

        for model in models:
            both = folded(entry, partial(_crossed, model))
            taken.append(inner[0] @ (inner[0].mT @ both))
            norm = folded(entry, partial(_squared, model)).sqrt()
            found = right_factors(
                entry, partial(rest, model), own, scale=float(norm) / math.sqrt(rank)
            )
            inner.append(found[1] / found[0])
            s.append(found[0])
            right.append(found[1])

        def left(*piece: *Piece) -> Tensor:
            parts = [wide(_summed(*piece)), *(rest(model, *piece) for model in models)]
            return torch.cat([part @ side for part, side in zip(parts, inner, strict=True)], 1)

        mean = torch.cat(s).sum() / rank
        return left, right_product(entry, left, mean, torch.cat(right, 1).mT)

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
            return flattened(total, 0)
        u, s, vh = side_by_side(self._parts(key, tensors, base, total, own), base.shape, rank)
        return orthogonal_product(u, s.sum() / rank, vh)

    def _parts(
        self, key: str, tensors: Sequence[Tensor], base: Tensor, total: Tensor, own: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the common directions, and each model's own outside of them."""
        rank = min(base.shape)
        u, s, vh = svd(total, rank - own * len(tensors))
        yield u, s, vh
        rows, columns = base.shape
        # Of a matrix that is not tall, what is outside has few rows in directions of its own.
        outside = torch.linalg.qr(u, mode="complete").Q[:, len(s) :] if rows <= columns else None
        for vector in task_vectors(key, 0, tensors, base):
            # There may be nothing but rounding left.
            scale = float(vector.norm()) / math.sqrt(rank)
            if outside is not None:
                own_u, own_s, own_vh = svd(outside.T @ wide(vector), own, scale=scale)
                yield outside @ own_u, own_s, own_vh
                continue
            rest = wide(vector)
            rest.addmm_(u, u.T @ rest, alpha=-1)
            yield svd(rest, own, scale=scale)

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


def _flattening(rank_tol: float, entry: Inputs) -> Tensor:
    """Return what replaces the singular values by their mean, times a sum that is cut into rows.

    Directions of the value 0 are arbitrary, and are left out even where ``rank_tol`` is 0.
    """
    (key,) = entry
    s, v = right_factors(entry, _summed, tol=max(rank_tol, NEGLIGIBLE))
    count = len(s) if rank_tol else entry.spec(key).shape[1]
    return (v / s) @ v.mT * (s.sum() / max(count, 1))


def _summed(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    assert base is not None
    return _sum(key, tensors, base)


def _change(
    model: int, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Tensor:
    assert base is not None
    return tensors[model] - base


def _crossed(model: int, *piece: *Piece) -> Tensor:
    return wide(_summed(*piece)).mT @ wide(_change(model, *piece))


def _squared(model: int, *piece: *Piece) -> Tensor:
    return wide(_change(model, *piece)).square().sum()
