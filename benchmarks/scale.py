"""How cost grows with models, bytes, tasks and processes, beside a straight line.

    python benchmarks/scale.py                       # all tables: 24 GB of files, half an hour
    python benchmarks/scale.py --only plan models    # some of the tables
    python benchmarks/scale.py --small               # the same on tiny files, to try it out

Each merge is a command of its own, `fusion_bench merge …`, and so is each plan: its seconds are
those of the whole command, its memory the most anonymous memory that it has. A line is fitted to
the seconds of a table, and to its memory; the last row tells it, and how far the figure that is
furthest from it is away. Figures are the quickest of the rounds.

`plan`: dry runs of merges of models in the shape of Llama 3 70B: real headers, sparse files without
content. `models`: files that are linked to under several names. `bytes`: a model that has more
layers. `tasks`: one model evaluated on tasks that share nothing. `processes`: one model evaluated
on one task by several processes. Rows that the file of `--json` has are kept.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from evaluate import config, content, write_dataset, write_files
from measure import Record, own_cache, rounds_of, watched

SCRIPT = Path(sys.executable).with_name("fusion_bench")
PLANS = "plans of merges of models of 70 B parameters, {}"
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
#: Of about 100 MB a layer in bfloat16.
MEDIUM = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
#: So many bytes has a file of weights at most, as on the Hub.
SHARD = 5_000_000_000


def main() -> None:
    """Make the files, measure, write each row, print the tables."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    arguments = parser.parse_args()
    record = Record(arguments, None, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.workdir or Path(scratch)).absolute()
        bench = Bench(root, record, rounds_of(arguments, 2), small=arguments.small)
        with own_cache(root / "cache"):
            for name in arguments.only:
                SECTIONS[name](bench)
    record.show()


class Bench:
    """Where files are, and the rows that there are."""

    def __init__(self, root: Path, record: Record, rounds: int, *, small: bool):
        self.root, self.record, self.rounds, self.small = root, record, rounds, small

    def row(self, title: str, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless it is there."""
        if not self.record.has(title, name):
            self.record.row(title, name, measured())

    def line(self, title: str, points: Mapping[float, str], columns: tuple[str, ...]) -> None:
        """Add the line that lies next to some rows' figures, and how far the furthest is off."""
        rows, told = self.record.tables[title], {}
        if len(points) < 3:
            return
        for column in columns:
            told[column] = fitted({x: float(rows[name][column]) for x, name in points.items()})
        if rows.get(LINE) != told:
            rows.pop(LINE, None)
            self.record.row(title, LINE, told)

    def quickest(self, command: Callable[[], list[str]]) -> tuple[float, float]:
        """Return the fewest seconds of a command, and the most memory, in MB."""
        found = [timed(command()) for _ in range(self.rounds)]
        return min(seconds for seconds, _ in found), max(megabytes for _, megabytes in found)


LINE = "straight line: start + slope (furthest away)"


def fitted(points: Mapping[float, float]) -> str:
    """Return the line next to some points, and the largest distance from it in percent."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    # Each point counts as much as the others: distances are relative.
    slope, start = np.polyfit(x, y, 1, w=1 / np.maximum(y, 1e-9))
    off = np.abs(start + slope * x - y) / np.maximum(y, 1e-9)
    return f"{start:.3g} + {slope:.3g} each ({off.max():.0%})"


def timed(command: list[str]) -> tuple[float, float]:
    """Return a command's seconds and its peak of memory, in MB."""
    start = time.perf_counter()
    megabytes, _, _ = watched(command)
    return time.perf_counter() - start, megabytes


# --- models ---------------------------------------------------------------------------------------


def write_model(place: Path, shape: dict[str, int], *, empty: bool) -> None:
    """Write a Llama in bfloat16, unless it is there; an empty one has headers and holes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (place / "config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        module = LlamaForCausalLM._from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    groups: list[dict[str, dict[str, Any]]] = [{}]
    end = 0
    for key, own in shapes.items():
        size = 2 * torch.Size(own).numel()
        if end + size > SHARD and groups[-1]:
            groups.append({})
            end = 0
        groups[-1][key] = {"dtype": "BF16", "shape": own, "data_offsets": [end, end + size]}
        end += size
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(place / name, group, empty=empty)
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(place)


def _write_file(file: Path, entries: dict[str, dict[str, Any]], *, empty: bool) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    count = max(entry["data_offsets"][1] for entry in entries.values())
    with file.open("wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        if empty:
            output.truncate(8 + len(header) + count)
            return
        noise = (0.02 * torch.randn(2**23, generator=torch.Generator().manual_seed(0))).bfloat16()
        content = memoryview(noise.view(torch.uint8).numpy())  # repeated, to be quick
        for start in range(0, count, len(content)):
            output.write(content[: count - start])


def linked(model: Path, names: list[str]) -> list[Path]:
    """Return folders that have the same files."""
    places = [model.with_name(f"{model.name}_{name}") for name in names]
    for place in places:
        place.mkdir(exist_ok=True)
        for file in model.iterdir():
            if not (place / file.name).exists():
                os.link(file, place / file.name)
    return places


def merging(models: list[Path], base: Path, method: str, output: Path) -> list[str]:
    """Return the command that merges models."""
    words = [str(SCRIPT), "merge", *map(str, models), "--out", str(output), "--overwrite"]
    based = [] if method == "simple_average" else ["--base", str(base)]
    return [*words, "--method", method, *based]


# --- the tables -----------------------------------------------------------------------------------


def plans(bench: Bench) -> None:
    """Plan merges of models that no disk here has room for."""
    shape = {**TINY, "num_hidden_layers": 80} if bench.small else LLAMA_70B
    base = bench.root / "llama-70b"
    write_model(base, shape, empty=True)
    experts = linked(base, [f"m{number}" for number in range(16)])
    counts = (2,) if bench.small else (2, 4, 8, 16)
    for method in ("simple_average", "ties_merging"):
        title = PLANS.format(method)
        for count in counts:
            command = merging(experts[:count], base, method, bench.root / "never")
            bench.row(title, f"{count} models", partial(plan, command, bench.rounds))
        names = {count: f"{count} models" for count in counts}
        bench.line(title, names, ("CPU seconds", "MB of the plan"))


def plan(command: list[str], rounds: int) -> dict[str, Any]:
    """Return what a dry run takes and what it tells.

    Where the disk has no room for the merged model, it tells that last and ends with an error.
    """
    found, told = [], ""
    for _ in range(rounds):
        start = time.perf_counter()
        megabytes, worked, told = watched([*command, "--dry-run"], accepts=(0, 2))
        found.append((time.perf_counter() - start, worked, megabytes))
    problems = [line for line in told.splitlines() if line.startswith("fusion_bench:")]
    if any("the disk has" not in line for line in problems):
        raise SystemExit("\n".join(problems))
    sizes = {
        verb: match[1]
        for verb in ("read", "hold", "write")
        if (match := re.search(rf"^ *{verb} .*? ([\d.]+ [kMGT]?B)\b", told, re.MULTILINE))
    }
    return {
        "seconds": round(min(seconds for seconds, _, _ in found), 1),
        "CPU seconds": round(min(worked for _, worked, _ in found), 1),
        "MB of the plan": round(max(megabytes for _, _, megabytes in found)),
        "it reads": sizes["read"],
        "it writes": sizes["write"],
        "it holds": sizes["hold"],
        "at least, at 1 GB/s": f"{(nbytes(sizes['read']) + nbytes(sizes['write'])) / 6e10:.0f} min",
    }


def nbytes(size: str) -> float:
    """Return the bytes of a size in words."""
    number, unit = size.split()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}.get(unit, 1)


def models(bench: Bench) -> None:
    """Merge more and more models."""
    layers = 2 if bench.small else 4
    model = bench.root / f"layers-{layers}"
    write_model(
        model, {**(TINY if bench.small else MEDIUM), "num_hidden_layers": layers}, empty=False
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    counts = (2,) if bench.small else (2, 4, 8, 16, 32)
    files = linked(model, [f"m{number}" for number in range(counts[-1])])
    for method in ("simple_average", "ties_merging"):
        title = f"models of {size / 1e9:.1f} GB, {method}"
        for count in counts:
            command = merging(files[:count], model, method, bench.root / "merged")
            bench.row(title, str(count), partial(merge_row, bench, command, count * size))
        bench.line(title, {count: str(count) for count in counts}, ("seconds", "MB"))


def sizes(bench: Bench) -> None:
    """Merge four models of more and more bytes."""
    shape = TINY if bench.small else MEDIUM
    for method in ("simple_average", "ties_merging"):
        title, points = f"four models, {method}", {}
        for layers in (1,) if bench.small else (1, 4, 16, 38, 77):
            model = bench.root / f"layers-{layers}"
            write_model(model, {**shape, "num_hidden_layers": layers}, empty=False)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            files = linked(model, [f"m{number}" for number in range(4)])
            name = points[size / 1e9] = f"{size / 1e9:.1f} GB each"
            command = merging(files, model, method, bench.root / "merged")
            bench.row(title, name, partial(merge_row, bench, command, 4 * size))
        bench.line(title, points, ("seconds", "MB"))


def merge_row(bench: Bench, command: list[str], count: int) -> dict[str, Any]:
    """Return the figures of a merge that reads so many bytes."""
    seconds, megabytes = bench.quickest(lambda: command)
    shutil.rmtree(bench.root / "merged")
    return {
        "seconds": round(seconds, 1),
        "MB": round(megabytes),
        "GB/s of the inputs": round(count / 1e9 / seconds, 2),
    }


def tasks(bench: Bench) -> None:
    """Evaluate one model on more and more tasks."""
    counts = (1, 2) if bench.small else (1, 2, 5, 10, 20)
    title = "tasks, evaluated by a command"
    for count in counts:
        bench.row(title, str(count), partial(evaluation, bench, count))
    if not bench.small:
        bench.line(title, {count: str(count) for count in counts}, ("seconds", "MB"))


def processes(bench: Bench) -> None:
    """Evaluate one model by more and more processes, each with one thread."""
    tasks = 1 if bench.small else 5
    title = f"processes that share an evaluation of {tasks} tasks"
    for count in (1,) if bench.small else (1, 2, 4):
        words = f"fabric.devices={count}"
        bench.row(title, str(count), partial(evaluation, bench, tasks, words))


def evaluation(bench: Bench, count: int, *words: str) -> dict[str, Any]:
    """Return the figures of an evaluation of one model on so many tasks."""
    root, images = bench.root / "evaluation", 4 if bench.small else 64
    write_files(root, images, small=bench.small)
    own = content(root, "SimpleAverageAlgorithm")
    own |= {"method": None, "baselines": "all_tasks"}
    own["fabric"] = {"_target_": "lightning.Fabric", "accelerator": "cpu", "devices": 1}
    own["modelpool"]["models"] = {"one": str(root / "one")}
    own["taskpool"]["test_datasets"] = {}
    for number in range(count):
        place = root / "tasks" / f"t{number}-{images}"
        write_dataset(place, images, seed=number)
        node = {"_target_": "datasets.load_dataset", "path": str(place), "split": "test"}
        own["taskpool"]["test_datasets"][f"t{number}"] = node
    with tempfile.TemporaryDirectory() as folder:
        command = [str(SCRIPT), *config(own, Path(folder)), *words]
        command.append(f"hydra.run.dir={folder}/run")
        with own_cache(Path(folder) / "cache"):
            seconds, megabytes = timed(command)
    return {
        "seconds": round(seconds, 1),
        "MB": round(megabytes),
        "images a second": round(count * images / seconds, 1),
    }


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "plan": plans,
    "models": models,
    "bytes": sizes,
    "tasks": tasks,
    "processes": processes,
}

if __name__ == "__main__":
    main()
