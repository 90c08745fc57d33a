"""The keys that configs of FusionBench have beside the program's own."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench

from fusion_bench.report import Report

#: As their configs have it, but for the models and tasks.
THEIRS: dict[str, Any] = {
    "defaults": [{"path": "default"}, {"fabric": "auto"}, "_self_"],
    "fast_dev_run": False,
    "dry_run": False,
    "print_config": True,
    "print_function_call": True,
    "merged_model_save_path": None,
    "merged_model_save_kwargs": None,
    "report_save_path": "{log_dir}/program_report.json",
    "baselines": "none",
    "fabric": {
        "_recursive_": True,
        "accelerator": "cpu",
        "loggers": {
            "_target_": "lightning.fabric.loggers.CSVLogger",
            "root_dir": "${path.log_dir}",
            "name": "",
            "version": "",
        },
    },
}


@pytest.fixture
def theirs(program_config: dict[str, Any], tmp_path: Path) -> Path:
    rest = {key: value for key, value in program_config.items() if key != "fabric"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**THEIRS, **rest}, sort_keys=False))
    return tmp_path


def values(file: Path) -> dict[str, str]:
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    return row


def test_a_config_of_theirs_runs(theirs: Path) -> None:
    done = fusion_bench("theirs.yaml", "path.log_dir=${path.root_dir}/logs/one", cwd=theirs)
    assert done.returncode == 0, done.stderr
    # print_config: what was composed, above the work
    printed = yaml.safe_load(done.stdout.partition("\n\n")[0])
    assert printed["fabric"]["loggers"]["root_dir"] == str(theirs / "logs" / "one")
    assert printed["method"]["_target_"] == "fusion_bench.method.SimpleAverageAlgorithm"
    out = theirs / "logs" / "one"
    report = Report.load(out / "report.json")
    assert Report.load(out / "program_report.json") == report
    accuracy = report.models["merged"].tasks["a"].main.value
    assert float(values(out / "metrics.csv")["merged/a/accuracy"]) == accuracy
    assert not (theirs / "outputs").exists()


def test_each_job_of_a_sweep_has_a_folder(theirs: Path) -> None:
    words = ["path.log_dir=logs", "seed=1,2", "print_config=false"]
    done = fusion_bench("theirs.yaml", "-m", *words, cwd=theirs)
    assert done.returncode == 0, done.stdout
    files = sorted(file.relative_to(theirs).as_posix() for file in theirs.rglob("metrics.csv"))
    assert files == ["logs/seed=1/metrics.csv", "logs/seed=2/metrics.csv"]


def test_hydras_own_key_goes_first(theirs: Path) -> None:
    words = ["path.log_dir=logs", "hydra.run.dir=mine", "dry_run=true"]
    done = fusion_bench("theirs.yaml", *words, cwd=theirs)
    assert done.returncode == 0, done.stderr
    assert f"{theirs / 'mine'}/report.json" in done.stdout


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fabric.loggers.nam=x", "fabric.loggers.nam: is not allowed"),
        ("fabric/loggers=csv", "csv_logger"),
        ("merged_model_save_kwargs={a: 1}", "merged_model_save_kwargs: "),
    ],
)
def test_mistakes(theirs: Path, word: str, message: str) -> None:
    done = fusion_bench("theirs.yaml", word, "dry_run=true", cwd=theirs)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0] + done.stderr
