"""The verbs that run something: validate, merge, verify, compare and reproduce."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from commandline import fusion_bench
from fixtures_llm import tensors, write_llama

from fusion_bench.problems import FusionBenchError
from fusion_bench.scripts import verbs


@pytest.fixture
def own(tmp_path: Path, program_config: dict[str, Any]) -> Path:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(program_config))
    return tmp_path


def test_a_config_is_validated_and_nothing_is_left(own: Path) -> None:
    done = fusion_bench("validate", "own.yaml", "method=ties", cwd=own)
    assert done.returncode == 0, done.stderr
    assert "Dry run: the config is valid" in done.stdout
    done = fusion_bench("validate", "own.yaml", "seed=abc", "baselines=oll_tasks", cwd=own)
    assert done.returncode == 2
    assert done.stderr == (
        "fusion_bench: seed: 'abc' is not a whole number or null.\n"
        "  baselines: 'oll_tasks' is unknown. Did you mean 'all_tasks'?\n"
    )
    done = fusion_bench("validate", "demo_lang", cwd=own)
    assert done.returncode == 2 and "Did you mean 'demo_language'?" in done.stderr
    assert [path.name for path in own.iterdir()] == ["own.yaml"]


def test_validating_asks_no_network(own: Path) -> None:
    done = fusion_bench("validate", "own.yaml", "modelpool.models.other=owner/other", cwd=own)
    assert done.returncode == 3
    assert "owner/other" in done.stderr and "Traceback" not in done.stderr


def test_two_language_models_become_one(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "gpt-3.5", "other")):
        write_llama(tmp_path / name, seed=seed, dtype=torch.float32)
    words = ["merge", "gpt-3.5", "other", "--base", "base", "--method", "ta", "--out", "merged"]
    done = fusion_bench(*words, "scaling_factor=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base, *models = (tensors(tmp_path / name) for name in ("base", "gpt-3.5", "other"))
    for name, tensor in tensors(tmp_path / "merged").items():
        b = base[name].double()
        exact = b + 0.5 * sum(model[name].double() - b for model in models)
        assert (tensor.double() - exact).abs().max() < 1e-6
    again = fusion_bench(*words, cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
    with pytest.raises(FusionBenchError, match="is one of the models"):
        folder = str(tmp_path / "other")
        verbs.run("merge", [str(tmp_path / "base"), folder, "--out", folder, "--overwrite"])
    again = fusion_bench(*words, "--overwrite", "--dry-run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    run = next(tmp_path.glob("outputs/*/*/report.json"))
    done = fusion_bench("verify", "merged", "--report", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The weights are those of the report" in done.stdout
    assert "_pretrained_: " in done.stdout and "has the files that were merged" in done.stdout
    write_llama(tmp_path / "other", seed=9)
    done = fusion_bench("verify", "merged", cwd=tmp_path)
    assert done.returncode == 1 and "is not the file that was merged" in done.stderr
    report = json.loads(run.read_text())
    report["models"]["merged"]["identity"] = "0" * 64
    (tmp_path / "else.json").write_text(json.dumps(report))
    write_llama(tmp_path / "other", seed=2, dtype=torch.float32)
    (tmp_path / "merged" / "README.md").unlink()
    done = fusion_bench("verify", "merged", "--report", "else.json", cwd=tmp_path)
    assert done.returncode == 1 and "has other weights" in done.stderr
    assert "computed again from the recipe" in done.stdout  # which is in the weights too
    done = fusion_bench("verify", str(tmp_path / "merged"), cwd=tmp_path.parent)
    assert done.returncode == 0 and "computed again from the recipe" in done.stdout  # as elsewhere
    done = fusion_bench("verify", "merged", "--entries", "0", cwd=tmp_path)
    assert done.returncode == 1 and "'merged' is not verified. Nothing was" in done.stderr
    done = fusion_bench("verify", "other", cwd=tmp_path)
    assert done.returncode == 1 and "'other' is not verified. It has no recipe" in done.stderr
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    moved = copytree(tmp_path / "merged", tmp_path / "elsewhere" / "deep" / "merged")
    done = fusion_bench("verify", str(moved), cwd=tmp_path.parent)
    assert done.returncode == 1 and "Nothing was computed again: that needs" in done.stderr
    assert f"('{tmp_path / 'elsewhere' / 'deep' / 'other'}') is not on this mach" in done.stdout
    done = fusion_bench("verify", str(moved), "--report", str(run), cwd=tmp_path.parent)
    assert done.returncode == 0 and "The weights are those of the report" in done.stdout
    assert fusion_bench("verify", str(moved), cwd=tmp_path).returncode == 0  # where it was made
    config = tmp_path / "merged" / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    done = fusion_bench("verify", "merged", cwd=tmp_path)
    assert done.returncode == 1 and "config.json' is not the file that was written" in done.stderr


def test_what_a_merge_needs_is_told_at_once() -> None:
    with pytest.raises(FusionBenchError, match=r"ties_merging needs the model .* Add --base MODEL"):
        verbs.run("merge", ["a", "b", "--method", "ties", "--out", "merged"])
    with pytest.raises(FusionBenchError, match="there is no folder for the merged model"):
        verbs.run("merge", ["a", "b"])


def test_a_run_is_compared_and_reproduced(own: Path) -> None:
    for name, method in {"average": "simple_average", "arithmetic": "ta"}.items():
        run = f"hydra.run.dir={name}"
        done = fusion_bench("own.yaml", f"method={method}", run, "baselines=none", cwd=own)
        assert done.returncode == 0, done.stderr
    names = ["--names", "a", "b.1"]
    done = fusion_bench("compare", "average", "arithmetic", *names, cwd=own)
    assert done.returncode == 0, done.stderr
    assert "b.1" in done.stdout
    done = fusion_bench("reproduce", "average", "hydra.run.dir=again", cwd=own)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 figures are the same" in done.stdout
    assert "the merged weights are the same, bit by bit" in done.stdout
    report = json.loads((own / "average" / "report.json").read_text())
    (task, *_) = report["models"]["merged"]["tasks"].values()
    task["metrics"]["accuracy"]["value"] += 0.01
    (own / "else.json").write_text(json.dumps(report))
    done = fusion_bench("reproduce", "else.json", "hydra.run.dir=third", cwd=own)
    assert done.returncode == 1
    assert "3 of 4 figures are the same" in done.stderr and "accuracy" in done.stdout
    words = ["--tolerance", "0.5", "hydra.run.dir=fourth"]
    done = fusion_bench("reproduce", "else.json", *words, cwd=own)
    assert done.returncode == 0, done.stderr


def test_a_table_is_reproduced_by_name(own: Path) -> None:
    done = fusion_bench("reproduce", "zoo", "--dry-run", "methods=[nothing]", cwd=own)
    assert done.returncode == 2 and "has no 'nothing'" in done.stderr
    done = fusion_bench("reproduce", "zoo", "--tolerance", "1", cwd=own)
    assert done.returncode == 2 and "a table has its own tolerances" in done.stderr


def test_models_are_evaluated_side_by_side(own: Path, family: Path) -> None:
    taskpool = yaml.safe_load((own / "own.yaml").read_text())["taskpool"]
    (own / "taskpool").mkdir()
    (own / "taskpool" / "mine.yaml").write_text(yaml.safe_dump(taskpool))
    (own / "both.yaml").write_text(
        "defaults: [evaluate, {override /modelpool: CLIPVisionModelPool/_template},"
        " {override /taskpool: mine}, _self_]"
    )
    models = [str(family / "models" / name) for name in ("base", "a")]
    done = fusion_bench("both.yaml", f"modelpool.models=[{','.join(models)}]", cwd=own)
    assert done.returncode == 0, done.stderr
    assert " base " in done.stdout and " a " in done.stdout and "merged" not in done.stdout
    report = json.loads(next(own.glob("outputs/*/*/report.json")).read_text())
    assert {name: model["role"] for name, model in report["models"].items()} == {
        "base": "individual",
        "a": "individual",
    }
    words = ["evaluate", *models, "--tasks", "CLIPVisionModelTaskPool/zoo", "max_samples=x"]
    done = fusion_bench(*words, cwd=own)
    assert done.returncode == 2 and "taskpool.max_samples: 'x' is not a" in done.stderr
    done = fusion_bench("evaluate", "nowhere/", "--tasks", "TaskPool/zoo_dense", cwd=own)
    assert done.returncode in (2, 3) and "nowhere/" in done.stderr
