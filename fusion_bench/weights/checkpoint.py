"""Checkpoints on disk, mapped into memory."""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion_bench.companions import own_file
from fusion_bench.problems import ConfigError
from fusion_bench.sources import reading
from fusion_bench.storage import read_json, refuse_huge
from fusion_bench.weights.align import shortened
from fusion_bench.weights.formats import foreign_file
from fusion_bench.weights.mapping import TensorWeights
from fusion_bench.weights.write import DTYPES

#: What a checkpoint's weights may be called, best first.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(path: Path) -> TensorWeights:
    """Map a checkpoint's tensors; nothing is read until they are used.

    Args:
        path: a ``.safetensors`` file, a PyTorch file (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), or
            an ``.index.json`` that names shards of either kind.

    Raises:
        ConfigError: a file that is missing, damaged, or would run code when it is unpickled.
    """
    with reading("model", str(path)):
        if path.name.endswith(".index.json"):
            return _open_sharded(path)
        return TensorWeights(_open_file(path), (path,))


def shards(index: Path) -> dict[str, list[str]]:
    """Return the files that an index names, each with its keys.

    Raises:
        ConfigError: an index that is damaged or too large, or names anything except files next to
            it.
    """
    refuse_huge(index)
    try:
        files: dict[str, list[str]] = {}
        for key, name in read_json(index)["weight_map"].items():
            files.setdefault(PurePosixPath(name).as_posix(), []).append(key)
        if not files:
            raise ValueError("It lists no file.")
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{index}' is not an index of shards. Download it again.") from error
    for name in files:
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ConfigError(
                f"'{index}' names {name!r}, which is outside its directory. It is refused."
            )
        if "\0" not in name and os.path.lexists(index.parent / name):
            own_file(index.parent, name)
    return dict(sorted(files.items()))


def _open_sharded(index: Path) -> TensorWeights:
    tensors: dict[str, Tensor] = {}
    files = []
    problems = []
    for name, keys in shards(index).items():
        file = index.parent / name
        if not file.is_file():
            raise ConfigError(
                f"'{index}' names {name!r}, which is missing. The copy is incomplete: download it "
                "again."
            )
        files.append(file)
        with reading("model", str(file)):
            found = _open_file(file)
        problems += [f"'{key}' is not in '{name}'" for key in keys if key not in found]
        listed = set(keys)
        problems += [f"'{key}' is in '{name}' unlisted" for key in found if key not in listed]
        tensors |= found
    if problems:
        raise ConfigError(
            f"'{index}' does not match its shards. Download them again.\n  {shortened(problems)}"
        )
    return TensorWeights(tensors, tuple(files))


def _open_file(path: Path) -> dict[str, Tensor]:
    if problem := foreign_file(path):
        raise ConfigError(problem)
    if path.suffix in _PICKLES:
        return _unpickled(path)
    return _mapped(path)


def _mapped(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file.

    The library checks the file. Its own views of a mapping take ten times as long to make, which
    is felt where a model has hundreds of small tensors.
    """
    with path.open("rb") as file, safe_open(path, framework="pt") as checked:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8), object_pairs_hook=_without_repetition)
        # A private mapping: who writes to a tensor by mistake does not write to the file.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {}
        for key in checked.keys():  # noqa: SIM118
            entry = header[key]
            (start, stop), dtype = entry["data_offsets"], DTYPES.get(entry["dtype"])
            if dtype is None or start == stop:
                tensors[key] = checked.get_tensor(key)
            else:
                count = (stop - start) // dtype.itemsize
                flat = torch.frombuffer(content, dtype=dtype, count=count, offset=begin + start)
                tensors[key] = flat.view(entry["shape"])
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping; refuse duplicate keys because readers handle them differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SafetensorError("A key appears twice.")
    return found


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read a PyTorch file, mapped where it is a zip archive; only tensors are let in."""
    try:
        content = _load(path)
    except (OSError, PickleError):
        raise
    except Exception as error:  # from a damaged file the unpickler makes anything
        raise PickleError(f"'{path}' cannot be unpickled.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # as training frameworks write it
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"'{path}' does not contain a state dict.")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ConfigError(f"'{path}' is not a state dict: '{key}' is not a tensor.")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ConfigError(f"'{path}': '{key}' is not a plain dense tensor.")
    return dict(content)
