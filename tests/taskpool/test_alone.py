"""Several processes that need the same result: one evaluates, the others wait for it."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commandline import python

from fusion_bench.results.store import ResultStore
from fusion_bench.storage import cache_dir

#: Runs a config and notes each model that it evaluates on a task, which it does at leisure.
DRIVER = """
import json, sys, time
from pathlib import Path
import fusion_bench.taskpool.images.task as base
from fusion_bench.instantiate import instantiate

evaluate = base.evaluate

def evaluated(*args):
    with Path(sys.argv[2]).open("a") as file:
        file.write(args[5] + chr(10))
    time.sleep(0.2)
    return evaluate(*args)

base.evaluate = evaluated
node = json.loads(sys.argv[1])
start, end = Path(sys.argv[2] + ".go"), time.time() + 100
from fusion_bench.programs import FabricModelFusionProgram
import transformers, datasets
Path(sys.argv[2] + sys.argv[3]).touch()
while not start.exists() and time.time() < end:
    time.sleep(0.01)
instantiate(node).run()
"""


def wait_for(*files: Path) -> None:
    end = time.time() + 100
    while not all(file.exists() for file in files):
        assert time.time() < end
        time.sleep(0.01)


@pytest.mark.processes
def test_two_processes_share_the_work(program_config: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ThreadPoolExecutor() as pool:
        runs = []
        for n in "01":
            config = json.dumps({**program_config, "output_dir": str(tmp_path / n)})
            runs.append(pool.submit(python, DRIVER, config, str(log), n))
        wait_for(tmp_path / "log0", tmp_path / "log1")
        (tmp_path / "log.go").touch()
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr
    evaluated = log.read_text().splitlines()
    assert (
        len(evaluated) == len(set(evaluated)) == 6
    )  # pretrained and merged on both, each on its own
    reports = [json.loads((tmp_path / str(n) / "report.json").read_text()) for n in range(2)]
    assert reports[0]["models"] == reports[1]["models"]


@pytest.mark.processes
def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    key = {"weights": "w"}
    code = (
        "import json, os, sys, time\nfrom pathlib import Path\n"
        "from fusion_bench.results.store import ResultStore\n"
        "with ResultStore().alone(json.loads(sys.argv[1]), -1) as mine:\n"
        "    Path(sys.argv[2]).write_text(f'{os.getpid()} {mine}')\n"
        "    Path(sys.argv[2]).rename(sys.argv[3])\n    time.sleep(100)\n"
    )
    written, told = tmp_path / "written", tmp_path / "told"
    with ThreadPoolExecutor() as pool:
        holder = pool.submit(python, code, json.dumps(key), str(written), str(told))
        wait_for(told)
        pid, holds = told.read_text().split()
        assert holds == "True"
        with ResultStore().alone(key, 0) as mine:
            assert not mine
        with ResultStore().alone({"weights": "another"}, 0) as mine:
            assert mine
        with ResultStore().alone(key, 0.05) as mine:
            assert mine  # out of patience: evaluated twice
        os.kill(int(pid), signal.SIGKILL)
    assert holder.result().returncode == -signal.SIGKILL
    end = time.time() + 60
    with ResultStore().alone(key, -1) as mine:
        assert mine and time.time() < end


def test_a_cache_that_takes_no_lock_is_no_obstacle(tmp_path: Path) -> None:
    cache_dir().mkdir(exist_ok=True)
    (cache_dir() / "evaluating").write_text("a file where the locks would be")
    with ResultStore().alone({"weights": "w"}, -1) as mine:
        assert mine
