"""Common steps of methods that factorise matrices.

A thin SVD comes from the eigenvectors of the smaller Gram matrix, in float64. For float32 input
that is faster than LAPACK's SVD in float32, and far more accurate. Squaring costs digits of small
singular values alone: where a Gram matrix does not resolve one that is asked for, LAPACK's SVD of
the matrix in float64 follows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fusion_bench.weights.inputs import matches
from fusion_bench.weights.lapack import eigenvectors

#: Singular values of a smaller share of the largest are what float32 leaves of 0.
NEGLIGIBLE = 1e-6
#: Down to this share of the largest singular value a Gram matrix gives vectors to 1e-6.
RESOLVED = 1e-5
#: Elements of a vector that are converted to float64 at a time.
_AT_ONCE = 2**16
#: Columns that are converted to float64 at a time, and rows of a product that are computed at once.
_COLUMNS, _ROWS = 4096, 256


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


def gram(matrix: Tensor, before: Tensor | None = None) -> Tensor:
    """Return ``matrix @ matrix.T``, in float64, or add it to one that was made before."""
    rows = len(matrix)
    result = before
    if result is None:
        result = torch.zeros(rows, rows, dtype=torch.float64, device=_place(matrix))
    return mirrored(add_gram(result, matrix))


def add_gram(before: Tensor, matrix: Tensor) -> Tensor:
    """Add ``matrix @ matrix.T`` to the half of a Gram matrix on and below its diagonal."""
    for part in matrix.split(_COLUMNS, dim=1):
        part = wide(part)
        for start, stop in _halves(before):  # of a symmetric matrix half is enough
            before[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)
    return before


def mirrored(half: Tensor) -> Tensor:
    """Complete a symmetric matrix of which one half is known, in place."""
    for start, stop in _halves(half):
        half[:start, start:stop] = half[start:stop, :start].T
    return half


def _halves(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first and last rows of blocks; their columns up to the last row are computed."""
    for start in range(0, len(matrix), _ROWS):
        yield start, start + _ROWS


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
    found = _left(matrix, count, tol, scale)
    if found is None:
        v, s, uh = torch.linalg.svd(wide(matrix).T, full_matrices=False)  # LAPACK prefers it tall
        kept = count_kept(s[:count], tol, scale)
        return uh[:kept].T, s[:kept], v[:, :kept].T
    u, s = found
    return u, s, _times((u / s).T, matrix)


def side_by_side(
    found: Iterable[tuple[Tensor, Tensor, Tensor]], shape: Sequence[int], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the left vectors, values and right vectors of several SVDs, each as one matrix.

    Args:
        found: taken one after the other, so that no two are in memory.
        shape: of the matrices.
        count: how many singular values there are at most in all; for those that some lack there
            are zeros.
    """
    rows, columns = shape
    shapes, end = [(rows, count), (count,), (count, columns)], 0
    whole: list[Tensor] = []
    for left, values, right in found:
        whole = whole or [left.new_zeros(own) for own in shapes]
        start, end = end, end + len(values)
        whole[0][:, start:end], whole[1][start:end], whole[2][start:end] = left, values, right
    u, s, vh = whole
    return u, s, vh


def flattened(matrix: Tensor, tol: float) -> Tensor:
    """Return the matrix with each singular value replaced by their mean, in float64.

    Args:
        matrix: any matrix.
        tol: take those that are at most this share of the largest as 0, and leave them out.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return flattened(matrix.T, tol).T
    found = _left(matrix, None, tol, None)
    if found is None:
        u, s, vh = svd(matrix, tol=tol)
        return u * s.mean() @ vh
    u, s = found
    return _times((u / s) @ u.T * (s.sum() / max(len(s), 1)), matrix)


def _left(
    matrix: Tensor, count: int | None, tol: float, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """Return left singular vectors and values; ``None`` where the Gram matrix resolves not all."""
    s, u = spectrum(gram(matrix), count)
    kept = count_kept(s, tol, scale)
    if kept and s[kept - 1] <= RESOLVED * s[0]:
        return None
    return u[:, :kept], s[:kept]


def _times(left: Tensor, matrix: Tensor) -> Tensor:
    """Return ``left @ matrix``, in float64; no copy of the whole matrix is made."""
    result = left.new_empty(len(left), matrix.shape[1])
    for to, part in zip(result.split(_COLUMNS, dim=1), matrix.split(_COLUMNS, dim=1), strict=True):
        torch.mm(left, wide(part), out=to)
    return result


def right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values and, as columns, right singular vectors of a tall matrix.

    Both are those of ``svd``, for less memory.
    """
    found = _left(matrix.mT, None, NEGLIGIBLE, None)
    if found is None:
        _, s, vh = svd(matrix)
        return s, vh.mT
    return found[1], found[0]


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
    total = None
    for matrix in matrices:
        total = gram(matrix, total)
    s, u = spectrum(torch.zeros(0, 0, dtype=torch.float64) if total is None else total)
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


def spectrum(
    gram: Tensor, count: int | None = None, room: Callable[[int, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return singular values, the largest first, and left singular vectors.

    Args:
        gram: the Gram matrix, which is used up.
        count: return no more than so many.
        room: makes the tensor that the vectors lie in.
    """
    if not math.isfinite(gram.trace()):
        return gram.new_zeros(0), gram.new_zeros(len(gram), 0)
    values, vectors = eigenvectors(gram, count, room)
    return values.clamp_(min=0).sqrt_(), vectors


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
