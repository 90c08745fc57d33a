"""What a stranger's YAML asks of Hydra, through the loader that the command line composes with."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fusion_bench.problems import ConfigError
from fusion_bench.scripts import hydra_patches

CALL = {"_target_": "os.system", "_args_": ["touch canary"]}
FILE = {"class": "logging.FileHandler"}


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that composes a config as the command line does, from a YAML of its own."""
    from hydra._internal import hydra as hydra_internal

    monkeypatch.setattr(hydra_internal, "ConfigLoaderImpl", hydra_internal.ConfigLoaderImpl)
    hydra_patches.set_up_hydra()

    def composed(config: dict[str, Any], *words: str, typed: bool = True) -> Any:
        (tmp_path / "stranger.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        monkeypatch.setattr(sys, "argv", ["fusion_bench", *words] if typed else ["fusion_bench"])
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("stranger", list(words), return_hydra_config=True)

    yield composed
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("hydra", "culprit"),
    [
        ({"callbacks": {"x": CALL}}, "hydra.callbacks.x._target_"),
        ({"callbacks": {"leaderboard": {"a": [CALL]}}}, "hydra.callbacks.leaderboard.a[0]._target"),
        ({"callbacks": {"x": "${evil}"}}, "hydra.callbacks.x"),
        ({"callbacks": {"x": "${evil.${hydra.job.num}}"}}, "hydra.callbacks.x"),
        ({"callbacks": {"x": "${oc.create:'{_target_: os.system}'}"}}, "hydra.callbacks.x"),
        ({"sweeper": CALL}, "hydra.sweeper._target_"),
        ({"sweeper": {"params": {"a": "${evil}"}}}, "hydra.sweeper.params.a"),
        ({"job": {"env_set": {"LD_PRELOAD": "x.so"}}}, "hydra.job.env_set.LD_PRELOAD"),
        ({"job": {"env_set": {"FUSION_BENCH_ALLOW": "os"}}}, "hydra.job.env_set.FUSION_BENCH"),
        ({"job": {"env_set": {"FUSION_BENCH_PLUGINS": "x.py"}}}, "hydra.job.env_set.FUSION_BENCH"),
        ({"job": {"env_set": {"HF_ENDPOINT": "http://x"}}}, "hydra.job.env_set.HF_ENDPOINT"),
        ({"job": {"env_copy": ["HOME"]}}, "hydra.job.env_copy[0]"),
        ({"job_logging": {"handlers": {"x": {"()": "os.system"}}}}, "handlers.x.()"),
        ({"job_logging": {"filters": {"x": {"()": "os.system"}}}}, "filters.x.()"),
        ({"job_logging": {"formatters": {"x": {"class": "os.system"}}}}, "formatters.x.class"),
        ({"job_logging": {"handlers": {"file": {"stream": "ext://os.environ"}}}}, "file.stream"),
        ({"job_logging": {"handlers": {"file": {"level": "ext://os.system"}}}}, "file.level"),
        ({"job_logging": {"handlers": {"file": {"filename": ".bashrc"}}}}, "file.filename"),
        ({"job_logging": {"handlers": {"x": {**FILE, "filename": "../a.log"}}}}, "x.filename"),
        ({"job_logging": {"handlers": {"x": {**FILE, "filename": "/a/b.log"}}}}, "x.filename"),
        ({"job_logging": {"handlers": {"x": {"class": "${evil}"}}}}, "x.class"),
        ({"job_logging": {"handlers": {"file": {".": {"baseFilename": "/a"}}}}}, "handlers.file.."),
        ({"job_logging": {"handlers": {"file": {"filename": b"/a/.profile"}}}}, "file.filename"),
        ({"job_logging": {"handlers": {"file": {"filename": ["a.log", "/b"]}}}}, "file.filename"),
        ({"job_logging": {"formatters": {"simple": {"format": "${evil}"}}}}, "simple.format"),
        ({"job_logging": {"formatters": {"simple": {"format": "\x1b]0;x\x07"}}}}, "simple.format"),
        ({"job_logging": {"root": {"handlers": ["cfg://handlers"]}}}, "job_logging.root.handlers"),
        ({"job_logging": "${evil}"}, "hydra.job_logging"),
        ({"hydra_logging": "${evil}"}, "hydra.hydra_logging"),
        ({"job_logging": {"handlers": "${evil}"}}, "hydra.job_logging.handlers"),
        ({"job_logging": {"root": "${evil}"}}, "hydra.job_logging.root"),
        ({"job_logging": {"filters": [CALL]}}, "hydra.job_logging.filters"),
        ({"job_logging": {"formatters": {"simple": {"log_colors": CALL}}}}, "log_colors._target_"),
        ({"job_logging": {"handlers": {"file": {"level": CALL}}}}, "file.level"),
        ({"callbacks": {"x": "${hydra.job_logging.formatters.simple}"}}, "hydra.callbacks.x"),
        ({"callbacks": {"x": "${hydra.callbacks.y}", "y": {"a": 1}}}, "hydra.callbacks.x"),
        ({"job": {"env_set": "${evil}"}}, "hydra.job.env_set"),
        ({"job": {"env_set": {"OMP_NUM_THREADS": "${evil}"}}}, "env_set.OMP_NUM_THREADS"),
        ({"job": {"name": "../../a"}}, "hydra.job.name"),
        ({"job": {"name": ".bashrc"}}, "hydra.job.name"),
        ({"output_subdir": "/home/me/project"}, "hydra.output_subdir"),
        ({"output_subdir": "."}, "hydra.output_subdir"),
        ({"job": {"env_set": {"NCCL_NET_PLUGIN": "/x.so"}}}, "hydra.job.env_set.NCCL_NET_PLUGIN"),
        ({"hydra_logging": {"handlers": {"x": {"()": "os.system"}}}}, "hydra_logging.handlers.x"),
        ({"searchpath": ["pkg://stranger"]}, "pkg://stranger"),
        ({"searchpath": ["pkg://stranger/conf"]}, "--allow stranger"),
    ],
    ids=str,
)
def test_what_hydra_may_not_do(composed: Any, hydra: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed({"evil": CALL, "hydra": hydra})
    assert culprit in str(error.value)
    assert "stranger" not in sys.modules


def test_all_of_it_is_told_at_once(composed: Any) -> None:
    hydra = {"callbacks": {"x": CALL}, "job": {"env_set": {"PATH": "."}}}
    with pytest.raises(ConfigError) as error:
        composed({"token": "abc", "hydra": hydra})
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "token",
        "hydra.callbacks.x._target_",
        "hydra.job.env_set.PATH",
    ]


@pytest.mark.parametrize(
    "hydra",
    [
        {"job": {"env_set": {"OMP_NUM_THREADS": "1"}}},
        {"job_logging": {"handlers": {"file": {"filename": "${hydra.sweep.dir}/a.log"}}}},
        {"job_logging": {"handlers": {"console": {"class": "rich.logging.RichHandler"}}}},
        {"job_logging": {"root": {"level": "DEBUG"}}},
        {"job_logging": {"handlers": {"file": {"mode": "w", "delay": True}}}},
        {"job_logging": {"formatters": {"simple": {"format": "%(message)s"}}}},
        {"job": {"name": "mine"}, "output_subdir": ".mine"},
        {"run": {"dir": "mine/${now:%H}"}, "sweep": {"dir": "mine"}},
        {"callbacks": {"x": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}}},
    ],
    ids=str,
)
def test_what_hydra_may_do(composed: Any, hydra: dict[str, Any]) -> None:
    assert composed({"a": 1, "hydra": hydra}).a == 1


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "submitit_slurm", "ray"])
def test_our_launchers_are_what_they_were(composed: Any, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert composed({"a": 1}, f"hydra/launcher={launcher}").hydra.launcher._target_


def test_commands_come_from_the_command_line_alone(composed: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = "hydra/launcher=submitit_slurm"
    stranger = {"hydra": {"launcher": {"setup": ["touch canary"]}}}
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.setup\[0\]"):
        composed(
            {"defaults": [{"override hydra/launcher": "submitit_slurm"}, "_self_"], **stranger}
        )
    config = composed({}, slurm, "hydra.launcher.setup=[module load cuda]")
    assert config.hydra.launcher.setup == ["module load cuda"]
    with pytest.raises(ConfigError, match="line break"):
        composed({}, slurm, "hydra.launcher.partition='a\nb'")
    assert composed({}, "+hydra.job.env_set.PATH=x").hydra.job.env_set.PATH == "x"


def test_what_a_file_sweeps_is_not_the_command_line(composed: Any) -> None:
    """The sweeper composes a job with what a file's ``params`` say, as if it had been typed."""
    word = "+hydra.job.env_set.LD_PRELOAD=x.so"
    assert composed({"a": 1}, word).a == 1
    with pytest.raises(ConfigError, match="LD_PRELOAD"):
        composed({"a": 1}, word, typed=False)


def test_no_file_sweeps_what_is_searched(composed: Any) -> None:
    word = "hydra.searchpath=[pkg://stranger]"
    with pytest.raises(ConfigError, match=r"hydra\.searchpath: cannot be swept"):
        composed({"a": 1}, word, typed=False)


def test_a_dry_run_leaves_no_config(composed: Any) -> None:
    assert composed({"dry_run": True}).hydra.output_subdir is None
    assert composed({"dry_run": False}).hydra.output_subdir == ".hydra"


def test_jobs_of_a_sweep_share_files_and_no_values(composed: Any, tmp_path: Path) -> None:
    config = {
        "defaults": ["fabric_model_fusion", "_self_"],
        "seed": 7,
        "report_save_path": "a.json",
    }
    jobs = [
        ["method=ties_merging", "method.threshold=10", "++method.where=[{match: a}]"],
        ["method=ties_merging", "method.threshold=30", "seed=8"],
        ["method=task_arithmetic", "+method.base={deep: {er: 1}}"],
        ["method=task_arithmetic", "+method.base={other: 2}"],
        ["method=ties_merging", "method.threshold=30", "seed=8"],
    ]
    alone = [composed(config, *words) for words in jobs]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        together = [compose("stranger", words, return_hydra_config=True) for words in jobs]
        (tmp_path / "stranger.yaml").write_text("seed: 9")  # by someone who prepares the next sweep
        later = compose("stranger", jobs[0])
    for one, other in zip(alone, together, strict=True):
        one.hydra.run.dir = other.hydra.run.dir = "of its time"
        assert OmegaConf.to_container(one) == OmegaConf.to_container(other)
    assert (later.seed, later.method.threshold) == (7, 10)


def test_null_for_a_config_group_is_answered_with_what_to_type(tmp_path: Path) -> None:
    done = fusion_bench("taskpool=null", cwd=tmp_path)
    assert done.returncode == 2
    assert "taskpool: null is not a choice of a config group. Type '~taskpool'" in done.stderr
