"""Common steps of methods that factorise matrices.

A thin SVD comes from the eigenvectors of the smaller Gram matrix, in float64. For float32 input
that is as fast as LAPACK's SVD, for long matrices faster, and far more accurate.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusion_bench.weights.inputs import matches

#: Singular values of a smaller share of the largest are what float32 leaves of 0.
NEGLIGIBLE = 1e-6
#: Down to this share of the largest singular value a Gram matrix gives vectors to 1e-6.
RESOLVED = 1e-5
#: Elements of a vector that are converted to float64 at a time.
_AT_ONCE = 2**16
#: Columns that are converted to float64 at a time.
_COLUMNS = 4096


def is_matrix(key: str, shape: Sequence[int], exclude_keys: Iterable[str] = ()) -> bool:
    """Return whether an entry is a matrix to factorise: one of two dimensions, and not excluded."""
    return len(shape) == 2 and min(shape) > 0 and not matches(key, exclude_keys)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the inner products of all pairs of tensors taken as vectors, in float64."""
    flat = [vector.reshape(-1) for vector in vectors]
    count, place = len(flat), _place(flat[0])
    result = torch.zeros(count, count, dtype=torch.float64, device=place)
    rows = torch.empty(count, min(len(flat[0]), _AT_ONCE), dtype=torch.float64, device=place)
    for parts in zip(*(vector.split(_AT_ONCE) for vector in flat), strict=True):
        own = rows[:, : len(parts[0])]
        for row, part in zip(own, parts, strict=True):
            row.copy_(part)
        result.addmm_(own, own.T)
    return result


def gram(matrix: Tensor) -> Tensor:
    """Return ``matrix @ matrix.T``, in float64."""
    rows = len(matrix)
    result = torch.zeros(rows, rows, dtype=torch.float64, device=_place(matrix))
    for part in matrix.split(_COLUMNS, dim=1):
        part = wide(part)
        result.addmm_(part, part.T)
    return result


def svd(
    matrix: Tensor, count: int | None = None, tol: float = NEGLIGIBLE, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD ``U, S, Vh``, in float64, the largest singular values first.

    Args:
        matrix: any matrix; with NaN or infinity, the SVD is empty.
        count: return no more than so many singular values.
        tol: leave out those that are at most this share of ``scale`` because their vectors are
            arbitrary. With 0 there are always ``min(m, n)``, or ``count``.
        scale: by default the largest singular value.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = svd(matrix.T, count, tol, scale)
        return vh.T, s, u.T
    s, u = spectrum(gram(matrix), count)
    kept = count_kept(s, tol, scale)
    if kept and s[kept - 1] <= RESOLVED * s[0]:
        v, s, uh = torch.linalg.svd(wide(matrix).T, full_matrices=False)  # LAPACK prefers it tall
        kept = count_kept(s[:count], tol, scale)
        return uh[:kept].T, s[:kept], v[:, :kept].T
    u, s = u[:, :kept], s[:kept]
    left, vh = (u / s).T, u.new_empty(kept, matrix.shape[1])
    for to, part in zip(vh.split(_COLUMNS, dim=1), matrix.split(_COLUMNS, dim=1), strict=True):
        torch.mm(left, wide(part), out=to)
    return u, s, vh


def right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values and, as columns, right singular vectors of a tall matrix.

    Both are those of ``svd``, for less memory.
    """
    s, v = spectrum(gram(matrix.mT))
    number = count_kept(s, NEGLIGIBLE)
    if number and s[number - 1] <= RESOLVED * s[0]:
        _, s, vh = svd(matrix)
        return s, vh.mT
    return s[:number], v[:, :number]


def column_space(matrices: Iterable[Tensor], shape: Sequence[int], tol: float) -> Tensor:
    """Return the left singular vectors of matrices side by side, in float64.

    Args:
        matrices: read once, one at a time where they have more columns than rows.
        shape: of all of them side by side.
        tol: leave out those whose singular value is at most this share of the largest.
    """
    rows, columns = shape
    if rows > columns:
        return svd(torch.cat(list(matrices), dim=1), tol=max(tol, NEGLIGIBLE))[0]
    total = torch.zeros(())
    for matrix in matrices:
        total = gram(matrix) + total
    s, u = spectrum(total)
    return u[:, : count_kept(s, tol)]


def inverse_root(gram: Tensor) -> Tensor:
    """Return the inverse square root of a Gram matrix, 0 where that is singular.

    Columns ``A`` times that of ``A.T @ A`` are the polar factor of ``A``, the nearest orthonormal
    columns. Where columns of ``A`` depend on each other, as those of equal models do, it is the
    one polar factor that is 0 where ``A`` is.
    """
    s, u = spectrum(gram)
    kept = count_kept(s, RESOLVED)
    u = u[:, :kept]
    return (u / s[:kept]) @ u.T


def orthogonal_product(left: Tensor, s: Tensor, right: Tensor) -> Tensor:
    """Return ``L @ diag(s) @ R``, in float64; ``L`` and ``R`` are the two sides' polar factors."""
    middle = (inverse_root(gram(left.T)) * s) @ inverse_root(gram(right))
    return torch.linalg.multi_dot([left, middle, right])


def spectrum(gram: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return singular values, the largest first, and left singular vectors, from ``gram``."""
    if not math.isfinite(gram.trace()):
        return gram.new_zeros(0), gram.new_zeros(len(gram), 0)
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_(min=0).sqrt_().flip(0)[:count], vectors.flip(1)[:, :count]


def count_kept(s: Tensor, tol: float, scale: float | None = None) -> int:
    """Return how many singular values are larger than a share of the largest, or of ``scale``."""
    if tol == 0 or not len(s):
        return len(s)
    return int((s > tol * (s[0] if scale is None else scale)).sum())


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64."""
    return tensor.to(_place(tensor), torch.float64)


def _place(tensor: Tensor) -> torch.device:
    """Return the device to compute on: Apple's GPUs have no float64."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
