"""Writes a checkpoint as sharded safetensors while it is computed."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EINVAL, ENOSPC, ENOTSUP
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.weights.mapping import TensorSpec, Weights
from fusion_bench.weights.stream import stream_together

#: Bytes after which the disk is asked to begin, so that it works while we compute.
_FLUSH_EVERY = 2**28

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
#: The dtypes that safetensors know, by the names that they have there.
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SIZE = re.compile(r"(?=.*[1-9])\d*\.?\d*\s*([KMGT]B)?", re.I)


def write_checkpoint(
    weights: Weights,
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    finish: Callable[[], Mapping[str, str]] | None = None,
    name: str = "model",
) -> None:
    """Write ``model.safetensors``, or shards and their index, into an existing directory.

    Memory holds at most one piece per thread. Tied entries are written once, under their first key.
    The files are on the disk when this returns, not only on their way.

    Args:
        weights: what to write; read once.
        directory: best one that appears as a whole when all is done.
        max_shard_size: bytes, or a text such as ``5GB``; a larger tensor has a shard of its own.
        metadata: goes into each file's header.
        finish: returns the final metadata after all tensors are written; it must have the length of
            ``metadata``.
        name: of the file, in place of ``model``.

    Raises:
        EnvironmentProblem: a disk that is full or fails.
        FusionBenchError: an impossible ``max_shard_size``, a dtype that safetensors do not know,
            or what is wrong with ``weights``.
    """
    checkpoint = Checkpoint(weights, directory, max_shard_size, metadata, finish, name)
    write_checkpoints([checkpoint])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to write, with the arguments of ``write_checkpoint``."""

    weights: Weights
    directory: Path
    max_shard_size: int | str = "5GB"
    metadata: Mapping[str, str] | None = None
    finish: Callable[[], Mapping[str, str]] | None = None
    name: str = "model"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that are written; tied ones are written once."""
        own = self.weights
        return {key: own.spec(key) for key in own if own.tied_to(key) == key}


def write_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    """Write several checkpoints in one pass over what their weights are made of.

    Each is as ``write_checkpoint`` writes it. Memory holds a piece of one of them per thread.

    Raises:
        FusionBenchError: as ``write_checkpoint``.
    """
    try:
        with ExitStack() as stack:
            to_flush: SimpleQueue[int | None] = SimpleQueue()
            begun = [_Begun(own, stack, to_flush.put) for own in checkpoints]
            stack.enter_context(_flushing(to_flush))
            stream_together([(own.checkpoint.weights, own.write) for own in begun])
            for own in begun:
                own.finish()
    except OSError as error:
        raise EnvironmentProblem(_explain(error, checkpoints)) from error


class _Begun:
    """A checkpoint whose files are open."""

    def __init__(
        self, checkpoint: Checkpoint, stack: ExitStack, flush: Callable[[int], None]
    ) -> None:
        self.checkpoint = checkpoint
        specs = checkpoint.specs
        for key, spec in specs.items():
            if spec.dtype not in _NAMES:
                name = str(spec.dtype).removeprefix("torch.")
                raise FusionBenchError(
                    f"'{key}' has the type {name}, which safetensors does not support."
                )
        self._index, plan = _split(specs, checkpoint.max_shard_size, checkpoint.name)
        self._metadata = {"format": "pt", **(checkpoint.metadata or {})}
        self._shards: list[_Shard] = []
        self._files: dict[str, _Shard] = {}
        for file, keys in plan.items():
            contained = {key: specs[key] for key in keys}
            shard = _Shard(checkpoint.directory / file, contained, self._metadata, flush)
            stack.callback(shard.close)
            self._shards.append(shard)
            self._files |= dict.fromkeys(keys, shard)

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Write elements of a flattened entry, from ``start`` on."""
        self._files[key].write(key, start, values)

    def finish(self) -> None:
        """Write headers and index; wait until all is on the disk."""
        own = self.checkpoint
        final = self._metadata if own.finish is None else {**self._metadata, **own.finish()}
        for shard in self._shards:
            shard.finish(final)
        if self._index is not None:
            index = own.directory / f"{own.name}.safetensors.index.json"
            index.write_text(json.dumps(self._index, indent=2))


class _Shard:
    """One safetensors file whose tensors are written in any order."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        flush: Callable[[int], None],
    ):
        # The widest types first, so that each tensor is aligned to its type.
        order = sorted(specs, key=lambda key: -specs[key].dtype.itemsize)
        ends = accumulate(specs[key].nbytes for key in order)
        self._entries = {
            key: {
                "dtype": _NAMES[specs[key].dtype],
                "shape": list(specs[key].shape),
                "data_offsets": [end - specs[key].nbytes, end],
            }
            for key, end in zip(order, ends, strict=True)
        }
        self._dtypes = {key: spec.dtype for key, spec in specs.items()}
        size = len(self._header(metadata))
        self._header_size = size + -size % 8
        begin = 8 + self._header_size
        starts = [0, *accumulate(specs[key].nbytes for key in order)]
        self._offsets = {key: begin + start for key, start in zip(order, starts, strict=False)}
        self._flush = flush
        self._unflushed = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _reserve(self._file, begin + sum(spec.nbytes for spec in specs.values()))

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Write elements of a flattened entry, from ``start`` on."""
        dtype = self._dtypes[key]
        values = values.detach().to("cpu", dtype).contiguous()
        _write_at(
            self._file,
            values.view(torch.uint8).numpy().data,
            self._offsets[key] + start * dtype.itemsize,
        )
        self._unflushed += values.nbytes  # may lose a count between threads, which is no harm
        if self._unflushed > _FLUSH_EVERY:
            self._unflushed = 0
            self._flush(self._file)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and wait until all is on the disk."""
        header = self._header(metadata)
        if len(header) > self._header_size:
            raise ValueError("The final metadata is longer than the reserved space.")
        header = header.ljust(self._header_size)
        _write_at(self._file, memoryview(len(header).to_bytes(8, "little") + header), 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        return json.dumps({"__metadata__": dict(metadata), **self._entries}).encode()


def check_size(size: int | str | None) -> None:
    """Refuse an invalid file size.

    Raises:
        FusionBenchError: it is none.
    """
    if not _SIZE.fullmatch(str(size).strip()):
        raise _no_size(size)


def _no_size(size: int | str | None) -> FusionBenchError:
    said = "null" if size is None else f"'{size}'"
    return FusionBenchError(
        f"{said} is not a size.", "Write it like '5GB' or '500MB'.", place=("max_shard_size",)
    )


def _split(
    specs: Mapping[str, TensorSpec], max_shard_size: int | str, name: str
) -> tuple[dict[str, object] | None, dict[str, list[str]]]:
    """Return each file's keys, and the index if there are several files."""
    from huggingface_hub import split_state_dict_into_shards_factory

    check_size(max_shard_size)
    try:
        plan = split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern=f"{name}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise _no_size(max_shard_size) from error
    files = plan.filename_to_tensors or {f"{name}.safetensors": []}
    if not plan.is_sharded:
        return None, files
    return {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, files


@contextmanager
def _flushing(files: "SimpleQueue[int | None]") -> Iterator[None]:
    """Write the data of queued files to disk in the background."""

    def work() -> None:
        while (file := files.get()) is not None:
            with suppress(OSError):  # the last fsync, which nobody suppresses, reports it too
                os.fsync(file)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        files.put(None)
        thread.join()


def _reserve(file: int, size: int) -> None:
    """Reserve a file's size, to find a full disk before any work."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (ENOTSUP, EINVAL):
            raise
        os.truncate(file, size)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _explain(error: OSError, checkpoints: Sequence[Checkpoint]) -> str:
    directory = checkpoints[0].directory
    if error.errno != ENOSPC:
        return f"Cannot write '{directory}': {error.strerror or error}."
    needed = sum(spec.nbytes for own in checkpoints for spec in own.specs.values()) / 1e9
    files = [file for own in checkpoints for file in own.directory.iterdir()]
    free = (shutil.disk_usage(directory).free + sum(f.stat().st_blocks * 512 for f in files)) / 1e9
    what = "The model takes" if len(checkpoints) == 1 else f"The {len(checkpoints)} models take"
    return (
        f"Cannot write '{directory}': the disk is full. {what} {needed:.2f} GB; {free:.2f} GB are "
        "free."
    )
