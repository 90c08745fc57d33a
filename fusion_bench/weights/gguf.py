"""Files of llama.cpp: GGUF. Their blocks are decoded as they are read, by the library ``gguf``."""

from collections.abc import Iterator, Mapping
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
    from transformers.integrations.gguf.reader import TensorInfo

#: Types of llama.cpp that are numbers, no blocks.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
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
        from transformers.integrations.gguf.reader import GgufHeader

        try:
            header = GgufHeader.from_file(str(path))
            self.architecture = str(header.architecture)
            self._entries = {info.name: info for info in header.tensors}
            size = path.stat().st_size - header.data_start
            if len(self._entries) < len(header.tensors):
                raise ValueError("a tensor is there twice")
            for info in header.tensors:
                self._check(info, size)
        except Exception as error:  # of a damaged file the reader raises anything
            reason = str(error) or type(error).__name__
            raise ConfigError(
                f"'{path}' cannot be read as GGUF: {reason.partition(chr(10))[0][:200]}. "
                "Download it again, or use the original model."
            ) from error
        self._path = path
        self._begin = header.data_start
        self._shifts = dict(shifts or {})

    @staticmethod
    def _check(info: "TensorInfo", size: int) -> None:
        """Refuse what is no tensor, or lies outside the file."""
        if prod(info.shape) > _MOST or not info.shape or min(info.shape) < 1:
            raise ValueError(f"'{info.name}' has the shape {list(info.shape)}")
        if info.ggml_type not in _PLAIN and info.shape[-1] % _block(info.ggml_type)[0]:
            raise ValueError(f"'{info.name}' has rows of {info.shape[-1]} elements")
        if info.offset < 0 or info.offset + info.nbytes > size:
            raise ValueError(f"'{info.name}' ends behind the file, which is not complete")

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
        info = self._entries[key]
        return TensorSpec(tuple(info.shape), _PLAIN.get(info.ggml_type, torch.bfloat16))

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry; those of blocks in float32."""
        info = self._entries[key]
        elements, size = (
            (1, _PLAIN[info.ggml_type].itemsize)
            if info.ggml_type in _PLAIN
            else _block(info.ggml_type)
        )
        first, last = start // elements, -(-stop // elements)
        begin = self._begin + info.offset
        stored = self._content[begin + first * size : begin + last * size]
        if info.ggml_type in _PLAIN:
            values = torch.from_numpy(stored.copy()).view(_PLAIN[info.ggml_type])
        else:
            from gguf.quants import dequantize

            decoded = dequantize(stored.reshape(-1, size), _type(info.ggml_type))
            values = torch.from_numpy(np.ascontiguousarray(decoded).reshape(-1)).float()
            values = values[start - first * elements : stop - first * elements]
        shift = self._shifts.get(key)
        return values if shift is None else values.float() + shift

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of an entry in the file."""
        return int(self._entries[key].nbytes)

    @cached_property
    def _content(self) -> np.memmap:
        return np.memmap(self._path, mode="r", dtype=np.uint8)


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


def _block(number: int) -> tuple[int, int]:
    """Return the elements and the bytes of a block."""
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[_type(number)]
    return int(elements), int(size)
