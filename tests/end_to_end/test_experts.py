"""Mixtures of experts from the command line: merged, written, evaluated and made smaller."""

import json
from pathlib import Path

import pytest
import yaml
from commandline import fusion_bench
from fixtures_experts import PROMPTS, loaded, logits, write_dense
from fixtures_llm import tensors

from fusion_bench.report import Report

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_dense(tmp_path / name, seed=seed)
    return tmp_path


def test_a_mixture_is_evaluated_beside_its_inputs(dense: Path) -> None:
    """As the page shows it, with untrained models in place of the zoo's, which take minutes."""
    file = REPOSITORY / "config" / "_get_started" / "language_experts.yaml"
    names = {"_pretrained_": "base", "capitals": "a", "mood": "b", "number": "a"}
    done = fusion_bench(
        *(str(file), *(f"modelpool.models.{name}=./{own}" for name, own in names.items())),
        *("fast_dev_run=true", "merged_model_save_path=out", "report_save_path=r.json"),
        cwd=dense,
    )
    assert done.returncode == 0, done.stderr
    report = Report.load(dense / "r.json")
    assert set(report.tasks) == {"capitals", "mood", "number"}
    assert len(report.models) == 5 and "merged" in report.models
    assert all(set(model.tasks) == set(report.tasks) for model in report.models.values())
    assert report.models["merged"].num_parameters > report.models["mood"].num_parameters
    config = json.loads((dense / "out" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 3

    done = fusion_bench(
        *("--config-name", "merge_llm", "method=experts/merge", "method.num_experts=2"),
        *("modelpool.models.mixture=./out", "merged_model_save_path=smaller"),
        cwd=dense,
    )
    assert done.returncode == 0, done.stderr
    assert loaded(dense / "smaller").config.num_local_experts == 2


def test_a_dry_run_tells_what_the_mixture_is_made_of(dense: Path) -> None:
    (dense / "mixture.yaml").write_text(
        yaml.safe_dump(
            {
                "defaults": ["merge_llm", {"override method": "experts/mixture"}, "_self_"],
                "modelpool": {"models": {"_pretrained_": "base", "a": "a", "b": "b"}},
                "method": {
                    "experts": [
                        {"model": name, "positive_prompts": PROMPTS[name]} for name in ("a", "b")
                    ]
                },
                "merged_model_save_path": "out",
            }
        )
    )
    done = fusion_bench("mixture.yaml", "dry_run=true", cwd=dense)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "MixtureOfExperts" in said and "block_sparse_moe" in said
    assert not (dense / "out").exists()
    done = fusion_bench("mixture.yaml", cwd=dense)
    assert done.returncode == 0, done.stderr
    written = tensors(dense / "out")
    assert sum(tensor.nbytes for tensor in written.values()) > 0
    assert logits(loaded(dense / "out")).isfinite().all()


def test_a_mistake_is_told_in_a_line_with_its_true_place(dense: Path) -> None:
    write_dense(dense / "wide", intermediate_size=32)
    models = ["modelpool.models.a=a", "modelpool.models.b=wide"]
    merge = ["--config-name", "merge_llm", *models, "merged_model_save_path=out"]
    done = fusion_bench(*merge, "method=experts/mixture", "method.gate=random", cwd=dense)
    assert done.returncode == 2
    assert done.stderr.startswith("fusion_bench: modelpool.models.b: 'model.layers.0.mlp.")
    assert done.stderr.count("\n") == 1
    done = fusion_bench(*merge, "method=experts/mixture", cwd=dense)
    assert done.returncode == 2
    assert "method.experts: the expert 'a' has no positive_prompts" in done.stderr
    assert "choose method.gate=random" in done.stderr
    done = fusion_bench(*merge, "method=experts/merge", "method.num_experts=2", cwd=dense)
    assert done.returncode == 2
    assert done.stderr.startswith("fusion_bench: modelpool.models: there are 2 models")
    missing = ["--config-name", "merge_llm", "modelpool.models.a=./aa", "modelpool.models.b=./b"]
    done = fusion_bench(*missing, "method=experts/mixture", "method.gate=random", cwd=dense)
    assert done.returncode == 2
    assert "modelpool.models.a: There is no such directory: './aa'." in done.stderr
