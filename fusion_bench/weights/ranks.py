"""The ranks of a row's elements by magnitude, as fast as a CPU sorts."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Longer rows would leave too few bits of a key to the magnitude.
_LONGEST = 2**16
#: If more than one in so many elements is in the wrong place after all, everything is sorted anew.
_RARE = 64


def by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """Return, at each element, the one of ``values`` at its rank in its row by magnitude.

    Args:
        rows: they lie along the last dimension. The smallest magnitude has the rank 0; of equal
            ones the first comes first.
        values: one for each rank.
    """
    order = _order(rows.abs().reshape(-1, rows.shape[-1]))
    found = torch.empty(order.shape, dtype=values.dtype, device=values.device)
    return found.scatter_(1, order, values.expand(order.shape)).view(rows.shape)


def _order(magnitudes: Tensor) -> Tensor:
    """Return where in its row each row's elements are, from the smallest on."""
    if magnitudes.dtype == torch.float32 and magnitudes.is_cpu:
        # numpy sorts whole numbers ten times as fast as torch finds an order.
        found = _by_half_keys(magnitudes) if 1 < magnitudes.shape[1] <= _LONGEST else None
        return torch.from_numpy(_by_whole_keys(magnitudes) if found is None else found)
    return magnitudes.argsort(dim=-1, stable=True)


def _by_whole_keys(magnitudes: Tensor) -> NDArray[np.int64]:
    """Return the order by all bits of the magnitudes, which sort as integers do.

    The lower half of a key is the place, which settles ties.
    """
    keys = magnitudes.numpy().view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(magnitudes.shape[1])
    keys.sort(axis=1)
    keys &= 2**32 - 1
    return keys


def _by_half_keys(magnitudes: Tensor) -> NDArray[np.int64] | None:
    """Return the same by keys of half the bits, which sort two to three times as fast.

    A key has the place in the row, and of the magnitude what is left of 32 bits. So neighbours may
    be in the wrong order, and are swapped where they are. ``None`` where that would take long, or a
    magnitude is not finite.
    """
    low = (magnitudes.shape[1] - 1).bit_length()
    # Roots spread the small ones, of which there are most.
    roots = magnitudes.sqrt()
    top = roots.amax(1, keepdim=True)
    if not bool(top.isfinite().all()):
        return None
    # The share below 1 is for rounding: the largest must not need one bit more.
    scale = 2.0 ** (32 - low) * (1 - 2.0**-20) / top.clamp_(min=1e-25)
    keys = roots.mul_(scale).numpy().astype(np.int32).view(np.uint32)
    keys <<= low
    keys |= np.arange(magnitudes.shape[1], dtype=np.uint32)
    keys.sort(axis=1)
    keys &= (1 << low) - 1
    order = keys.astype(np.int64)
    ordered = magnitudes.gather(1, torch.from_numpy(order)).numpy()
    wrong = np.zeros(order.shape, bool)
    np.greater(ordered[:, :-1], ordered[:, 1:], out=wrong[:, :-1])
    found = np.flatnonzero(wrong)
    if len(found) * _RARE > order.size:
        return None
    _swap(order.reshape(-1), magnitudes.numpy().reshape(-1), found, order.shape[1])
    return order


def _swap(
    order: NDArray[np.int64],
    magnitudes: NDArray[np.float32],
    wrong: NDArray[np.int64],
    columns: int,
) -> None:
    """Swap neighbours in flattened rows until no magnitude is above the next; equal ones stay.

    ``wrong`` are the places where one is.
    """
    while len(wrong):
        first = wrong[np.diff(wrong, prepend=-2) > 1]  # no two of them overlap
        order[first], order[first + 1] = order[first + 1], order[first]
        near = np.sort(np.concatenate([first - 1, wrong, first + 1]))
        near = near[(near + 1) % columns > 0]  # not the last of a row, or before the first
        row = near // columns * columns
        wrong = near[magnitudes[row + order[near]] > magnitudes[row + order[near + 1]]]
