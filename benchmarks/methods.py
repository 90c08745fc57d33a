"""What each method costs, and what it is worth on the embedded models.

    python benchmarks/methods.py cost                # every method without data, on ViT-B/32 sizes
    python benchmarks/methods.py cost --only ties_merging dare/task_arithmetic
    python benchmarks/methods.py limits              # those of matrices, beside what they must do
    python benchmarks/methods.py zoo                 # every method with its defaults, evaluated
    python benchmarks/methods.py language            # likewise, on the tiny language models

`cost` makes nine checkpoints on the spot, a base and eight models that differ from it by noise.
Quick methods take turns with the simple average, so that a busy moment meets both alike; a method
that takes long runs once. Memory is measured in a process of its own. Of some methods the table
tells what no way of computing them saves, such as to sort the rows, besides what the average takes:
those seconds are of one piece alone, times all pieces of eight models, shared by all cores.
`limits` compares methods that factorise matrices with the decompositions in their formulas alone
(`limits.py`). `zoo` and `language` run the program as `fusion_bench method=…` does, with the seed
0. Rows that the file of `--json` has are kept: a run that was stopped goes on, and one without the
file begins anew. A method whose defaults do not suit the models, weights for two models for one, is
left out and named.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from limits import FORMULAS, alone_seconds, processed
from measure import Record, alternate, peak, ratio, rounds_of, summary
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fusion_bench.configs import CONFIG_DIR, composed
from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.progress import quiet_libraries
from fusion_bench.report import comparison
from fusion_bench.report.figures import shown, with_stderr
from fusion_bench.weights import Weights, in_memory

AVERAGE = "simple_average"
LIMITS = "CPU seconds for eight ViT-B/32 encoders"
COSTS = "eight ViT-B/32 encoders into memory"
#: What is evaluated: the title of its table, and what the command line has for it.
WORTH: dict[str, tuple[str, tuple[str, ...]]] = {
    "zoo": ("on the embedded models", ()),
    "language": (
        "on the tiny language models, exact match",
        ("modelpool=CausalLMPool/zoo", "taskpool=CausalLMEvaluation/zoo"),
    ),
}
#: Those that want two models only.
TWO_MODELS = {"linear/linear_interpolation", "slerp/slerp", "slerp/nuslerp"}
#: Seconds beyond which a method runs once.
LONG = 20.0
DRAW = np.random.Generator(np.random.SFC64(0))
#: What a method must do with each element of each model: a piece's magnitudes in rows are given.
#: PCB's scores are not stored, for they would take as much as 44 models: they are computed for
#: their sums, for the search and for the merge, of 36 pairs and eight models each time.
MUST: dict[str, tuple[str, float, Callable[[NDArray[np.float32]], object]]] = {
    "della/della": (
        "sort rows, draw",
        1,
        lambda rows: (np.sort(rows, axis=1), DRAW.random(rows.size, np.float32)),
    ),
    "dare/task_arithmetic": ("draw", 1, lambda rows: DRAW.bytes(rows.size)),
    "dare/simple_average": ("draw", 1, lambda rows: DRAW.bytes(rows.size)),
    "dare/ties_merging": ("draw", 1, lambda rows: DRAW.bytes(rows.size)),
    "pcb_merging/pcb_merging": (
        "exponentials",
        3 * 44 / 8,
        lambda rows: torch.from_numpy(rows).exp2(),
    ),
}


def main() -> None:
    """Measure what is asked for, print the table and write it."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("what", choices=["cost", "limits", *WORTH, "alone"])
    parser.add_argument("--only", nargs="+", help="methods, as in method=…")
    parser.add_argument("--without", nargs="+", default=[], help="methods to leave out")
    arguments = parser.parse_args()
    quiet_libraries()
    every = list(FORMULAS) if arguments.what == "limits" else methods()
    names = [name for name in arguments.only or every if name not in arguments.without]
    if arguments.what == "alone":  # a child of `cost`
        print(json.dumps(observed(names[0], arguments.workdir)))
        return
    record = Record(arguments)
    if arguments.what in ("cost", "limits"):
        with tempfile.TemporaryDirectory() as scratch:
            root = arguments.workdir or Path(scratch)
            write_models(root, small=arguments.small)
            if arguments.what == "cost":
                cost(names, root, record, rounds_of(arguments, 3))
            else:
                limits(names, root, record)
    else:
        worth(names, record, *WORTH[arguments.what])
    record.show()


def methods() -> list[str]:
    """Return the names of all methods, as in ``method=…``."""
    root = Path(CONFIG_DIR) / "method"
    files = sorted(root.rglob("*.yaml"))
    return [str(f.relative_to(root).with_suffix("")) for f in files if f.name[0] != "_"]


def method_of(name: str) -> Any:
    """Return a method with its default settings."""
    return instantiate(composed(f"method={name}")["method"], "method")


# --- what it costs --------------------------------------------------------------------------------


def write_models(root: Path, *, small: bool) -> None:
    """Write a base and eight models, unless they are there."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tiny |= {"num_hidden_layers": 2}
    config = CLIPVisionConfig(patch_size=32, **(tiny if small else {}))
    if (root / "m7" / "config.json").exists():
        return
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(root / "base")
    base = load_file(root / "base" / "model.safetensors")
    for number in range(8):
        place = root / f"m{number}"
        place.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        model = {
            key: value + 1e-3 * torch.randn(value.shape, generator=generator)
            for key, value in base.items()
        }
        save_file(model, place / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(place)


def pool(root: Path, models: int = 8) -> CLIPVisionModelPool:
    """Return the models as a pool."""
    names = ["_pretrained_", *(f"m{number}" for number in range(models))]
    return CLIPVisionModelPool(
        {name: str(root / name.replace("_pretrained_", "base")) for name in names}
    )


def observed(name: str, root: Path) -> dict[str, Any]:
    """Merge the models once, and tell what that took and how many models came out."""
    made: list[int] = []
    start = time.perf_counter()
    most = peak(lambda: made.append(fuse(name, root)))
    return {"seconds": time.perf_counter() - start, "bytes": most, "models": made[0]}


def fuse(name: str, root: Path) -> int:
    """Merge the models into memory, one at a time; returns how many came out."""
    models = pool(root, models=1 if name in TWO_MODELS else 8)
    result = method_of(name).run(models)
    family = {"": result} if isinstance(result, Weights) else result
    for weights in family.values():
        if isinstance(weights, Weights):
            in_memory(weights)
    return len(family)


def cost(names: list[str], root: Path, record: Record, rounds: int) -> None:
    """Add each method's seconds, beside those of the simple average, and its memory."""
    for name in names:
        method = method_of(name)
        if record.has(COSTS, name) or method.needs.split or "ensemble/" in name:
            continue
        once = alone(name, root)
        if once is None:
            continue
        contestants = {AVERAGE: lambda: fuse(AVERAGE, root)}
        if once["seconds"] < LONG and name != AVERAGE:
            contestants[name] = lambda name=name: fuse(name, root)
        times = alternate(contestants, rounds)
        if name not in times:
            times[name] = [once["seconds"]] * rounds
        figures = {
            "seconds": summary(times[name])["seconds"],
            "times the average": ratio(times, name, AVERAGE),
            "peak MB": round(once["bytes"] / 1e6),
            "models": once["models"],
        }
        if name in MUST:
            what, alone_s = needed(name, root)
            floor = summary(times[AVERAGE])["seconds"] + alone_s
            figures |= {"must": what, "must, s": round(alone_s, 2)}
            figures["of average and must"] = round(figures["seconds"] / floor, 2)
        record.row(COSTS, name, figures)


def needed(name: str, root: Path) -> tuple[str, float]:
    """Return what a method must do, and the seconds that it takes alone, on all cores."""
    what, times, work = MUST[name]
    rows = np.abs(np.random.default_rng(0).standard_normal((341, 768), np.float32))
    fastest = min(processed(lambda: work(rows)) for _ in range(9))
    elements = sum(
        tensor.numel() for tensor in load_file(root / "m0" / "model.safetensors").values()
    )
    return what, fastest * times * 8 * elements / rows.size / (os.cpu_count() or 1)


def alone(name: str, root: Path) -> dict[str, Any] | None:
    """Return what a process of its own needs: seconds, and the peak of anonymous memory.

    The merged models are in that peak. ``None``, with a word, where the method is left out.
    """
    command = [sys.executable, __file__, "alone", "--only", name, "--workdir", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def limits(names: list[str], root: Path, record: Record) -> None:
    """Add what methods take beside what is in their formulas, in seconds of all cores."""
    base = load_file(root / "base" / "model.safetensors")
    shapes = [tuple(tensor.shape) for tensor in base.values() if tensor.ndim == 2]
    for name in names:
        if record.has(LIMITS, name):
            continue
        method = processed(lambda name=name: fuse(name, root))
        row = {"method": round(method, 1)}
        for what, seconds in alone_seconds(FORMULAS[name], shapes, models=8).items():
            row |= {what: round(seconds, 1), f"times {what}": round(method / seconds, 2)}
        record.row(LIMITS, name, row)


# --- what it is worth -----------------------------------------------------------------------------


def worth(names: list[str], record: Record, title: str, overrides: tuple[str, ...]) -> None:
    """Add each method's values on the embedded models; the best are the first in the end."""
    for name in names:
        if name in TWO_MODELS or record.has(title, name):
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                config = composed(f"method={name}", "seed=0", *overrides)
                report = instantiate(config, output_dir=place).run()
            except FusionBenchError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        table = comparison(report)
        for row in table[:2]:  # the pretrained model and the individual ones
            if not record.has(title, f"({row.name})"):
                record.row(title, f"({row.name})", _figures(row, report))
        record.row(title, name, _figures(table[-1], report))
    rows = record.tables.get(title, {})
    best = sorted(rows.items(), key=lambda row: -float(row[1]["average"].split()[0]))
    record.tables[title] = dict(best)


def _figures(row: Any, report: Any) -> dict[str, Any]:
    cells = {task: shown(found.value) for task, found in zip(report.tasks, row.cells, strict=True)}
    average = with_stderr(row.average.value, row.average.stderr)
    return {**cells, "average": average, "normalised": shown(row.normalized)}


if __name__ == "__main__":
    main()
