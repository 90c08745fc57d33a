"""How fast weights are fused, beside what the machine can do and what other programs take.

    python benchmarks/fuse.py                       # all of it: 12 GB of files, some minutes
    python benchmarks/fuse.py --small               # the same on small files, to try it out
    python benchmarks/fuse.py --peer fusionbench=/path/to/its/python --peer mergekit=/other/python

The checkpoints are made on the spot, with random values. Everything is measured in one run, one
round after the other, so that a busy moment meets all alike; ratios are of one round. Files are in
the page cache. A peer runs in a process of its own, with its own Python, and is told when to start.
Before times are taken, all results are compared; where one differs there are no times. Tables that
the file of `--json` has are kept: a run that was stopped goes on.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Record, Times, alternate, ratio, rounds_of, same, summary
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
from fusion_bench.progress import quiet_libraries
from fusion_bench.storage import whole_directory
from fusion_bench.weights import in_memory, write_checkpoint

CHUNK = 2**20
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    """Make the files, measure, write each table when it is there, print all."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    arguments = parser.parse_args()
    quiet_libraries()
    rounds = rounds_of(arguments, 5)
    record = Record(arguments, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(arguments.workdir or Path(scratch), small=arguments.small)
        peers = dict(peer.split("=", 1) for peer in arguments.peer)
        tables: dict[str, Callable[[], dict[str, Any]]] = {
            "eight vision encoders, into memory": lambda: in_memory_times(files, peers, rounds),
            "vision encoders, into memory": lambda: times_by_number(files, rounds),
            "four language models, to the disk": lambda: to_disk_times(files, peers, rounds),
            "peak anonymous memory": lambda: anonymous_memory(files),
        }
        for title, table in tables.items():
            record.table(title, table)
    record.show()


class Files:
    """Stand-in checkpoints: eight vision encoders in float32, four language models in bfloat16."""

    def __init__(self, root: Path, *, small: bool):
        from transformers import CLIPVisionConfig, LlamaConfig

        self.output = root / "output"
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        self.vision = [root / "vision" / f"m{i}" for i in range(8)]
        vision |= {"num_hidden_layers": 2}
        config = CLIPVisionConfig(patch_size=32, **(vision if small else {}))
        # As transformers 4 names them, and as the published files have them; 5 reads them too.
        shapes = {
            key if key.startswith("vision_model.") else f"vision_model.{key}": shape
            for key, shape in _shapes("CLIPVisionModel", config).items()
        }
        for seed, directory in enumerate(self.vision):
            _write(directory, config, shapes, torch.float32, seed, len(shapes))
        language = {
            "vocab_size": 32000,
            "hidden_size": 128 if small else 2048,
            "intermediate_size": 256 if small else 5632,
            "num_hidden_layers": 2 if small else 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        }
        self.language = [root / "language" / f"m{i}" for i in range(4)]
        config = LlamaConfig(**language)
        shapes = _shapes("LlamaForCausalLM", config)
        for seed, directory in enumerate(self.language):
            _write(directory, config, shapes, torch.bfloat16, seed, -(-len(shapes) // 3))


def _shapes(class_name: str, config: Any) -> Shapes:
    import transformers

    with torch.device("meta"):
        module = getattr(transformers, class_name)._from_config(config)
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _write(
    directory: Path, config: Any, shapes: Shapes, dtype: torch.dtype, seed: int, per_file: int
) -> None:
    """Write a model with ``per_file`` tensors a file, unless it is there already."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(2**22, generator=generator) * 0.02).to(dtype)  # repeated, to be quick
    keys, weight_map = list(shapes), {}
    groups = [keys[i : i + per_file] for i in range(0, len(keys), per_file)]
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        name = "model.safetensors" if len(groups) == 1 else name
        tensors = {}
        for key in group:
            numel = torch.Size(shapes[key]).numel()
            tensors[key] = noise.repeat(-(-numel // len(noise)))[:numel].view(shapes[key])
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM" if len(groups) > 1 else "CLIPVisionModel"]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(directory)


def weight_files(models: list[Path]) -> list[Path]:
    """Return all safetensors files of some models."""
    return [file for model in models for file in sorted(model.glob("*.safetensors"))]


def size(models: list[Path]) -> int:
    """Return the bytes of the models' files."""
    return sum(file.stat().st_size for file in weight_files(models))


# --- what is measured ---------------------------------------------------------------------------


def hash_once(models: list[Path]) -> None:
    """Take the SHA-256 of every file, with all cores."""

    def work(take: Callable[[], Any]) -> None:
        while (file := take()) is not None:
            with file.open("rb") as content:
                hashlib.file_digest(content, "sha256")

    _on_all_cores(work, weight_files(models))


def read_once(models: list[Path]) -> None:
    """Read every byte with all cores into buffers that are used again and again."""
    span = 32 * CHUNK
    jobs = [
        (file, start)
        for file in weight_files(models)
        for start in range(0, file.stat().st_size, span)
    ]

    def work(take: Callable[[], Any]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        while (job := take()) is not None:
            file, start = job
            descriptor = os.open(file, os.O_RDONLY)
            for offset in range(start, start + span, CHUNK):
                if os.preadv(descriptor, [buffer], offset) == 0:
                    break
            os.close(descriptor)

    _on_all_cores(work, jobs)


def write_memory(count: int) -> Tensor:
    """Write ``count`` fresh bytes of memory once, with all cores."""
    output = torch.empty(count, dtype=torch.uint8)

    def work(take: Callable[[], Any]) -> None:
        source = torch.zeros(CHUNK, dtype=torch.uint8)
        while (start := take()) is not None:
            piece = output[start : start + CHUNK]
            piece.copy_(source[: len(piece)])

    _on_all_cores(work, range(0, count, CHUNK))
    return output


def write_file(path: Path, count: int) -> None:
    """Write ``count`` bytes to a new file, space reserved, until they are on the disk."""
    data = os.urandom(CHUNK)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(descriptor, 0, count)

    def work(take: Callable[[], Any]) -> None:
        while (start := take()) is not None:
            os.pwrite(descriptor, data[: count - start], start)

    _on_all_cores(work, range(0, count, CHUNK))
    os.fsync(descriptor)
    os.close(descriptor)


def _on_all_cores(work: Callable[[Callable[[], Any]], None], jobs: Any) -> None:
    lock, waiting = threading.Lock(), iter(jobs)

    def take() -> Any:
        with lock:
            return next(waiting, None)

    threads = [threading.Thread(target=work, args=(take,)) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain_loop(models: list[Path]) -> dict[str, Tensor]:
    """Load one model after the other, add them up, divide: what one would write at first."""
    total: dict[str, Tensor] = {}
    for model in models:
        for file in weight_files([model]):
            for key, tensor in load_file(file).items():
                if key in total:
                    total[key] += tensor
                else:
                    total[key] = tensor.float()
    return {key: tensor.div_(len(models)) for key, tensor in total.items()}


def plain_loop_to_disk(models: list[Path], output: Path) -> None:
    """Do the same and save the result as the models are saved."""
    merged = {key: tensor.bfloat16() for key, tensor in plain_loop(models).items()}
    output.mkdir()
    save_file(merged, output / "model.safetensors", metadata={"format": "pt"})
    descriptor = os.open(output / "model.safetensors", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def vision_pool(models: list[Path]) -> CLIPVisionModelPool:
    """Return the pool of some vision models."""
    return CLIPVisionModelPool({f"m{i}": str(model) for i, model in enumerate(models)})


def average(pool: CLIPVisionModelPool | CausalLMPool) -> Any:
    """Return the lazily merged average of a pool."""
    return SimpleAverageAlgorithm(show_pbar=False).run(pool)


def write_average(models: list[Path], output: Path) -> None:
    """Merge to disk, without the recipe."""
    pool = CausalLMPool({f"m{i}": str(model) for i, model in enumerate(models)})
    with whole_directory(output) as directory:
        write_checkpoint(average(pool), directory)


def save_average(models: list[Path], output: Path) -> None:
    """Merge to disk as the command line does, with recipe, hashes, tokenizer files and card."""
    pool = CausalLMPool({f"m{i}": str(model) for i, model in enumerate(models)})
    pool.save_model(average(pool), output)


# --- the measuring --------------------------------------------------------------------------------


def in_memory_times(files: Files, peers: dict[str, str], rounds: int) -> dict[str, Any]:
    """Fuse eight vision encoders into memory."""
    models = files.vision
    fused: dict[str, Callable[[], Any]] = {
        "fusion_bench, weights": lambda: in_memory(average(vision_pool(models))),
        "fusion_bench, module": lambda: vision_pool(models).build_model(
            average(vision_pool(models))
        ),
        "plain loop": lambda: plain_loop(models),
    }
    expected = _named(plain_loop(models))
    for name in ("fusion_bench, weights", "fusion_bench, module"):
        same(name, _named(fused[name]()), "plain loop", expected)
    contestants: dict[str, Callable[[], object]] = {
        "floor: read all, write the output": lambda: (
            read_once(models),
            write_memory(size(models[:1])),
        ),
        **fused,
    }
    with _peer("fusionbench", peers, models) as peer:
        if peer:
            with tempfile.TemporaryDirectory() as place:
                peer.save(Path(place) / "merged.safetensors")
                made = load_file(Path(place) / "merged.safetensors")
            same("FusionBench, module", _named(made), "plain loop", expected)
            contestants["FusionBench, module"] = peer.merge
        times = alternate(contestants, rounds)
    return _figures(times, size(models))


def _named(made: Any) -> dict[str, Tensor]:
    """Return the entries of a module or of weights, under the names that transformers 5 has."""
    entries = made.state_dict() if isinstance(made, nn.Module) else made
    # Positions are numbers that transformers 4 kept in its modules.
    return {
        key.removeprefix("vision_model."): tensor
        for key, tensor in entries.items()
        if tensor.is_floating_point()
    }


def times_by_number(files: Files, rounds: int) -> dict[str, Any]:
    """Fuse 2 to 32 vision encoders into memory; the eight files are used several times."""
    contestants: dict[str, Callable[[], object]] = {}
    for number in (2, 4, 8, 16, 32):
        models = (files.vision * 4)[:number]
        contestants[f"{number} models"] = lambda models=models: in_memory(
            average(vision_pool(models))
        )
    times = alternate(contestants, rounds)
    return {
        name: {"seconds": round(statistics.median(seconds), 3)} for name, seconds in times.items()
    }


def to_disk_times(files: Files, peers: dict[str, str], rounds: int) -> dict[str, Any]:
    """Fuse four language models into files on the disk."""
    models, output = files.language, files.output
    fused: dict[str, Callable[[], object]] = {
        "fusion_bench, weights": lambda: write_average(models, output),
        "fusion_bench, with recipe": lambda: save_average(models, output),
        "plain loop": lambda: plain_loop_to_disk(models, output),
    }
    contestants: dict[str, Callable[[], object]] = {
        "write the output alone": lambda: write_file(output, size(models[:1])),
        "floor: read all, write the output": lambda: (
            read_once(models),
            write_file(output, size(models[:1])),
        ),
        "SHA-256 of all files on all cores": lambda: hash_once(models),
        **fused,
        "fusion_bench, with recipe, files not hashed yet": lambda: (
            _touch(models),
            save_average(models, output),
        ),
    }
    with _peer("mergekit", peers, models, output) as peer:
        if peer:
            contestants["mergekit"] = fused["mergekit"] = peer.merge
        results = {name: _written(work, output) for name, work in fused.items()}
        for name, made in results.items():
            same(name, made, "plain loop", results["plain loop"])
        del results
        times = alternate(contestants, rounds, before=lambda: _clear(output))
    _clear(output)
    return _figures(times, size(models))


def _written(work: Callable[[], object], output: Path) -> dict[str, Tensor]:
    """Return what a merge writes: entries that are mapped, of files that have no name any more."""
    _clear(output)
    work()
    made = {
        key: tensor for file in weight_files([output]) for key, tensor in load_file(file).items()
    }
    _clear(output)
    return made


def anonymous_memory(files: Files) -> dict[str, Any]:
    """Return by how many MB the memory that no file backs grows at most, output module aside."""
    cases = {
        "vision, 2 models": f"in_memory(average(vision_pool({_paths(files.vision[:2])})))",
        "vision, 32 models": f"in_memory(average(vision_pool({_paths(files.vision * 4)})))",
        "language, 4 models, to disk": (
            f"write_average({_paths(files.language)}, Path({str(files.output)!r}))"
        ),
    }
    peaks: dict[str, Any] = {}
    for name, statement in cases.items():
        _clear(files.output)
        code = (
            "from pathlib import Path; from measure import peak; from fuse import *; "
            f"print(peak(lambda: {statement}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        output = size(files.vision[:1]) if name.startswith("vision") else 0
        peaks[name] = {"MB": round((int(done.stdout.split()[-1]) - output) / 1e6)}
    _clear(files.output)
    return peaks


def _paths(models: list[Path]) -> str:
    return "[" + ", ".join(f"Path({str(model)!r})" for model in models) + "]"


def _figures(times: Times, bytes_read: int) -> dict[str, Any]:
    return {
        name: {
            **summary(seconds),
            "of the floor": ratio(times, name, "floor: read all, write the output"),
            "GB/s": round(bytes_read / 1e9 / statistics.median(seconds), 1),
        }
        for name, seconds in times.items()
    }


class Peer:
    """Another program's process, which merges once for each line that it is told."""

    def __init__(self, process: "subprocess.Popen[str]"):
        assert process.stdin and process.stdout
        self._to, self._from = process.stdin, process.stdout

    def merge(self) -> float:
        """Merge, and return the seconds that it took."""
        return self._told("merge")

    def save(self, file: Path) -> None:
        """Merge, and write what is in memory."""
        self._told(f"save {file}")

    def _told(self, what: str) -> float:
        self._to.write(f"{what}\n")
        self._to.flush()
        return float(self._from.readline())


@contextmanager
def _peer(
    name: str, peers: dict[str, str], models: list[Path], output: Path | None = None
) -> Iterator[Peer | None]:
    """Start another program's process, where one is wanted."""
    if name not in peers:
        yield None
        return
    script = Path(__file__).with_name("peers.py")
    places = [*map(str, models), *([str(output)] if output else [])]
    command = [peers[name], str(script), name, *places]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=models[0].parent
    ) as process:
        yield Peer(process)
        assert process.stdin
        process.stdin.close()


def _touch(models: list[Path]) -> None:
    """Make files look changed, so that their hashes are not known."""
    for file in weight_files(models):
        os.utime(file)


def _clear(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
