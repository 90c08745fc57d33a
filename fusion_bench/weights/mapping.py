"""Parameters as data: a read-only, ordered mapping from key to tensor."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

#: Elements between two wanted rows up to which one read of both is faster than two.
_NEAR = 4096


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an entry."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the elements take."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Origin:
    """A stored entry that another is made of.

    Attributes:
        weights: the weights that store it.
        key: its key there.
    """

    weights: "Weights"
    key: str


@dataclass(frozen=True)
class Cost:
    """What reading an entry takes.

    Attributes:
        bytes_read: bytes that are read.
        peak_bytes: bytes of anonymous memory that a thread holds at most while it reads the pieces.
            Mapped files are not counted: the system may drop what was read of them.
    """

    bytes_read: int
    peak_bytes: int


class Weights(Mapping[str, Tensor]):
    """A model's named tensors, in the model's order; callers must not write to them.

    Entries may lie in memory, in mapped files or on the Hub, or be computed when they are read.
    """

    #: Whether entries may be read piece by piece for no more work than as a whole.
    in_pieces: bool = True
    #: Whether a person wants to watch them being read.
    show_progress: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the entries are read from; they are downloaded if they are not here."""
        return ()

    def __contains__(self, key: object) -> bool:
        """Return whether there is such an entry, without loading it as ``Mapping`` would."""
        try:
            self.spec(key)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    @abstractmethod
    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry without loading it."""

    def tied_to(self, key: str) -> str:
        """Return the first key that shares its memory with ``key``; ``key`` itself where untied."""
        return key

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return the elements ``start`` to ``stop`` of the flattened entry, 1-d.

        A computed entry may be returned in float32, for any dtype.
        """
        return self[key].reshape(-1)[start:stop]

    def read_or_wait(self, key: str, start: int, stop: int) -> Tensor | None:
        """Return the elements, or ``None`` where they take less work after all others are read."""
        return self.read(key, start, stop)

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield ``start`` and ``stop`` of pieces of at most ``size`` elements, to be read apart."""
        numel = self.spec(key).numel
        for start in range(0, numel, size):
            yield start, min(start + size, numel)

    def take(self, key: str, rows: Tensor, width: int) -> Tensor:
        """Return rows of an entry, seen as a matrix of so many columns: ``[rows, width]``.

        What lies close together is read at once.
        """
        if not len(rows):
            return torch.empty(0, width)
        ordered, order = rows.sort(stable=True)
        far = (ordered.diff() > max(_NEAR // width, 1)).nonzero().view(-1) + 1
        blocks = []
        for start, stop in pairwise([0, *far.tolist(), len(rows)]):
            first, last = int(ordered[start]), int(ordered[stop - 1]) + 1
            block = self.read(key, first * width, last * width).view(-1, width)
            blocks.append(block[ordered[start:stop] - first])
        return torch.cat(blocks)[order.argsort()]

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry, for progress."""
        return self.spec(key).nbytes

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries that an entry is made of; itself where it is stored."""
        return (Origin(self, key),)

    def cost(self, key: str) -> Cost:
        """Return what reading an entry takes; one that is stored takes no memory of its own."""
        return Cost(self.bytes_to_read(key), 0)

    def verify(self) -> None:
        """Raise errors that were found while reading; called after all entries are read."""


class TensorWeights(Weights):
    """Weights from tensors: a state dict or mapped files; nothing is copied.

    Args:
        tensors: a module's ``state_dict()`` for one; entries that share memory are tied.
        files: where they are mapped from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], files: tuple[Path, ...] = ()):
        self._files = files
        self._tensors = {
            key: tensor.detach() if tensor.requires_grad else tensor
            for key, tensor in tensors.items()
        }
        self._specs = {
            key: TensorSpec(tuple(tensor.shape), tensor.dtype)
            for key, tensor in self._tensors.items()
        }
        self._flat: dict[str, Tensor] = {}
        first: dict[tuple[object, ...], str] = {}
        self._tied_to = {
            key: first.setdefault(
                (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()), key
            )
            if tensor.numel() and not tensor.is_meta
            else key
            for key, tensor in self._tensors.items()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the tensors are mapped from."""
        return self._files

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        return self._specs[key]

    def tied_to(self, key: str) -> str:
        """Return the first key whose tensor is the same memory."""
        return self._tied_to[key]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return a view of the flattened entry; a copy where it is not contiguous."""
        flat = self._flat.get(key)
        if flat is None:  # kept, for a copy of the whole entry a piece would be slow
            flat = self._flat[key] = self._tensors[key].reshape(-1)
        return flat[start:stop]

    def take(self, key: str, rows: Tensor, width: int) -> Tensor:
        """Return rows of an entry, of a mapped file those alone are read."""
        return self.read(key, 0, self.spec(key).numel).view(-1, width)[rows]


def zeros_like(weights: Weights) -> dict[str, Tensor]:
    """Return zeros in the shapes of all entries, which take no memory."""
    specs = {key: weights.spec(key) for key in weights}
    return {key: torch.zeros((), dtype=own.dtype).expand(own.shape) for key, own in specs.items()}


def is_special(name: str) -> bool:
    """Return whether a model's name, such as ``_pretrained_``, excludes it from merging."""
    return name.startswith("_") or name.endswith("_")
