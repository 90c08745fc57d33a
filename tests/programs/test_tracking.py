"""What loggers are given is what the report says."""

import csv
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from tensorboardX.proto.event_pb2 import Event

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError
from fusion_bench.programs.tracking import Tracker, figures
from fusion_bench.report import Report

CSV = "lightning.fabric.loggers.CSVLogger"
BOARD = "lightning.fabric.loggers.TensorBoardLogger"
MLFLOW = "lightning.pytorch.loggers.MLFlowLogger"
WANDB = "lightning.pytorch.loggers.WandbLogger"


def run(config: dict[str, Any], *loggers: Any, **changes: Any) -> Report:
    fabric = config["fabric"] | {"loggers": list(loggers)}
    report = instantiate(config | {"fabric": fabric, "baselines": "none"} | changes).run()
    assert isinstance(report, Report)
    return report


def events(folder: Path) -> Iterator[Any]:
    """Yield the values in a folder's event files."""
    for file in folder.glob("events.out.tfevents.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield from Event.FromString(content[at + 12 : at + 12 + length]).summary.value
            at += length + 16


def chunks(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log as LevelDB writes it: in blocks, each record in one or more."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of one, or its last part
            yield whole
            whole = b""


def rows(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as lines:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def test_files_hold_what_the_report_says(program_config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    board = {"_target_": BOARD, "default_hp_metric": False}
    saved = run(program_config, {"_target_": CSV}, board, output_dir=out)
    report = Report.load(out / "report.json")
    wanted = figures(report)
    for task in "ab":
        value = report.models["merged"].tasks[task].metrics["accuracy"].value
        assert wanted[f"merged/{task}/accuracy"] == value
    assert wanted["merged/average/accuracy"] == report.models["merged"].average.main.value  # type: ignore[union-attr]
    (row,) = rows(out / "metrics.csv")
    assert row == wanted | {"step": 0.0}
    shown = {v.tag: v.simple_value for v in events(out) if v.HasField("simple_value")}
    assert shown == {tag: pytest.approx(value, rel=1e-6) for tag, value in wanted.items()}
    (text,) = [v.tensor.string_val[0].decode() for v in events(out) if "report" in v.tag]
    assert text.startswith("# Fusion report") and "merged" in text
    # Whoever repeats the run has the loggers write beside the own report.
    assert saved.run.config["fabric"]["loggers"] == [{"_target_": CSV}, board]


def test_a_directory_of_the_users(program_config: dict[str, Any], tmp_path: Path) -> None:
    logger = {"_target_": CSV, "root_dir": str(tmp_path / "logs"), "name": "", "version": "one"}
    run(program_config, logger, output_dir=tmp_path / "out")
    assert rows(tmp_path / "logs" / "one" / "metrics.csv")
    with pytest.raises(ConfigError, match=r"fabric\.loggers\[0\]: .*'metrics.csv' of another run"):
        run(program_config, logger, output_dir=tmp_path / "other")
    run(program_config, logger, output_dir=tmp_path / "out")  # the same run once more
    run(program_config, logger, output_dir=tmp_path / "other", overwrite=True)
    # By itself each run gets a version of its own.
    numbered = {"_target_": CSV, "root_dir": str(tmp_path / "logs")}
    for name in "xy":
        run(program_config, numbered, output_dir=tmp_path / name)
    found = sorted(p.parent.name for p in (tmp_path / "logs" / "lightning_logs").rglob("*.csv"))
    assert found == ["version_0", "version_1"]


def test_a_runs_own_directory_is_not_in_its_report(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    inside = {"_target_": CSV, "root_dir": str(out / "logs"), "name": "n", "version": ""}
    config = run(program_config, inside, output_dir=out).run.config
    assert config["fabric"]["loggers"][0]["root_dir"] == "{log_dir}/logs"
    assert rows(out / "logs" / "n" / "metrics.csv")
    instantiate(config | {"output_dir": tmp_path / "again"}).run()
    assert rows(tmp_path / "again" / "logs" / "n" / "metrics.csv")


def test_a_loggers_failure_is_a_warning(
    program_config: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError("the server is away")

    out, loggers = tmp_path / "out", ({"_target_": CSV}, {"_target_": BOARD})
    with monkeypatch.context() as broken, caplog.at_level(logging.INFO):
        broken.setattr(CSVLogger, "log_metrics", fail)
        run(program_config, *loggers, output_dir=out)
    (told,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert told == (
        "fabric.loggers[0]: CSVLogger failed: the server is away. The report is complete. To send "
        f"it again, repeat the command with 'hydra.run.dir={out}': nothing is computed again."
    )
    assert not (out / "metrics.csv").exists() and len([*out.glob("events*")]) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report = run(program_config, *loggers, output_dir=out)
    assert "This run is already done" in caplog.text
    (row,) = rows(out / "metrics.csv")
    assert row == figures(report) | {"step": 0.0}
    assert len([*out.glob("events*")]) == 1  # which has it already


@pytest.mark.parametrize(
    ("target", "package", "install"),
    [
        (BOARD, "tensorboardX", "tensorboardX"),
        (MLFLOW, "mlflow", "fusion_bench[mlflow]"),
        (WANDB, "wandb", "fusion_bench[wandb]"),
    ],
)
def test_what_is_not_installed_is_named(
    target: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fusion_bench.programs.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        Tracker.of({"loggers": {"_target_": target}}, tmp_path, False)
    name = target.rpartition(".")[2]
    assert str(caught.value) == (
        f"fabric.loggers: {name} needs '{package}', which is not installed. Run "
        f"'pip install \"{install}\"'."
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"_target_": MLFLOW, "tracking_uri": "http://a.b"}, "tracking_uri: says where .* MLFLOW_T"),
    ({"_target_": MLFLOW, "artifact_location": "s3://a"}, "artifact_location: is not allowed"),
    ({"_target_": WANDB, "entity": "them"}, "entity: says where .* WANDB_ENTITY"),
    ({"_target_": WANDB, "settings": {"base_url": "http://a.b"}}, "settings: is not allowed"),
    ({"_target_": WANDB, "save_code": True}, "save_code: is not allowed"),
    ({"_target_": CSV, "root_dir": "hf://datasets/a/b"}, "root_dir: .* is neither a name"),
    ({"_target_": BOARD, "root_dir": "s3://a"}, "root_dir: .* is neither a name"),
    ({"_target_": BOARD, "name": "$HF_TOKEN"}, "name: .* is neither a name"),
    ({"_target_": BOARD, "filename_suffix": "/../x"}, "filename_suffix: is not allowed"),
    ({"_target_": CSV, "root": "x"}, "root: is not allowed .*Did you mean 'root_dir'"),
    ({"_target_": "lightning.pytorch.loggers.CometLogger"}, "may not be called"),
    ({"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}, "is not a logger"),
    ({"root_dir": "x"}, "is not a logger"),
    ({"_target_": CSV, "root_dir": 3}, "CSVLogger: expected str"),
]


@pytest.mark.parametrize(("node", "message"), REFUSED)
def test_a_file_may_not_say_where_figures_are_sent(
    node: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^fabric.loggers.*{message}"):
        Tracker.of({"loggers": node}, tmp_path, False).check()


def test_the_command_line_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setattr("sys.argv", ["fusion_bench", f"fabric.loggers.tracking_uri='{uri}'"])
    node = {"loggers": {"_target_": MLFLOW, "tracking_uri": uri}}
    Tracker.of(node, tmp_path, False).check()
    assert not [*tmp_path.iterdir()]  # a dry run leaves nothing


def test_mlflow(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    node = {"_target_": MLFLOW, "save_dir": str(tmp_path), "experiment_name": "e"}
    report = run(program_config, node, output_dir=tmp_path / "out")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("e")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics == figures(report) and found.info.status == "FINISHED"
    assert found.info.run_name == "out"
    assert found.data.params["method/_target_"].endswith("SimpleAverageAlgorithm")
    (kept,) = (tmp_path / "mlruns").rglob("report.json")
    assert Report.load(kept) == report


def test_weights_and_biases(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="not logged in to Weights & Biases"):
        run(program_config, {"_target_": WANDB}, output_dir=tmp_path / "out")
    report = run(program_config, {"_target_": WANDB, "offline": True}, output_dir=tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.wandb")
    records = [Record.FromString(data) for data in chunks(file.read_bytes())]
    assert [r.run.display_name for r in records if r.HasField("run")][:1] == ["out"]
    sent = {}
    for record in records:
        for item in record.history.item:
            sent["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert {key: sent[key] for key in figures(report)} == figures(report)
    assert any(r.artifact.type == "report" for r in records)


def test_loggers_of_a_fabric_made_in_python(program_config: dict[str, Any], tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", loggers=CSVLogger(tmp_path, name="", version=""))
    report = instantiate(program_config | {"baselines": "none"}, fabric=fabric).run()
    assert rows(tmp_path / "metrics.csv") == [figures(report) | {"step": 0.0}]


@pytest.mark.processes
def test_of_several_processes_one_writes(program_config: dict[str, Any], tmp_path: Path) -> None:
    config = program_config | {"fabric": {"accelerator": "cpu", "devices": 2}}
    report = run(config, {"_target_": CSV}, {"_target_": BOARD}, output_dir=tmp_path / "out")
    assert report.run.world_size == 2
    assert rows(tmp_path / "out" / "metrics.csv") == [figures(report) | {"step": 0.0}]
    assert len([*(tmp_path / "out").glob("events*")]) == 1
