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
    "memory.py": "--small --kinds deep --models 2 --only simple_average expert_merging".split(),
    "methods.py": "cost --small --only simple_average arcee_fusion".split(),
    "recipes.py": ["--small", "--only", "linear"],
    "sweep.py": ["--small"],
    "threads.py": ["--small"],
}
#: What others call.
PARTS = {"measure.py", "peers.py", "recipe_peers.py"}
#: Runs a benchmark; the processes that it starts are forked from the warm one too.
RUN = """
import os, runpy, subprocess, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], sys.argv[2]]
import commandline

real = subprocess.run

def run(words, *, cwd=None, env=None, check=False, **others):
    program, *rest = map(str, words)
    cwd, env = Path(cwd or "."), dict(env or os.environ)
    if program == str(commandline.SCRIPT):
        done = commandline.fusion_bench(*rest, cwd=cwd.absolute(), env=env)
    elif program == sys.executable and "-c" in rest:
        code, *arguments = rest[rest.index("-c") + 1 :]
        done = commandline.python(code, *arguments, cwd=cwd.absolute(), env=env)
    elif program == sys.executable and rest[:2] == ["-m", "fusion_bench"]:
        done = commandline.fusion_bench(*rest[2:], cwd=cwd.absolute(), env=env)
    elif program == sys.executable:
        code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
        done = commandline.python(code.format(sys.path[0]), *rest, cwd=cwd.absolute(), env=env)
    else:
        return real(words, cwd=cwd, env=env, check=check, **others)
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done

subprocess.run = run
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    assert {file.name for file in BENCHMARKS.glob("*.py")} == COMMANDS.keys() | PARTS


@pytest.mark.parametrize("name", COMMANDS)
def test_small_benchmarks_run_to_their_end(name: str, tmp_path: Path) -> None:
    told = benchmark(tmp_path, name, *COMMANDS[name])
    assert re.match(rf"Measured by `python benchmarks/{name} .*` at (commit|version)", told), told
    tables = json.loads((tmp_path / "figures.json").read_text())
    assert any(isinstance(table, dict) and table for table in tables.values())
