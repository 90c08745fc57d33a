"""Every benchmark runs to its end on small files, and says what made its tables."""

import json
import os
import re
from pathlib import Path

import pytest
from commandline import python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: What is asked of each that has an end of its own; the smallest that goes through all its parts.
COMMANDS = {
    "bootstrap.py": ["--small"],
    "device.py": ["--small", "--methods", "simple_average", "fisher_merging/clip_fisher_merging"],
    "doors.py": ["--small"],
    "evaluate.py": ["--small"],
    "fuse.py": ["--small"],
    "language.py": ["--small"],
    "memory.py": ["--small", "--kinds=deep", "--models=2", "--only", "linear/expo", "dare/no_such"],
    "methods.py": ["cost", "--small", "--only", "simple_average", "arcee_fusion"],
    "recipes.py": ["--small", "--only", "linear"],
    "scale.py": ["--small", "--only", "plan", "models", "tasks"],
    "sweep.py": ["--small"],
    "threads.py": ["--small"],
}
#: What others call.
PARTS = {"limits.py", "measure.py", "peers.py", "recipe_peers.py"}
#: What needs the embedded models, which take minutes to build.
UNTRIED = {"race.py"}
#: Runs a benchmark; the processes that it starts are forked from the warm one too.
RUN = (Path(__file__).with_name("forked.py")).read_text()


def benchmark(place: Path, name: str, *words: str) -> str:
    """Run a benchmark in a folder of its own; return what it wrote as Markdown."""
    to = [f"--json={place / 'figures.json'}", f"--markdown={place / 'tables.md'}"]
    done = python(
        RUN,
        str(BENCHMARKS),
        str(Path(__file__).parents[1]),
        str(BENCHMARKS / name),
        *words,
        *to,
        cwd=place,
        env=os.environ | {"FUSION_BENCH_CACHE": str(place / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return (place / "tables.md").read_text()


def test_each_benchmark_is_tried() -> None:
    assert {file.name for file in BENCHMARKS.glob("*.py")} == COMMANDS.keys() | PARTS | UNTRIED


@pytest.mark.parametrize("name", COMMANDS)
def test_small_benchmarks_run_to_their_end(name: str, tmp_path: Path) -> None:
    told = benchmark(tmp_path, name, *COMMANDS[name])
    assert re.match(rf"Measured by `python benchmarks/{name} .*` at (commit|version)", told), told
    tables = json.loads((tmp_path / "figures.json").read_text())
    assert any(isinstance(table, dict) and table for table in tables.values())
