"""Heads that turn an encoder's features of patches into values of pixels, and their files."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from fusion_bench.problems import ConfigError
from fusion_bench.storage import read_json, write_bytes, write_text

CONFIG, WEIGHTS = "head.json", "head.safetensors"
#: The files of a head; they may lie beside those of an encoder.
FILES = (CONFIG, WEIGHTS)
#: More than any head has, so that a damaged file does not ask for all memory.
_MOST = 2**20


class PatchHead(nn.Module):
    """A layer norm, and one linear map from the features of a patch to its ``scale²`` pixels.

    Args:
        hidden_size: features of a patch.
        channels: values of a pixel: classes, 1 for depth, 3 for normals.
        scale: pixels along each side of a patch.
    """

    def __init__(self, hidden_size: int, channels: int, scale: int):
        super().__init__()
        self.hidden_size, self.channels, self.scale = hidden_size, channels, scale
        self.norm = nn.LayerNorm(hidden_size)
        self.pixels = nn.Linear(hidden_size, channels * scale**2)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, hidden, h, w) to (n, channels, h · scale, w · scale), always in float32."""
        with torch.autocast(features.device.type, enabled=False):
            found = self.pixels(self.norm(features.float().movedim(1, -1)))
            return pixel_shuffle(found.movedim(-1, 1), self.scale)

    @property
    def config(self) -> dict[str, int]:
        """The arguments that make a head of this size."""
        sizes = ("hidden_size", "channels", "scale")
        return {name: int(getattr(self, name)) for name in sizes}

    def save(self, directory: str | Path) -> None:
        """Write the head's files into a directory, such as that of its encoder."""
        place = Path(directory)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_bytes(place / WEIGHTS, save(tensors))
        write_text(place / CONFIG, json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Return the head that ``save`` wrote into a directory.

        Raises:
            ConfigError: files that are no head's.
        """
        place = Path(directory)
        sizes = read_sizes(place)
        try:
            with torch.device("meta"):
                head = cls(**sizes)
            head.load_state_dict(load((place / WEIGHTS).read_bytes()), assign=True)
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"'{place / WEIGHTS}' does not hold its weights: {reason}") from error
        return head.float().eval()


def read_sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the head in a directory.

    Raises:
        ConfigError: a file without them.
    """
    file = directory / CONFIG
    found: Any = read_json(file)
    sizes = {}
    for name in ("hidden_size", "channels", "scale"):
        value = found.get(name) if isinstance(found, dict) else None
        if type(value) is not int or not 0 < value < _MOST:
            raise ConfigError(f"'{file}': '{name}' is {value!r}; it must be a whole number from 1.")
        sizes[name] = value
    return sizes
