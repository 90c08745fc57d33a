"""LAPACK's eigenvectors of symmetric matrices, for which other threads need not wait.

SciPy's own function holds Python's lock meanwhile; those of NumPy and torch know no part of the
eigenvectors, and take twice the memory.
"""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: If only one in so many eigenvectors is wanted, or fewer, it is faster to leave out the others.
_FEW = 4
#: What the arguments of ``dsyevr`` point to: characters, integers and doubles.
_ARGUMENTS = list("ccc" + "ididdiidi" + "ddiidiiii")
_POINTERS: dict[str, Any] = {
    "c": ctypes.c_char_p,
    "i": ctypes.POINTER(ctypes.c_int),
    "d": ctypes.POINTER(ctypes.c_double),
}


def eigenvectors(
    matrix: Tensor, count: int | None = None, room: Callable[[int, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, the largest first, and as columns their eigenvectors.

    Args:
        matrix: symmetric and finite, in float64; it is used up.
        count: return only so many.
        room: makes the tensor of so many rows and columns that the vectors lie in.
    """
    size = len(matrix)
    count = size if count is None else min(count, size)
    if not count:
        return matrix.new_empty(0), matrix.new_empty(size, 0)
    solve = _dsyevr() if matrix.is_cpu else None
    if solve is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:count], vectors.flip(1)[:, :count]
    few = _FEW * count <= size
    matrix = matrix.contiguous().neg_()  # the smallest come first
    values = matrix.new_empty(size)
    # For LAPACK the rows are columns.
    vectors = (room or matrix.new_empty)(count if few else size, size)
    support = torch.empty(2 * size, dtype=torch.int32)
    doubles, integers = matrix.new_empty(1), support.new_empty(1)
    order, none, status = ctypes.c_int(size), ctypes.c_double(), ctypes.c_int()
    for asked in (True, False):  # for room to work in
        rooms = [ctypes.c_int(-1 if asked else len(room)) for room in (doubles, integers)]
        solve(
            *(b"V", b"I" if few else b"A", b"L", order, _at(matrix), order, none, none),
            *(ctypes.c_int(1), ctypes.c_int(count), none, ctypes.c_int(), _at(values)),
            *(_at(vectors), order, _at(support), _at(doubles), rooms[0], _at(integers), rooms[1]),
            status,
        )
        if asked:
            doubles = doubles.new_empty(int(doubles))
            integers = integers.new_empty(int(integers))
    if status.value:
        raise RuntimeError(f"LAPACK's dsyevr failed with the status {status.value}.")
    return values[:count].neg_(), vectors[:count].T


def _at(tensor: Tensor) -> Any:
    """Return the tensor's first element, for ctypes."""
    kind = ctypes.c_double if tensor.dtype == torch.float64 else ctypes.c_int
    return kind.from_address(tensor.data_ptr())


@cache
def _dsyevr() -> Callable[..., None] | None:
    """Return the function that SciPy offers to Cython; ``None`` where it has other arguments."""
    from scipy.linalg import cython_lapack

    capsule, api = ctypes.py_object(cython_lapack.__pyx_capi__["dsyevr"]), ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    signature = api.PyCapsule_GetName(capsule)
    types = re.findall(r"(\w+) \*", signature.decode())  # doubles have a name that ends so
    if ["d" if name.endswith("_d") else name[0] for name in types] != _ARGUMENTS:
        return None
    address = api.PyCapsule_GetPointer(capsule, ctypes.c_char_p(signature))
    return ctypes.CFUNCTYPE(None, *(_POINTERS[kind] for kind in _ARGUMENTS))(address)
