"""Quantised weights, read as the numbers that they stand for.

Each kind says how elements of a range are decoded, so that a piece of an entry costs no more than
itself. The formats: blocks of fp8 as in DeepSeek-V3, https://arxiv.org/abs/2412.19437; integers and
fp8 of compressed-tensors; AWQ, https://arxiv.org/abs/2306.00978; bitsandbytes with 8 bits,
https://arxiv.org/abs/2208.07339, and with 4, https://arxiv.org/abs/2305.14314; MXFP4 of the Open
Compute Project, as GPT-OSS has it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fusion_bench.problems import ConfigError
from fusion_bench.weights.mapping import TensorSpec, Weights


class Coded(Protocol):
    """An entry that is decoded when it is read."""

    @property
    def spec(self) -> TensorSpec:
        """Shape, and the type that its values had before they were quantised."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored entries that it is decoded from."""

    def read(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry in float32."""


class Dequantised(Weights):
    """Weights some of whose entries are decoded as they are read.

    Args:
        weights: what is stored.
        entries: key to how it is decoded; the key alone for an entry as it is.
    """

    def __init__(self, weights: Weights, entries: Mapping[str, Coded | str]):
        self._weights = weights
        self._entries = dict(entries)
        self.in_pieces = weights.in_pieces
        self.show_progress = weights.show_progress

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind the entries."""
        return self._weights.files

    def __getitem__(self, key: str) -> Tensor:
        entry = self._entries[key]
        if isinstance(entry, str):
            return self._weights[entry]
        spec = entry.spec
        return entry.read(self._weights, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> TensorSpec:
        """Return the shape, and the type of the decoded values."""
        entry = self._entries[key]
        return self._weights.spec(entry) if isinstance(entry, str) else entry.spec

    def tied_to(self, key: str) -> str:
        """Return the first key that shares the entry's memory; a decoded one is untied."""
        entry = self._entries[key]
        first = self._weights.tied_to(entry) if isinstance(entry, str) else key
        return first if first in self._entries else key

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry; decoded ones in float32."""
        entry = self._entries[key]
        if isinstance(entry, str):
            return self._weights.read(entry, start, stop)
        return entry.read(self._weights, start, stop)

    def bytes_to_read(self, key: str) -> int:
        """Return the number of stored bytes that an entry is decoded from."""
        entry = self._entries[key]
        sources = (entry,) if isinstance(entry, str) else entry.sources
        return sum(self._weights.bytes_to_read(source) for source in sources)

    def verify(self) -> None:
        """Raise errors that were found while reading."""
        self._weights.verify()


@dataclass(frozen=True)
class Grid:
    """Numbers of which each belongs to a block of a matrix, or of each matrix of a stack.

    Attributes:
        stored: their shape: none or one for the whole matrix, one a row, or a number of blocks.
        shape: the matrix's shape.
        block: rows and columns of a block; where it is not given, the matrix or each row has one
            number, or blocks have 128 of both, as those of DeepSeek-V3.

    Raises:
        ValueError: shapes that do not fit.
    """

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None
    _cells: tuple[int, int] = field(init=False)
    _sizes: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        stored, shape = self.stored, self.shape
        if len(shape) < 2:
            raise ValueError(f"{list(shape)} is no matrix")
        if prod(stored) == 1:
            stored = (1,) * len(shape)
        elif len(stored) == len(shape) - 1:
            stored = (*stored, 1)
        cells, whole = stored[-2:], shape[-2:]
        if self.block is None and cells in ((1, 1), (whole[0], 1)):
            block = (whole[0] // max(cells[0], 1), whole[1])
        else:
            block = self.block or (128, 128)
            blocks = tuple(-(-size // own) for size, own in zip(whole, block, strict=True))
            if cells != blocks:
                raise ValueError(
                    f"scales of {list(self.stored)} for {list(shape)} in blocks of {list(block)}"
                )
        if len(stored) != len(shape) or stored[:-2] not in (shape[:-2], (1,) * (len(shape) - 2)):
            raise ValueError(f"scales of {list(self.stored)} for {list(shape)}")
        object.__setattr__(self, "stored", stored)
        object.__setattr__(self, "_cells", cells)
        object.__setattr__(self, "_sizes", block)

    def rows(self, weights: Weights, key: str, first: int, last: int) -> Tensor:
        """Return what belongs to each element of the rows ``first`` to ``last``; may be broadcast.

        Args:
            weights: what is stored.
            key: the entry with the numbers, of which those of these rows are read.
            first: counted over all matrices of a stack.
            last: likewise.
        """
        (down, across), (height, width) = self._cells, self._sizes
        index = torch.arange(first, last)
        row = index % self.shape[-2] // height
        if self.stored[:-2] == self.shape[:-2]:
            row += index // self.shape[-2] * down
        begin, end = (int(row.min()), int(row.max()) + 1) if len(row) else (0, 0)
        table = weights.read(key, begin * across, end * across).float().view(-1, across)
        found = table[row - begin]
        if across == 1:
            return found
        return found.repeat_interleave(width, dim=1)[:, : self.shape[-1]]


@dataclass(frozen=True)
class _Rows:
    """An entry that is decoded row by row."""

    spec: TensorSpec

    def read(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry."""
        width = max(self.spec.shape[-1], 1)
        first, last = start // width, -(-stop // width)
        decoded = self._decoded(weights, first, last).reshape(-1)
        return decoded[start - first * width : stop - first * width]

    def _decoded(self, weights: Weights, first: int, last: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Scaled(_Rows):
    """Numbers in few bits, times a scale: fp8 and int8; less a zero point where there is one.

    Attributes:
        weight: the entry with the numbers.
        scale: the entry with the scales.
        grid: which scale belongs to which.
        zero: the entry with the zero points, of the scales' shape.
        divisor: of the scales.
    """

    weight: str
    scale: str
    grid: Grid
    zero: str | None = None
    divisor: float = 1.0

    @property
    def sources(self) -> tuple[str, ...]:
        """The numbers, their scales and zero points."""
        return (self.weight, self.scale, *([self.zero] if self.zero else []))

    def _decoded(self, weights: Weights, first: int, last: int) -> Tensor:
        width = self.spec.shape[-1]
        numbers = weights.read(self.weight, first * width, last * width).float().view(-1, width)
        if self.zero is not None:
            numbers = numbers - self.grid.rows(weights, self.zero, first, last)
        scales = self.grid.rows(weights, self.scale, first, last)
        return numbers * (scales if self.divisor == 1 else scales / self.divisor)


@dataclass(frozen=True)
class Packed(_Rows):
    """Integers of a few bits, several in an int32 along a row, as compressed-tensors packs them.

    Attributes:
        weight: the entry with the packed integers.
        scale: the entry with the scales, [rows, groups].
        bits: of an integer; 2, 4 or 8.
        zero: the entry with the zero points, packed down the rows.
        groups: the entry with the number of each column's group of scales.
    """

    weight: str
    scale: str
    bits: int
    zero: str | None = None
    groups: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """All that belongs to the weight."""
        more = [each for each in (self.zero, self.groups) if each]
        return (self.weight, self.scale, *more)

    def _decoded(self, weights: Weights, first: int, last: int) -> Tensor:
        width, offset, each = self.spec.shape[-1], 1 << (self.bits - 1), 32 // self.bits
        numbers = unpacked(weights[self.weight][first:last], self.bits)[:, :width] - offset
        values = numbers.float()
        if self.zero is not None:
            down = first // each
            words = weights[self.zero][down : -(-last // each)]
            zeros = unpacked(words.T, self.bits).T[first - down * each : last - down * each]
            values = values - self._spread((zeros - offset).float(), weights)
        return values * self._spread(weights[self.scale][first:last].float(), weights)

    def _spread(self, numbers: Tensor, weights: Weights) -> Tensor:
        """Return each group's number for each of its columns."""
        if numbers.shape[1] == 1:
            return numbers
        if self.groups is not None:
            groups = weights[self.groups].long()
            if int(groups.min()) < 0 or int(groups.max()) >= numbers.shape[1]:
                raise ConfigError(
                    f"'{self.groups}' names groups of scales that are not there. The file is "
                    "damaged: download it again."
                )
            return numbers[:, groups]
        width = self.spec.shape[-1]
        return numbers.repeat_interleave(width // numbers.shape[1], dim=1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned integers in each row's words, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


#: Where in a word AWQ puts the integers of eight rows.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class Awq(_Rows):
    """Integers of 4 bits, those of eight rows in an int32; stored transposed.

    Attributes:
        weight: the entry with the packed integers, [columns, rows / 8].
        scale: the entry with the scales, [groups, rows].
        zero: the entry with the zero points, [groups, rows / 8].
    """

    weight: str
    scale: str
    zero: str | None

    @property
    def sources(self) -> tuple[str, ...]:
        """All that belongs to the weight."""
        return (self.weight, self.scale, *([self.zero] if self.zero else []))

    def _decoded(self, weights: Weights, first: int, last: int) -> Tensor:
        scales = weights[self.scale][:, first:last].float()
        numbers = self._integers(weights[self.weight], first, last)
        zeros = self._integers(weights[self.zero], first, last) if self.zero else 8.0
        group = self.spec.shape[-1] // scales.shape[0]
        values = numbers.view(scales.shape[0], group, -1)
        zeros = zeros[:, None] if isinstance(zeros, Tensor) else zeros
        return ((values - zeros) * scales[:, None]).flatten(0, 1).T.contiguous()

    @staticmethod
    def _integers(words: Tensor, first: int, last: int) -> Tensor:
        begin = first // 8
        some = unpacked(words[:, begin : -(-last // 8), None], 4)[..., _AWQ_ORDER].flatten(-2)
        return some[:, first - 8 * begin : last - 8 * begin].float()


@dataclass(frozen=True)
class FourBits:
    """bitsandbytes' 4 bits: places in a table of 16 numbers, times the largest of their block.

    Attributes:
        spec: shape and type before.
        weight: the entry with two places a byte, the first in the high bits.
        blocksize: elements of a block.
        nested: how many blocks have a scale of their own, where the blocks' scales are quantised.
        offset: of these scales.
    """

    spec: TensorSpec
    weight: str
    blocksize: int
    nested: int | None = None
    offset: float = 0.0

    @property
    def sources(self) -> tuple[str, ...]:
        """The places, the table, and the blocks' scales with their own."""
        names = ["absmax", "quant_map"]
        names += ["nested_absmax", "nested_quant_map"] if self.nested else []
        return (self.weight, *(f"{self.weight}.{name}" for name in names))

    def read(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry."""
        begin = start // 2
        some = weights.read(self.weight, begin, -(-stop // 2))
        places = torch.stack([some >> 4, some & 15], dim=1).view(-1)
        places = places[start - 2 * begin : stop - 2 * begin].long()
        block = torch.arange(start, stop) // self.blocksize
        first = start // self.blocksize
        scales = weights[f"{self.weight}.absmax"][first : -(-stop // self.blocksize)]
        if self.nested:
            table = weights[f"{self.weight}.nested_quant_map"].float()
            outer = weights[f"{self.weight}.nested_absmax"].float()
            group = torch.arange(first, first + len(scales)) // self.nested
            scales = table[scales.long()] * outer[group] + self.offset
        values = weights[f"{self.weight}.quant_map"].float()[places]
        return values * scales.float()[block - first]


#: What the 4 bits of a floating-point number stand for: 2 of exponent, 1 of mantissa.
_FLOAT4 = torch.tensor([sign * n for sign in (1, -1) for n in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


@dataclass(frozen=True)
class Mxfp4(_Rows):
    """GPT-OSS's experts: 32 numbers of 4 bits have a power of two in common; stored transposed.

    Attributes:
        blocks: the entry with two numbers a byte, [experts, out, in / 32, 16].
        scales: the entry with the exponents, [experts, out, in / 32].
    """

    blocks: str
    scales: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The numbers and the exponents."""
        return (self.blocks, self.scales)

    def _decoded(self, weights: Weights, first: int, last: int) -> Tensor:
        height = self.spec.shape[-2]
        blocks, scales = weights[self.blocks], weights[self.scales]
        parts = []
        while first < last:
            expert, row = divmod(first, height)
            count = min(last - first, height - row)
            begin, end = row // 32, -(-(row + count) // 32)
            some = blocks[expert, :, begin:end].long()
            values = _FLOAT4[torch.stack([some & 15, some >> 4], dim=-1)].flatten(-2)
            powers = torch.exp2(scales[expert, :, begin:end].float() - 127)
            decoded = (values * powers[..., None]).flatten(-2).T
            parts.append(decoded[row - 32 * begin : row - 32 * begin + count])
            first += count
        return torch.cat(parts)
