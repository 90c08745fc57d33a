"""Weights whose entries with a row a token have the rows of another tokenizer."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights.mapping import Origin, TensorSpec, Weights
from fusion_bench.weights.stream import PIECE


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a model's entries by token: that of a token's id there."""

    weights: Weights
    index: int


class ByToken(Weights):
    """A model's weights with the rows of an output tokenizer, gathered when they are read.

    An output row that is in neither ``rows`` nor ``fill`` is that of an id without a token, such as
    padding: it is the mean of all others, computed in float64.

    Args:
        weights: the model's own.
        rows: int64 ``[n]``: for each of the ``n`` output ids the model's own row, or -1.
        fill: output id to the rows, of any models with the same keys, whose mean in float32 takes
            the place where there is no own row; none of them are zeros.
        keys: the entries with a row a token, of shape ``[tokens, ...]`` or ``[1, tokens]``. A model
            in ``fill`` without one of them has its input embedding tied to it, the first of them.
    """

    def __init__(
        self,
        weights: Weights,
        rows: NDArray[np.int64],
        fill: Mapping[int, Sequence[Row]],
        keys: Collection[str],
    ):
        self._weights = weights
        self._rows = rows
        self._fill = fill
        self._keys = [key for key in weights if key in keys]
        lacking = [int(token) for token in np.flatnonzero(rows < 0)]
        filled = [token for token in lacking if token in fill]
        donors = {id(row.weights): row.weights for token in filled for row in fill[token]}
        self._others = [each for each in donors.values() if each is not weights]
        self._real = np.sort(np.array([*np.flatnonzero(rows >= 0), *filled], dtype=np.int64))
        self._means: dict[str, Tensor] = {}
        self.in_pieces = all(each.in_pieces for each in (weights, *self._others))
        self.show_progress = weights.show_progress

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the model, and of those that some rows are from."""
        everything = (self._weights, *self._others)
        return tuple(dict.fromkeys(file for each in everything for file in each.files))

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            return self._weights[key]
        spec = self.spec(key)
        return self._gathered(key, np.arange(len(self._rows))).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def spec(self, key: str) -> TensorSpec:
        """Return an entry's own dtype, and its shape with a row for each output token."""
        spec = self._weights.spec(key)
        if key not in self._keys:
            return spec
        axis = token_axis(spec)
        shape = (*spec.shape[:axis], len(self._rows), *spec.shape[axis + 1 :])
        return TensorSpec(shape, spec.dtype)

    def tied_to(self, key: str) -> str:
        """Return the first key of the same entry; what is tied stays tied."""
        return self._weights.tied_to(key)

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield pieces of whole rows, where a row is no larger than a piece."""
        if key not in self._keys:
            yield from self._weights.pieces(key, size)
            return
        yield from super().pieces(key, max(size // self._width(key), 1) * self._width(key))

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of the output's rows, or those of the model's other entries."""
        if key in self._keys:
            return self.spec(key).nbytes
        return self._weights.bytes_to_read(key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry; means of rows are in float32."""
        if key not in self._keys:
            return self._weights.read(key, start, stop)
        width = self._width(key)
        first, last = start // width, -(-stop // width)
        rows = self._gathered(key, np.arange(first, last))
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries that an entry is made of: the model's own, then others'."""
        found = list(self._weights.origins(key))
        for donor in self._others if key in self._keys else ():
            found += donor.origins(self._key_in(donor, key))
        return tuple(found)

    def verify(self) -> None:
        """Raise errors that were found while reading any of the models."""
        for each in (self._weights, *self._others):
            each.verify()

    def _width(self, key: str) -> int:
        """Return the number of elements in a token's row."""
        spec = self._weights.spec(key)
        return spec.numel // spec.shape[token_axis(spec)]

    def _gathered(self, key: str, tokens: NDArray[np.int64]) -> Tensor:
        """Return the rows of output tokens, ``[tokens, width]``."""
        width, own = self._width(key), self._rows[tokens]
        if (np.diff(own) == 1).all() and (own >= 0).all() and len(own):
            start, stop = int(own[0]) * width, (int(own[-1]) + 1) * width
            return self._weights.read(key, start, stop).view(-1, width)
        if (own >= 0).all():
            return self._weights.take(key, torch.from_numpy(own), width)
        dtype = torch.promote_types(self._weights.spec(key).dtype, torch.float32)
        values = torch.zeros(len(tokens), width, dtype=dtype)
        counts = torch.ones(len(tokens), 1, dtype=dtype)
        wanted: dict[int, list[tuple[int, Row]]] = {}
        for place in map(int, np.flatnonzero(own < 0)):
            rows = self._fill.get(int(tokens[place]))
            if rows is None:
                values[place] = self._mean(key)
                continue
            counts[place] = max(len(rows), 1)
            for row in rows:
                wanted.setdefault(id(row.weights), []).append((place, row))
        for found in wanted.values():
            donor = found[0][1].weights
            indices = torch.tensor([row.index for _, row in found])
            part = donor.take(self._key_in(donor, key), indices, width).to(dtype)
            values.index_add_(0, torch.tensor([place for place, _ in found]), part)
        if (counts > 1).any():
            values /= counts
        there = torch.from_numpy(np.flatnonzero(own >= 0))
        values[there] = self._weights.take(key, torch.from_numpy(own)[there], width).to(dtype)
        return values

    def _mean(self, key: str) -> Tensor:
        """Return the mean row of all tokens, which is read once."""
        if key not in self._means:
            width = self._width(key)
            total, step = torch.zeros(width, dtype=torch.float64), max(PIECE // width, 1)
            for start in range(0, len(self._real), step):
                total += self._gathered(key, self._real[start : start + step]).double().sum(0)
            self._means[key] = total / max(len(self._real), 1)
        return self._means[key]

    def _key_in(self, donor: Weights, key: str) -> str:
        return key if key in donor else next(own for own in self._keys if own in donor)


def token_axis(spec: TensorSpec) -> int:
    """Return which dimension of an entry by token counts the tokens: the first that is not 1."""
    return next((axis for axis, size in enumerate(spec.shape) if size != 1), 0)
