"""Files of llama.cpp: GGUF. Their blocks are decoded as they are read, by the library ``gguf``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion_bench.problems import ConfigError
from fusion_bench.weights.mapping import TensorSpec, Weights

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

#: Types of llama.cpp that are numbers, no blocks.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
#: Types of llama.cpp whose blocks are decoded.
_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
#: Elements that no tensor has; a damaged header may say anything.
_MOST = 2**40


class GgufWeights(Weights):
    """The tensors of a GGUF file under the names that they have there.

    Decoded entries are bfloat16, as the models mostly were before.

    Args:
        path: the file; of it the header is read.
        shifts: key to what is to be added to an entry's elements.

    Attributes:
        architecture: what llama.cpp calls the architecture.

    Raises:
        ConfigError: a file that is damaged, or has types that are not known; a missing library.
    """

    def __init__(self, path: Path, shifts: Mapping[str, float] | None = None):
        require_gguf(path)
        from transformers.integrations.gguf import reader

        try:
            # GgufHeader of transformers knows fewer types than the library gguf decodes.
            content = reader._mapped(str(path))
            metadata, count, end = reader._read_metadata(content, str(path))
            table, end = reader._read_tensor_table(content, count, end)
            self.architecture = str(metadata["general.architecture"])
            self._begin = -(-end // (step := metadata.get("general.alignment", 32))) * step
            self._entries = {name: _Entry(tuple(shape), *rest) for name, shape, *rest in table}
            size = path.stat().st_size - self._begin
            if len(self._entries) < len(table):
                raise ValueError("a tensor is there twice")
            for name, entry in self._entries.items():
                self._check(path, name, entry, size)
        except ConfigError:
            raise
        except Exception as error:  # of a damaged file the reader raises anything
            reason = str(error) or type(error).__name__
            raise ConfigError(
                f"'{path}' cannot be read as GGUF: {reason.partition(chr(10))[0][:200]}. "
                "Download it again, or use the original model."
            ) from error
        self._path = path
        self._shifts = dict(shifts or {})

    @staticmethod
    def _check(path: Path, name: str, entry: "_Entry", size: int) -> None:
        """Refuse what is no tensor, is coded in another way, or lies outside the file."""
        if prod(entry.shape) > _MOST or not entry.shape or min(entry.shape) < 1:
            raise ValueError(f"'{name}' has the shape {list(entry.shape)}")
        if entry.type not in _PLAIN and (told := _name(entry.type)) not in _BLOCKS:
            raise ConfigError(
                f"'{path}': '{name}' has the type {told}, which is not supported. Use the original "
                f"model, or a file of a type that is: F32, F16, BF16, {', '.join(_BLOCKS)}."
            )
        if entry.shape[-1] % _block(entry.type)[0]:
            raise ValueError(f"'{name}' has rows of {entry.shape[-1]} elements")
        if entry.offset + entry.nbytes > size:
            raise ValueError(f"'{name}' ends behind the file, which is not complete")

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self._path,)

    def __getitem__(self, key: str) -> Tensor:
        spec = self.spec(key)
        return self.read(key, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> TensorSpec:
        """Return the shape in torch's order, and the type."""
        entry = self._entries[key]
        return TensorSpec(entry.shape, _PLAIN.get(entry.type, torch.bfloat16))

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry; those of blocks in float32."""
        entry = self._entries[key]
        elements, size = _block(entry.type)
        first, last = start // elements, -(-stop // elements)
        begin = self._begin + entry.offset
        stored = self._content[begin + first * size : begin + last * size]
        if entry.type in _PLAIN:
            values = torch.from_numpy(stored.copy()).view(_PLAIN[entry.type])
        else:
            from gguf.quants import dequantize

            decoded = dequantize(stored.reshape(-1, size), _type(entry.type))
            values = torch.from_numpy(np.ascontiguousarray(decoded).reshape(-1)).float()
            values = values[start - first * elements : stop - first * elements]
        shift = self._shifts.get(key)
        return values if shift is None else values.float() + shift

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of an entry in the file."""
        return self._entries[key].nbytes

    @cached_property
    def _content(self) -> np.memmap:
        return np.memmap(self._path, mode="r", dtype=np.uint8)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in the file, from the end of the header on, and how it is coded."""

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        elements, size = _block(self.type)
        return prod(self.shape) // elements * size


def require_gguf(path: Path) -> None:
    """Refuse a file where the libraries that read it are not installed.

    Raises:
        ConfigError: they are not.
    """
    try:
        import gguf.quants  # noqa: F401
        import transformers.integrations.gguf.reader  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"'{path}' is a GGUF file, which the library gguf reads. Install it: "
            "pip install 'fusion_bench[gguf]'. Or use the original model."
        ) from error


def _type(number: int) -> "GGMLQuantizationType":
    import gguf

    return gguf.GGMLQuantizationType(number)


def _name(number: int) -> str:
    """Return what llama.cpp calls a type; the number where it has no name."""
    try:
        return str(_type(number).name)
    except ValueError:
        return str(number)


def _block(number: int) -> tuple[int, int]:
    """Return the elements and the bytes of a block; a number is one itself."""
    import gguf

    if number in _PLAIN:
        return 1, _PLAIN[number].itemsize
    elements, size = gguf.GGML_QUANT_SIZES[_type(number)]
    return int(elements), int(size)
