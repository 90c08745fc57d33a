"""The tutorial's own command, with the real clients, against a stand-in of the Hub."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commandline import REPOSITORY, fusion_bench
from fixtures_clip import write_hub
from hub import Hub, client_environment, closed_endpoint, hub_stand_in
from transformers import CLIPVisionModel

from fusion_bench.report import Report

COMMAND = [
    *("--config-path", str(REPOSITORY / "config" / "_get_started")),
    *("--config-name", "clip_simple_average"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    write_hub(root)
    with hub_stand_in(root) as running:
        yield running


def run(cwd: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return fusion_bench(*COMMAND, *more, cwd=cwd, env=env)


def test_the_yaml_is_as_the_tutorial_describes_it() -> None:
    path = REPOSITORY / "config" / "_get_started" / "clip_simple_average.yaml"
    config = yaml.safe_load(path.read_text())
    base = "openai/clip-vit-base-patch32"
    assert set(config) == {"_target_", "_recursive_", "method", "modelpool", "taskpool"}
    assert config["_recursive_"] is False
    assert config["modelpool"]["models"] == {
        "_pretrained_": base,
        "sun397": "tanganke/clip-vit-base-patch32_sun397",
        "stanford-cars": "tanganke/clip-vit-base-patch32_stanford-cars",
    }
    datasets = config["taskpool"]["test_datasets"]
    assert {name: node["path"] for name, node in datasets.items()} == {
        "sun397": "tanganke/sun397",
        "stanford-cars": "tanganke/stanford_cars",
    }
    assert config["taskpool"]["clip_model"] == config["taskpool"]["processor"] == base


def test_online_then_from_the_cache_alone(hub: Hub, tmp_path: Path) -> None:
    done = run(
        tmp_path,
        hub.environment(tmp_path / "cache"),
        *("merged_model_save_path=merged", "report_save_path=online.json"),
    )
    assert done.returncode == 0, done.stderr
    online = Report.load(tmp_path / "online.json")
    assert {name: list(m.tasks) for name, m in online.models.items()} == {
        "_pretrained_": ["sun397", "stanford-cars"],
        "sun397": ["sun397"],
        "stanford-cars": ["stanford-cars"],
        "merged": ["sun397", "stanford-cars"],
    }
    assert online.tasks["sun397"].num_classes == 397
    assert online.tasks["stanford-cars"].num_classes == 196

    names = ("sun397", "stanford-cars")
    snapshots = (tmp_path / "cache").rglob("models--tanganke*/snapshots/*")
    parts = [CLIPVisionModel.from_pretrained(path).state_dict() for path in snapshots]
    assert len(parts) == len(names)
    merged = CLIPVisionModel.from_pretrained(tmp_path / "merged").state_dict()
    for key, value in merged.items():
        mean = (parts[0][key].double() + parts[1][key].double()) / 2
        assert (value.double() - mean).abs().max() < 1e-6

    unreachable = client_environment(closed_endpoint(), tmp_path / "cache")
    done = run(tmp_path, unreachable, "report_save_path=offline.json")
    assert done.returncode == 0, done.stderr
    assert Report.load(tmp_path / "offline.json").models == online.models


def test_without_hub_and_cache_one_line_names_the_offline_command(tmp_path: Path) -> None:
    done = run(tmp_path, client_environment(closed_endpoint(), tmp_path / "cache"))
    assert done.returncode == 3
    (line,) = done.stderr.strip().splitlines()
    assert "cannot be reached" in line and "'fusion_bench'" in line
    assert "The same applies to: modelpool.models.sun397, " in line
    assert not list(tmp_path.rglob("report.*"))


def test_a_repository_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "cache")
    model = "modelpool.models.sun397=tanganke/clip-vit-base-patch32_sun379"
    done = run(tmp_path, env, model)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tanganke/clip-vit-base-patch32_sun379" in done.stderr
    done = run(tmp_path, env, "taskpool.test_datasets.sun397.path=tanganke/sun379")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tanganke/sun379" in done.stderr
