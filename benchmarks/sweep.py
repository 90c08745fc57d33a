"""What a sweep costs beside its forward passes.

    python benchmarks/sweep.py            # a minute a round on two cores
    python benchmarks/sweep.py --small    # two coefficients on tiny files, to try it out

Task arithmetic with many coefficients over the zoo's tasks, in one process. Prepared images are
there; results are not, so that every round evaluates all models anew. All is measured in one run,
one round after the other; ratios are of one round. Before times are taken, the sweep's accuracies
are compared with those of the bare forward passes.
"""

import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from evaluate import config, content, write_files
from lightning.fabric import Fabric
from measure import Record, alternate, prepared, ratio, rounds_of
from torch import Tensor

from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.programs.fusing import fuse, materialize
from fusion_bench.progress import quiet_libraries
from fusion_bench.storage import cache_dir

#: Runs the command line once all that it imports is there, and tells how long that took.
AFTER_IMPORTS = textwrap.dedent(
    """
    import sys, time
    import fusion_bench.programs, fusion_bench.modelpool, fusion_bench.taskpool
    import transformers, datasets
    from fusion_bench.scripts.cli import main
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel
    start = time.perf_counter()
    try:
        main()
    finally:  # it ends with an exit code
        print(time.perf_counter() - start, file=sys.stderr)
    """
)


def main() -> None:
    """Measure, print the tables."""
    parser = measure.parser(__doc__)
    parser.add_argument("--profile", action="store_true", help="show where the sweep's time goes")
    arguments = parser.parse_args()
    rounds = rounds_of(arguments, 3)
    record = Record(arguments, rounds)
    count = 2 if arguments.small else 20
    values = [round(0.02 * (number + 1), 2) for number in range(count)]
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        words = ["-m", f"method.scaling_factor={','.join(map(str, values))}"]
        if arguments.small:
            os.environ["FUSION_BENCH_CACHE"] = str(root / "cache")
            write_files(root, 4, small=True)
            own = content(root, "TaskArithmeticAlgorithm")
            own["method"]["scaling_factor"] = 0.3  # what is swept is in the file
            words = [*config(own, root), *words]
        else:
            own = composed()
            words.insert(1, "method=task_arithmetic")
        if arguments.profile:
            profile(words, root)
            return
        record.table(f"{count} coefficients", lambda: sweep(words, values, own, root, rounds))
        if not arguments.small:
            record.table("jobs side by side", lambda: side_by_side(words, root, rounds))
    record.show()


def parts(own: dict[str, Any]) -> tuple[Any, Any, Fabric]:
    """Return the pools of a config, prepared, as the command has them."""
    fabric = Fabric(accelerator="auto", devices=1)
    modelpool = instantiate({"_recursive_": False, **own["modelpool"]})
    taskpool = instantiate({"_recursive_": False, **own["taskpool"]})
    taskpool.prepare(fabric)
    return modelpool, taskpool, fabric


def sweep(
    words: list[str], values: list[float], own: dict[str, Any], root: Path, rounds: int
) -> dict[str, Any]:
    """Time the sweep, and the forward passes that it makes."""
    from fusion_bench.method import TaskArithmeticAlgorithm

    modelpool, taskpool, fabric = parts(own)
    inputs = {}
    for task in taskpool.task_names:
        images = prepared(taskpool.tasks[task])
        pixels = np.stack([images.pixels(i) for i in range(len(images.data.labels))])
        ready = images.preprocessor.finish(torch.from_numpy(pixels).to(fabric.device))
        inputs[task] = fabric.strategy.precision.convert_input(ready)
    batch = 32 if fabric.device.type == "cpu" else 128

    def passes(model: Any, tasks: list[str]) -> None:
        model = fabric.to_device(model.eval())
        for task in tasks:
            classify = taskpool.tasks[task].classifier(model, "model", fabric)
            for part in inputs[task].split(batch):
                result = classify(part)
        result.sum().item()

    @torch.inference_mode()
    def right(model: Any) -> dict[str, int]:
        model = fabric.to_device(model.eval())
        found = {}
        for task in taskpool.task_names:
            classify = taskpool.tasks[task].classifier(model, "model", fabric)
            answers = torch.cat([classify(part).argmax(-1) for part in inputs[task].split(batch)])
            labels = prepared(taskpool.tasks[task]).data.labels
            found[task] = int((answers.cpu().numpy() == np.asarray(labels)).sum())
        return found

    methods = [TaskArithmeticAlgorithm(scaling_factor=value) for value in values]
    merged = [materialize(fuse(method, modelpool, fabric, None))["merged"] for method in methods]
    models = [(modelpool.build_model(weights), taskpool.task_names) for weights in merged]
    models.append((modelpool.load_model("_pretrained_"), taskpool.task_names))
    models += [(modelpool.load_model(name), [name]) for name in modelpool.model_names]

    command(words, root)
    compare(root, [right(model) for model, _ in models[: len(values)]], inputs)

    def forward() -> None:
        with torch.inference_mode():
            for model, tasks in models:
                passes(model, tasks)

    contestants = {
        "(a) its bare forward passes": forward,
        "(b) the sweep": lambda: after_imports(words, root),
        "(c) the whole command": lambda: command(words, root),
        "(d) the same, started again": lambda: command(words, root, again=True),
    }
    times = alternate(contestants, rounds)
    first = next(iter(contestants))
    return {
        name: {
            "seconds": round(float(np.median(seconds)), 2),
            "of the forward passes": ratio(times, name, first),
        }
        for name, seconds in times.items()
    }


def compare(root: Path, right: list[dict[str, int]], inputs: dict[str, Tensor]) -> None:
    """Refuse to compare times where the sweep's accuracies are others than the bare passes'."""
    files = sorted(root.glob("multirun/**/report.json"), key=coefficient)
    if len(files) != len(right):
        raise SystemExit(f"The sweep left {len(files)} reports of {len(right)} coefficients.")
    for file, expected in zip(files, right, strict=True):
        tasks = json.loads(file.read_text())["models"]["merged"]["tasks"]
        for task, count in expected.items():
            found = round(tasks[task]["metrics"]["accuracy"]["value"] * len(inputs[task]))
            if found != count:
                raise SystemExit(
                    f"{file.parent.name}: the sweep has {found} right answers on '{task}', the "
                    f"bare passes {count}. Their times are not compared."
                )


def coefficient(report: Path) -> float:
    """Return the coefficient of a job, after which its folder is named."""
    return float(report.parent.name.rpartition("=")[2])


def after_imports(words: list[str], root: Path) -> float:
    """Return the seconds of a sweep in a process that has imported everything."""
    _forget(root)
    done = subprocess.run(
        [sys.executable, "-c", AFTER_IMPORTS, *words],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stderr.splitlines()[-1])


def command(words: list[str], root: Path, *, again: bool = False) -> None:
    """Run the sweep from the command line."""
    if not again:
        _forget(root)
    run = [sys.executable, "-m", "fusion_bench", *words]
    subprocess.run(run, cwd=root, check=True, capture_output=True)


def side_by_side(words: list[str], root: Path, rounds: int) -> dict[str, Any]:
    """Time the sweep with one and with two jobs at once."""
    contestants = {
        f"joblib, {count} at once": lambda count=count: command(
            [*words, "hydra/launcher=joblib", f"hydra.launcher.n_jobs={count}"], root
        )
        for count in (1, 2)
    }
    times = alternate(contestants, rounds)
    first = next(iter(contestants))
    return {
        name: {
            "seconds": round(float(np.median(seconds)), 2),
            "of one at once": ratio(times, name, first),
        }
        for name, seconds in times.items()
    }


def profile(words: list[str], root: Path) -> None:
    """Print where the sweep's time goes, function by function."""
    from fusion_bench.scripts import cli

    for _ in range(2):  # the second time everything is imported
        _forget(root)
        os.chdir(root)
        sys.argv = ["fusion_bench", *words]
        measured = cProfile.Profile()
        start = time.perf_counter()
        measured.runcall(cli.main)
    print(f"{time.perf_counter() - start:.1f} s, profiled")
    pstats.Stats(measured).sort_stats("cumtime").print_stats(150)


def _forget(root: Path) -> None:
    """Remove what earlier rounds have evaluated."""
    for kept in ("results", "scores"):
        shutil.rmtree(cache_dir() / kept, ignore_errors=True)
    shutil.rmtree(root / "multirun", ignore_errors=True)


if __name__ == "__main__":
    main()
