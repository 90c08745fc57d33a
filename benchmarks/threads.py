"""Whether the embedded models depend on the machine's threads, and how far on its rounding.

    python benchmarks/threads.py               # seven builds: half an hour on two cores
    python benchmarks/threads.py --threads 1 8
    python benchmarks/threads.py --small       # two builds of few images and steps, to try it out

Each build has a process and a cache of its own, and the rows of the `zoo` reference are found with
it. The first table is of one arithmetic and several numbers of threads: all must be equal. For the
second, the arithmetic is changed as another processor would: sums are cut into other parts, or
taken with other instructions. From it comes the reference's tolerance.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from measure import Record

#: Builds, finds the figures and prints them with a hash of all weights.
CHILD = """
import hashlib, json, sys
from pathlib import Path
import torch
from fusion_bench import threads, zoo
from fusion_bench.problems import ResultError
from fusion_bench.programs import ReproduceProgram

mine, threads._FEW = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(mine)
models = zoo.model_path("clip-tiny").parent
weights = hashlib.sha256()
for file in sorted(models.glob("*/model.safetensors")):
    weights.update(file.read_bytes())
try:
    ReproduceProgram("zoo", seed=0, output_dir="result").run()
except ResultError:
    pass
found = json.loads(Path("result/reproduce.json").read_text())["figures"]
print(json.dumps({"sha256": weights.hexdigest(), "figures": found}))
"""

#: Makes models in a few steps from the images of one task; nothing is evaluated.
SMALL_CHILD = """
import hashlib, json, sys
import torch
from fusion_bench import zoo
from fusion_bench.zoo import build
from fusion_bench.zoo.recipe import Recipe

torch.set_num_threads(int(sys.argv[1]))
faces = build.make("faces")
build.make = lambda task: faces
build.TASKS = ["faces"]
few = Recipe(
    width=32, layers=1, pretrain_steps=2, pretrain_batch=16, finetune_steps=1, finetune_batch=8
)
models = zoo.model_path("clip-tiny", few).parent
weights = hashlib.sha256()
for file in sorted(models.glob("*/model.safetensors")):
    weights.update(file.read_bytes())
print(json.dumps({"sha256": weights.hexdigest(), "figures": []}))
"""

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
#: Name to the parts that sums are cut into, and the environment.
ROUNDINGS: dict[str, tuple[int, dict[str, str]]] = {
    "sums in one part": (1, {}),
    "sums in three parts": (3, {}),
    "AVX2": (2, AVX2),
}


def main() -> None:
    """Build, compare, print the tables."""
    parser = measure.parser(__doc__, rounds=False)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3, 8])
    parser.add_argument("--roundings", nargs="*", choices=ROUNDINGS, default=list(ROUNDINGS))
    parser.add_argument("--work", type=Path, help="where builds are kept, and found again")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.threads, arguments.roundings = [1, 2], []
    record = Record(arguments)
    code = SMALL_CHILD if arguments.small else CHILD
    same: dict[str, Any] = {}
    other: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.work or Path(scratch)).absolute()
        for count in arguments.threads:
            found = same[str(count)] = built(code, root / f"threads-{count}", count, 2, {})
            record.row("threads", str(count), line(found))
        for name in arguments.roundings:
            place = root / name.replace(" ", "-")
            found = other[name] = built(code, place, 2, *ROUNDINGS[name])
            record.row("rounding", name, line(found))
    if other:
        every = {"threads of the first table": next(iter(same.values()))} | other
        for name, row in spread(every).items():
            record.row("row", name, row)
    record.show()
    if len({found["sha256"] for found in same.values()}) > 1:
        sys.exit("The models depend on the number of threads.")


def built(code: str, directory: Path, threads: int, parts: int, environment: dict[str, str]) -> Any:
    """Return the weights' hash and the figures of a build in a process of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(threads), str(parts)],
        cwd=directory,
        env={
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": str(threads),
            "FUSION_BENCH_CACHE": str(directory / "cache"),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(f"{directory.name}: done", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def line(found: Any) -> dict[str, str | float]:
    """Return a row of a table: the weights' hash, the means over the tasks, how far all is off."""
    averages = {f["row"]: f["found"] for f in found["figures"] if f["column"] == "average"}
    off = [round(f["found"] - f["published"], 1) for f in found["figures"]]
    return {
        "sha256 of the weights": found["sha256"][:12],
        **{row: round(value, 1) for row, value in averages.items()},
        "largest difference": max(map(abs, off), default="–"),
    }


def spread(every: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return by row how far two builds lie apart at most: on a task, and on the mean."""
    values: dict[tuple[str, str], list[float]] = {}
    for found in every.values():
        for figure in found["figures"]:
            values.setdefault((figure["row"], figure["column"]), []).append(figure["found"])
    apart = {place: max(found) - min(found) for place, found in values.items()}
    return {
        row: {
            "a task, largest": round(
                max(
                    value
                    for (own, column), value in apart.items()
                    if own == row and column != "average"
                ),
                1,
            ),
            "mean over the tasks": round(apart[row, "average"], 1),
        }
        for row in dict.fromkeys(row for row, _ in apart)
    }


if __name__ == "__main__":
    main()
