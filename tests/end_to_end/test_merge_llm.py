"""Language models merged from the command line, as the config's own comment shows it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from commandline import fusion_bench
from fixtures_llm import TEXT, metadata, nearest, tensors, write_llama
from hub import client_environment, closed_endpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_bench as package
from fusion_bench.report import Report

NAMES = ("base", "a", "b")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `tied/…`, each in one file, and `untied/…`, each in shards."""
    root = tmp_path_factory.mktemp("llm")
    for seed, name in enumerate(NAMES):
        write_llama(root / "tied" / name, seed=seed, tied=True)
        write_llama(root / "untied" / name, seed=seed, shard_size=4000)
    return root


def merge(
    cwd: Path, models: Path, *arguments: str, network: bool = True
) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) if network else client_environment(closed_endpoint(), cwd / "hf")
    env["FUSION_BENCH_CACHE"] = str(cwd / "cache")
    places = [
        f"modelpool.models.{'_pretrained_' if name == 'base' else name}={models / name}"
        for name in NAMES
    ]
    return fusion_bench("--config-name", "merge_llm", *places, *arguments, cwd=cwd, env=env)


def by_hand(models: Path) -> dict[str, torch.Tensor]:
    """Return the task arithmetic in float64."""
    stored = [tensors(models / name) for name in NAMES]
    base, a, b = ({key: value.double() for key, value in model.items()} for model in stored)
    return {key: base[key] + 0.3 * (a[key] - base[key] + b[key] - base[key]) for key in base}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_task_arithmetic(family: Path, tmp_path: Path, kind: str) -> None:
    more = ["modelpool.max_shard_size=4000", "merged_model_save_path=merged"]
    done = merge(
        *(tmp_path, family / kind, "method=task_arithmetic", "report_save_path=r.json"),
        *(more if kind == "untied" else []),
        network=False,
    )
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob("outputs/*/*")
    place = tmp_path / "merged" if kind == "untied" else out / "merged"  # the default
    assert done.stderr == "" and str(place) in done.stdout.replace("\n", "")

    merged, expected = tensors(place), by_hand(family / kind)
    assert nearest(merged, expected)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in merged) == (kind == "untied")
    files = {path.name for path in place.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files
    assert ("model.safetensors.index.json" in files) == (kind == "untied")
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    first, second = (AutoTokenizer.from_pretrained(p) for p in (family / kind / "base", place))
    assert first(TEXT).input_ids == second(TEXT).input_ids

    report = Report.load(out / "report.json")
    assert report == Report.load(tmp_path / "r.json")
    assert report.tasks == {} and not any(model.tasks for model in report.models.values())
    assert report.models["merged"].num_parameters == sum(t.numel() for t in expected.values())
    recipe = json.loads(metadata(next(place.glob("*.safetensors")))["fusion_bench"])
    assert recipe["version"] == package.__version__
    assert recipe["config"] == yaml.safe_load((out / "config.yaml").read_text())
    assert list(recipe["sources"]) == ["_pretrained_", "a", "b"]


def test_a_model_is_replaced_only_on_request_also_by_what_is_made_of_it(
    family: Path, tmp_path: Path
) -> None:
    models = shutil.copytree(family / "tied", tmp_path / "m")
    (models / "a" / "notes.txt").write_text("mine")
    arguments = ["method=task_arithmetic", "merged_model_save_path=m/a"]
    done = merge(tmp_path, models, *arguments)
    assert done.returncode == 2 and "overwrite=true" in done.stderr
    assert str(models / "a") in done.stderr
    before = tensors(family / "tied" / "a")
    assert all(torch.equal(value, before[k]) for k, value in tensors(models / "a").items())
    done = merge(tmp_path, models, *arguments, "overwrite=true")
    assert done.returncode == 2 and "'notes.txt' is not part of a saved model" in done.stderr
    (models / "a" / "notes.txt").unlink()
    done = merge(tmp_path, models, *arguments, "overwrite=true")
    assert done.returncode == 0, done.stderr
    assert nearest(tensors(models / "a"), by_hand(family / "tied"))


@pytest.mark.parametrize(
    ("mistake", "fact"),
    [
        ("modelpool.models.a={models}/aa", "Did you mean '{models}/a'?"),
        ("modelpool.policy.on_dtypes=cast", "Did you mean 'on_dtype'?"),
    ],
)
def test_a_mistake_is_said_in_one_message_and_leaves_nothing(
    family: Path, tmp_path: Path, mistake: str, fact: str
) -> None:
    models = family / "tied"
    done = merge(tmp_path, models, "merged_model_save_path=merged", mistake.format(models=models))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("fusion_bench: ") and fact.format(models=models) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert {path.name for path in tmp_path.glob("outputs/*/*/*")} <= {".hydra", "cli.log"}


def test_without_models_the_message_says_how_to_name_one(tmp_path: Path) -> None:
    done = fusion_bench("--config-name", "merge_llm", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "modelpool.models" in line and "path/to/model" in line


def test_a_dry_run_writes_nothing(family: Path, tmp_path: Path) -> None:
    done = merge(tmp_path, family / "tied", "merged_model_save_path=merged", "dry_run=true")
    assert done.returncode == 0 and "Dry run" in done.stdout and "the merged model" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert [path.name for path in tmp_path.glob("outputs/*/*/*")] == ["cli.log"]
