"""Sweeps on the real command line, over a small family of models."""

import os
import signal
import stat
import subprocess
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench, python
from omegaconf import OmegaConf

from fusion_bench.problems import ConfigError, EnvironmentProblem, FusionBenchError
from fusion_bench.report import Report
from fusion_bench.report.leaderboard import Leaderboard
from fusion_bench.scripts import verbs
from fusion_bench.scripts.sweep import check_grid, check_strategy, directory_name, killed_workers

#: Runs the command line, and writes a line for each model that is evaluated on a task, and for each
#: that is fused; once enough are evaluated it kills itself.
DRIVER = """
import os, signal, sys
from pathlib import Path
import fusion_bench.programs.execute as program
import fusion_bench.taskpool.images.task as base
from fusion_bench.scripts.cli import main

log, times = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
evaluate, fuse = base.evaluate, program.fuse

def note(what):
    with log.open("a") as file:
        file.write(what + chr(10))

def evaluated(*args):
    result = evaluate(*args)
    note(args[5])
    if log.read_text().count("evaluating merged") == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

def fused(*args):
    note("fusing")
    return fuse(*args)

base.evaluate, program.fuse = evaluated, fused
main()
"""


HOSTILE = "import os; open(os.path.join(os.getcwd(), 'canary'), 'w').close()"


@pytest.fixture
def conf(tmp_path: Path, program_config: dict[str, Any]) -> Path:
    """Write `small.yaml`, whose method can be chosen; return its directory."""
    (tmp_path / "conf").mkdir()
    del program_config["method"]
    config = {"defaults": [{"method": "task_arithmetic"}, "_self_"], **program_config}
    (tmp_path / "conf" / "small.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "conf"


def sweep(conf: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = ("--config-path", str(conf), "--config-name", "small", "-m")
    return fusion_bench(*words, *arguments, cwd=conf.parent)


def driven(conf: Path, *arguments: str, times: int = -1) -> tuple[int, list[str]]:
    """Run a sweep in a process that counts; return its exit code and what it did."""
    log = conf.parent / "done.txt"
    log.unlink(missing_ok=True)
    words = ["--config-path", str(conf), "--config-name", "small", "-m", *arguments]
    done = python(DRIVER, str(log), str(times), *words, cwd=conf.parent)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def board(conf: Path) -> Leaderboard:
    (path,) = (conf.parent / "multirun").glob("*/leaderboard.json")
    return Leaderboard.model_validate_json(path.read_text())


def test_a_sweep_ends_with_a_leaderboard(conf: Path) -> None:
    """The average has no scaling factor, so that it is one job and not two."""
    done = sweep(
        conf, "method=simple_average,task_arithmetic", "method.scaling_factor=0.1,0.3", "seed=1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (directory,) = (conf.parent / "multirun").iterdir()
    assert {file.suffix[1:] for file in directory.glob("leaderboard.*")} == {
        *("html", "md", "csv", "tex", "json")
    }
    (table,) = board(conf).tables
    names = {
        "method=simple_average",
        "method=task_arithmetic method.scaling_factor=0.1",
        "method=task_arithmetic method.scaling_factor=0.3",
    }
    assert {line.name for line in table.lines if line.rank} == names
    for line in table.lines:
        if line.rank:
            report = Report.load(directory / line.directory / "report.json")
            assert report.models["merged"].average.main.value == line.average.value
            assert report.run.seed == 1
            assert "pretrained" in (directory / line.directory / "cli.log").read_text()
    # One line a job and the table; what jobs print besides is in their logs.
    assert len([line for line in done.stdout.splitlines() if line.startswith("method=")]) == 3
    assert "Fusing" not in done.stdout and "simple_average: average" in done.stdout


def test_one_job_that_fails_does_not_lose_the_others(conf: Path) -> None:
    done = sweep(conf, "baselines=none", "method.scaling_factor=0.1,much,0.3")
    assert done.returncode == 1
    assert done.stderr == "fusion_bench: 1 of 3 jobs failed.\n"
    assert "Traceback" not in done.stdout
    found = board(conf)
    assert sum(line.rank is not None for line in found.tables[0].lines) == 2
    (failure,) = found.failures
    assert failure.name == "method.scaling_factor=much"
    assert "method.scaling_factor: 'much' is not a number" in failure.message
    assert failure.message in done.stdout

    # Started again without it: the leaderboard is that of this sweep alone.
    again = sweep(conf, "baselines=none", "method.scaling_factor=0.3,0.2")
    assert again.returncode == 0 and board(conf).failures == []
    names = {line.name for line in board(conf).tables[0].lines}
    assert names == {"method.scaling_factor=0.3", "method.scaling_factor=0.2"}


def test_an_unexpected_failure_is_in_the_jobs_log(conf: Path) -> None:
    done = sweep(conf, "baselines=none", "merged_model_save_path=/dev/null/x")
    assert done.returncode == 1 and "1 of 1 jobs failed" in done.stderr
    (log,) = (conf.parent / "multirun").glob("*/*/cli.log")
    assert "ERROR" in log.read_text()
    assert board(conf).tables == []


def test_a_mistake_in_the_grid_is_told_before_anything_runs(conf: Path) -> None:
    for word, culprit in [
        ("method=simple_average,nosuch", "nosuch"),
        ("method.scale=1,2", "scale"),
        ("method=glob(opcm/*)", "'method=glob(opcm/*)': no choice fits. The nearest: "),
    ]:
        done = sweep(conf, word)
        assert done.returncode == 2 and culprit in done.stderr
        first, *others = done.stderr.splitlines()
        assert first.startswith("fusion_bench: ") and all(line[:2] == "  " for line in others)
        assert not list(conf.parent.glob("multirun/*/*/report.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=range(0,10,0)"], "its step is 0"),
        (["seed=range(0,1,0.0)"], "its step is 0"),
        (["seed=range(5,1)"], "has no value"),
        (["seed=interval(0,1)"], "range(start,stop,step)"),
        (["seed=range(0,1000000000)"], "1,000,000,000 jobs"),
        (["a=range(0,1000)", "b=range(0,1,0.001)", "c=1,2"], "2,000,000 jobs"),
    ],
)
def test_what_is_no_grid(words: list[str], told: str) -> None:
    sweeper = {"_target_": "hydra_plugins.fusion_bench_grid.GridSweeper", "params": None}
    config = {"hydra": {"sweeper": sweeper, "overrides": {"task": words}}}
    with pytest.raises(ConfigError) as error:
        check_grid(OmegaConf.create(config))
    assert told in str(error.value)
    config["hydra"]["sweeper"] = {**sweeper, "params": dict(word.split("=") for word in words)}
    config["hydra"]["overrides"] = {"task": []}
    with pytest.raises(ConfigError):
        check_grid(OmegaConf.create(config))


def test_a_large_grid_is_fine() -> None:
    words = ["a=range(0,100)", "b=range(0,1,0.01)", "c=glob(*)", "d=shuffle(1,2)", "e=1"]
    sweeper = {"_target_": "hydra_plugins.fusion_bench_grid.GridSweeper", "params": None}
    check_grid(OmegaConf.create({"hydra": {"sweeper": sweeper, "overrides": {"task": words}}}))


# Takes up to 10 seconds: eleven jobs in four sweeps, of which one is killed.
def test_a_killed_sweep_goes_on_and_a_grown_one_adds(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks a merged model, four for the models to compare with."""
    words = ["method.scaling_factor=0.1,0.2,0.3"]
    code, begun = driven(conf, *words, times=4)  # in the middle of the second job
    assert code == -signal.SIGKILL
    assert len(begun) == 4 + 4 + 2 and not list(tmp_path.glob("multirun/*/leaderboard.json"))

    code, resumed = driven(conf, *words)
    assert code == 0
    # The first job is whole, the second lacks a task; of the third there is nothing.
    assert resumed.count("fusing") == 2
    assert [line for line in resumed if "evaluating" in line] == [
        "evaluating merged on b",
        "evaluating merged on a",
        "evaluating merged on b",
    ]
    found = board(conf)

    code, grown = driven(conf, "method.scaling_factor=0.3,0.1,0.4,0.2")
    assert code == 0 and grown.count("fusing") == 1 and len(grown) == 3
    assert len(board(conf).tables[0].lines) == len(found.tables[0].lines) + 1

    (tmp_path / "multirun").rename(tmp_path / "resumed")
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "empty"))
    code, _ = driven(conf, *words)
    assert code == 0 and board(conf) == found


def test_ctrl_c_ends_all(conf: Path) -> None:
    words = ["--config-path", str(conf), "--config-name", "small", "-m", "seed=range(40)"]
    told = conf.parent / "told.txt"

    def interrupt(pid: int) -> None:
        while "seed=0: " not in told.read_text():
            time.sleep(0.01)
        os.kill(pid, signal.SIGINT)

    done = fusion_bench(*words, cwd=conf.parent, stdout=told, begun=interrupt, timeout=60)
    assert done.returncode == 130
    assert not list(conf.parent.glob("multirun/*/leaderboard.json"))


def test_the_users_own_settings_of_hydra_win(conf: Path) -> None:
    config = yaml.safe_load((conf / "small.yaml").read_text())
    config["hydra"] = {"sweep": {"dir": "mine", "subdir": "${hydra.job.num}"}}
    (conf / "small.yaml").write_text(yaml.safe_dump(config))
    done = sweep(conf, "baselines=none", "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert len(list((conf.parent / "mine").glob("*/report.json"))) == 2
    assert (conf.parent / "mine" / "leaderboard.json").exists()
    assert (conf.parent / "mine" / "1" / "report.json").exists()


def test_processes_that_rerun_the_command_are_refused(conf: Path) -> None:
    done = sweep(conf, "fabric.strategy=ddp", "fabric.devices=2", "seed=1,2")
    assert done.returncode == 2
    assert "fabric.strategy" in done.stderr and done.stderr.count("\n") == 1
    assert not (conf.parent / "multirun").exists()


def test_which_strategies_may_be_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for fine in (
        None,
        {"devices": 2},
        {"strategy": "ddp", "devices": 1},
        {"strategy": "ddp_spawn", "devices": 2},
        {"strategy": "ddp_fork", "devices": "auto"},
    ):
        check_strategy(fine)
    for bad in ({"strategy": "fsdp", "devices": 2}, {"strategy": "ddp", "num_nodes": 2}):
        with pytest.raises(FusionBenchError, match=r"fabric\.strategy"):
            check_strategy(bad)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(FusionBenchError, match="torchrun"):
        check_strategy(None)


def test_directories_are_readable_and_no_two_are_the_same() -> None:
    assert directory_name("method=ties_merging,seed=1") == "method=ties_merging,seed=1"
    texts = ["a=x/y", "a=x_y", "a=X_y", "a='x y'", "", "..", "a=" + "x" * 300, "a=" + "x" * 301]
    names = [directory_name(text) for text in texts]
    assert len({name.lower() for name in names}) == len(texts)
    assert all(0 < len(name) < 120 and "/" not in name for name in names)
    assert not any(name.startswith(".") for name in names)


# Takes 15 seconds for each launcher: its processes import everything anew.
@pytest.mark.processes
@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "hydra_joblib_launcher"),
        (["hydra/launcher=submitit_local"], "hydra_submitit_launcher"),
    ],
    ids=["joblib", "submitit_local"],
)
def test_jobs_side_by_side(
    conf: Path, launcher: list[str], package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(f"hydra_plugins.{package}", reason="its extra is not installed")
    for name in ("submitit", "joblib", "pickle", "torch", "numpy", "runpy", "multiprocessing"):
        (conf.parent / f"{name}.py").write_text(HOSTILE)
    for name in ("hydra_plugins", "logging"):
        (conf.parent / name).mkdir()
        (conf.parent / name / "__init__.py").write_text(HOSTILE)
        (conf.parent / name / "evil.py").write_text(HOSTILE)
    verbs.run("new", ["method", "soft_ties", "--dir", str(conf.parent / "own")])
    capsys.readouterr()
    plugin = ("--plugins", "own/soft_ties.py", "method=soft_ties")
    done = sweep(conf, *plugin, "method.scaling_factor=0.1,much", *launcher)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("fusion_bench: 1 of 2 jobs failed.\n")
    found = board(conf)
    assert [f.name for f in found.failures] == ["method.scaling_factor=much"]
    (line,) = (line for line in found.tables[0].lines if line.rank)
    (report,) = (conf.parent / "multirun").glob(f"*/{line.directory}/report.json")
    assert Report.load(report).models["merged"].average.main.value == line.average.value
    assert "soft_ties" in Report.load(report).run.packages  # workers have the method of one's own
    assert not (conf.parent / "canary").exists()  # nothing there was imported by a worker


def test_a_folder_of_the_users_is_no_sweeps(conf: Path) -> None:
    (conf.parent / "multirun.yaml").write_text("mine")
    done = sweep(conf, "seed=1,2", "hydra.sweep.dir=.")
    assert done.returncode == 2
    assert "hydra.sweep.dir: " in done.stderr and done.stderr.count("\n") == 1
    assert (conf.parent / "multirun.yaml").read_text() == "mine"


def test_a_launcher_that_is_not_installed(conf: Path) -> None:
    if (Path(yaml.__file__).parents[1] / "ray").exists():
        pytest.skip("Ray is installed")
    done = sweep(conf, "seed=1,2", "hydra/launcher=ray")
    assert done.returncode == 2
    assert 'pip install "fusion_bench[ray]"' in done.stderr and done.stderr.count("\n") == 1


def test_slurm_is_asked_for_what_the_config_says(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch keeps the script and takes no job."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="not installed")
    place = tmp_path / "bin"
    place.mkdir()
    for name, code in {"srun": "exit 0", "sbatch": f'cp "$1" {tmp_path}/script.sh; exit 1'}.items():
        (place / name).write_text(f"#!/bin/sh\n{code}\n")
        (place / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    done = sweep(
        conf,
        *("seed=1,2,3", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"),
        "hydra.launcher.array_parallelism=2",
    )
    assert done.returncode != 0
    script = (tmp_path / "script.sh").read_text()
    for option in (
        *("--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=32GB"),
        *("--time=240", "--nodes=1", "--ntasks-per-node=1", "--array=0-2%2"),
    ):
        assert f"#SBATCH {option}\n" in script, script
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in script
    assert "submitit.core._submit" in script


def test_a_worker_that_is_killed_is_named_in_one_line() -> None:
    with pytest.raises(EnvironmentProblem, match="ended from outside"), killed_workers():
        raise BrokenProcessPool("A worker process managed by the executor was terminated")
