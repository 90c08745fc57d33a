"""Tensors that are put aside on a disk, so that they take no memory."""

import os
import sys
import threading
from collections.abc import Hashable, Sequence
from math import prod
from tempfile import TemporaryFile, gettempdir
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_bench.problems import EnvironmentProblem


class Scratch:
    """A file of tensors under keys, for all threads; it goes with the last who holds it.

    It lies where the system has temporary files, as ``TMPDIR`` tells.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - it is closed with this object
        self._end = 0
        self._places: dict[Hashable, tuple[int, Tensor]] = {}
        self._lock = threading.Lock()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Write a tensor under a new key.

        Raises:
            EnvironmentProblem: the disk is full, or fails.
        """
        values = tensor.contiguous().cpu()
        elements: Any = values.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(elements)
        with self._lock:
            start, self._end = self._end, self._end + len(view)
            self._file.seek(start)
            try:
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise _no_room(error) from error
            self._places[key] = start, values.to("meta")

    def get(self, key: Hashable) -> Tensor:
        """Return the tensor of a key, mapped from the file."""
        with self._lock:
            start, like = self._places[key]
        if not like.numel():
            return torch.empty_like(like, device="cpu")
        mapped = np.memmap(self._file, np.uint8, "c", start, like.nbytes)
        return torch.from_numpy(mapped).view(like.dtype).view(like.shape)


def on_disk(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros in a file, where ``Scratch`` has its own; it takes no memory.

    Raises:
        EnvironmentProblem: the disk is full, or fails.
    """
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    with TemporaryFile() as file:
        try:
            file.truncate(nbytes)
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, nbytes)  # else a full disk ends the process
        except OSError as error:
            raise _no_room(error) from error
        return torch.from_numpy(np.memmap(file, np.uint8, "r+")).view(dtype).view(shape)


def _no_room(error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"What a merge puts aside in {gettempdir()} cannot be written: {error.strerror}.",
        "Set TMPDIR to a folder with more room.",
    )
