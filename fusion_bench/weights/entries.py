"""Statistics of single entries, from a first pass over their pieces: for ``Inputs.each``.

A matrix with far more rows than columns, such as an embedding, is factorised without being held:
what that takes of it are matrices of columns by columns, which are summed over blocks of rows.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fusion_bench.weights.inputs import Cut, Inputs
from fusion_bench.weights.matrices import (
    NEGLIGIBLE,
    RESOLVED,
    count_kept,
    gram,
    inverse_root,
    is_matrix,
    spectrum,
    wide,
)
from fusion_bench.weights.scratch import on_disk
from fusion_bench.weights.statistics import Piece, Values, sums, total
from fusion_bench.weights.stream import PIECE

#: Something of a piece.
Measure = Callable[[*Piece], Tensor]
#: Elements from which on a matrix is cut into blocks of rows, and how many times more rows than
#: columns it has.
LARGE, TALL = 2**24, 2


def cut_of_matrices(key: str, shape: Sequence[int], exclude_keys: Iterable[str] = ()) -> Cut:
    """Return how an entry may be cut where matrices are factorised: large tall ones into rows."""
    if not is_matrix(key, shape, exclude_keys):
        return "elements"
    rows, columns = shape
    return "rows" if rows * columns >= LARGE and rows >= TALL * columns else "whole"


def folded(
    entry: Inputs,
    measure: Measure,
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
    initial: Tensor | None = None,
) -> Tensor:
    """Combine what is measured of an entry's pieces, in their order, whoever comes first.

    ``initial`` comes before the first.
    """
    (key,) = entry
    order = iter([start for start, _ in entry.pieces(key, PIECE)])
    upcoming: int | None = next(order)
    waiting: dict[int, Tensor] = {}
    results: list[Tensor] = [] if initial is None else [initial]
    lock = threading.Lock()

    def look(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        nonlocal upcoming
        measured = measure(key, start, tensors, base)
        with lock:
            waiting[start] = measured
            while upcoming is not None and upcoming in waiting:
                found = waiting.pop(upcoming)
                results[:] = [combine(results[0], found) if results else found]
                upcoming = next(order, None)

    entry.survey(look)
    return results[0]


class Kept:
    """What is measured of each piece, put aside on a disk from the first time on.

    Args:
        inputs: the models.
        measure: gives a tensor of the shape of a piece.
    """

    def __init__(self, inputs: Inputs, measure: Measure):
        sizes = {key: inputs.merged(key) for key in inputs if inputs.tied_to(key) == key}
        self._places = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        dtype = torch.float64 if inputs.is_double else torch.float32
        self._values = on_disk((sum(sizes.values()),), dtype)
        self._known: set[tuple[str, int, int]] = set()
        self._measure = measure

    def __call__(
        self, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return it; the caller must not write to it."""
        numel = tensors[0].numel()
        first = self._places[key] + start
        own = self._values[first : first + numel]
        if (key, start, numel) in self._known:
            return own.view(tensors[0].shape).to(tensors[0])
        found = self._measure(key, start, tensors, base)
        own.copy_(found.view(-1))
        self._known.add((key, start, numel))
        return found


def column_products(entry: Inputs, vectors: Values) -> Tensor:
    """Return the inner products of all pairs of quantities along the first dimension, in float64.

    Args:
        entry: inputs with a single entry that is cut into rows; a 1-d one is a column.
        vectors: the quantities.

    Returns:
        The products, shape (quantities, quantities, ...): the entry's without the first dimension.
    """

    def measure(*piece: *Piece) -> Tensor:
        own = torch.stack([vector.double() for vector in vectors(*piece)])
        own = own if own.ndim > 1 else own[:, None]
        return torch.einsum("ir...,jr...->ij...", own, own)

    return folded(entry, measure)


def right_factors(
    entry: Inputs,
    rows: Measure,
    count: int | None = None,
    tol: float = NEGLIGIBLE,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return singular values and right singular vectors, as columns, of a matrix cut into rows.

    The left ones are the rows times these, divided by the values. Where a Gram matrix does not
    resolve the smallest, QR factorisations of the blocks do. Arguments are those of ``svd``.
    """
    s, v = spectrum(folded(entry, lambda *piece: gram(rows(*piece).mT)))
    number = min(count_kept(s, tol, scale), len(s) if count is None else count)
    if number and s[number - 1] <= RESOLVED * s[0]:
        triangle = folded(entry, lambda *piece: wide(rows(*piece)), _upper_triangle)
        _, s, vh = torch.linalg.svd(triangle, full_matrices=False)
        v = vh.mT
        number = min(count_kept(s, tol, scale), len(s) if count is None else count)
    return s[:number], v[:, :number]


def right_product(entry: Inputs, left: Measure, s: Tensor, right: Tensor) -> Tensor:
    """Return what rows of ``L`` are multiplied by to get those of ``orthogonal_product``.

    Args:
        entry: a matrix cut into rows.
        left: gives rows of ``L``, in float64.
        s: as there.
        right: ``R``.
    """
    between = inverse_root(folded(entry, lambda *piece: gram(left(*piece).mT)))
    return torch.linalg.multi_dot([between * s, inverse_root(gram(right)), right])


def _upper_triangle(above: Tensor, below: Tensor) -> Tensor:
    return torch.linalg.qr(torch.cat([above, below]), mode="r").R


def restoring_l1(inputs: Inputs, sparse: Values, whole: Values) -> Values:
    """Return the function that gives what ``sparse`` does, with the L1 norms that ``whole`` has.

    Norms are of a whole entry; one that is 0 stays 0.
    """

    def magnitudes(*piece: *Piece) -> Iterator[Tensor]:
        for left, full in zip(sparse(*piece), whole(*piece), strict=True):
            yield left.abs()
            yield full.abs()

    def factors(entry: Inputs) -> list[float]:
        norms = total(sums(entry, magnitudes))
        pairs = zip(norms[::2], norms[1::2], strict=True)
        return [full / left if left else 1.0 for left, full in pairs]

    found = inputs.each(factors)

    def restored(*piece: *Piece) -> Iterator[Tensor]:
        for left, factor in zip(sparse(*piece), found(piece[0]), strict=True):
            yield left * factor

    return restored
