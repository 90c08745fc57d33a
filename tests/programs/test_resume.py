"""A run that was killed goes on where it stopped."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from commandline import python

from fusion_bench.instantiate import instantiate
from fusion_bench.report import Report
from fusion_bench.storage import cache_dir
from fusion_bench.taskpool.images import task as base

#: Runs a config, and kills itself once a method was called so many times.
DRIVER = """
import json, os, signal, sys
from importlib import import_module
from fusion_bench.instantiate import instantiate

module, name, method, times = sys.argv[2:]
kind = getattr(import_module(module), name)
original, calls = getattr(kind, method), []

def counted(*args):
    result = original(*args)
    calls.append(1)
    if len(calls) == int(times):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(kind, method, counted)
instantiate(json.loads(sys.argv[1])).run()
"""
SAVE = ("fusion_bench.results.store", "ResultStore", "save")
PUT = ("fusion_bench.taskpool.images.pixels", "PixelStore", "put")


def run(config: dict[str, Any]) -> Report:
    report = instantiate(config).run()
    assert isinstance(report, Report)
    return report


def kill(config: dict[str, Any], place: tuple[str, str, str], times: int) -> None:
    done = python(DRIVER, json.dumps(config), *place, str(times))
    assert done.returncode == -signal.SIGKILL


def num_kept() -> int:
    return sum(file.is_file() for file in (cache_dir() / "scores").rglob("*"))


@pytest.mark.parametrize(
    ("place", "times", "done"),
    [(SAVE, 1, 1), (SAVE, 4, 4), (PUT, 10, 0), (PUT, 40, 1)],
    ids=["after the first result", "after the fourth", "in the first task", "in the second"],
)
def test_a_killed_run_goes_on(
    program_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: tuple[str, str, str],
    times: int,
    done: int,
) -> None:
    killed = {**program_config, "output_dir": str(tmp_path / "killed")}
    kill(killed, place, times)
    assert num_kept() == done
    assert not (tmp_path / "killed" / "report.json").exists()

    evaluated = []
    evaluate = base.evaluate
    monkeypatch.setattr(base, "evaluate", lambda *args: evaluated.append(1) or evaluate(*args))
    resumed = run(killed)
    assert len(evaluated) == 6 - done  # of two baselines' tasks, two models' own, and the merged's
    assert Report.load(tmp_path / "killed" / "report.json") == resumed

    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "empty"))
    whole = run(program_config)
    assert resumed.models == whole.models
    assert resumed.tasks == whole.tasks
