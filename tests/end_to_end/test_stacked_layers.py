"""Layers of models of different depth, stacked and evaluated from the command line."""

import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from commandline import fusion_bench
from datasets import Dataset
from fixtures_llm import TEXT, VOCABULARY, rewrite, seeded, tensors, write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion_bench.report import Report

DEPTHS = {"a": 3, "b": 5}
#: With no ``_target_`` of its own the run is that of ``merge_llm``.
SLICES = [
    {"models": {"a": [0, 2]}},
    {
        "models": {"a": [2, 3], "b": [3, 4]},
        "base_method": {"_target_": "fusion_bench.method.SlerpMergeAlgorithm", "t": 0.25},
    },
    {"models": {"b": [2, 5]}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two models and a data set of texts."""
    place = tmp_path_factory.mktemp("stacked")
    for seed, (name, depth) in enumerate(DEPTHS.items()):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=depth,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=None,
        )
        seeded(lambda config=config: LlamaForCausalLM(config), seed).save_pretrained(place / name)
        write_tokenizer(place / name)
    Dataset.from_dict({"text": [TEXT, "a dog ran"]}).save_to_disk(str(place / "texts"))
    task = {
        "_target_": "fusion_bench.taskpool.PerplexityTask",
        "dataset": {
            "_target_": "datasets.load_from_disk",
            "dataset_path": str(place / "texts"),
        },
    }
    content = {
        "defaults": ["merge_llm", {"override method": "stacked_layers"}, "_self_"],
        "modelpool": {"models": {name: str(place / name) for name in DEPTHS}},
        "taskpool": {"_target_": "fusion_bench.taskpool.TaskPool", "tasks": {"texts": task}},
        "method": {"slices": SLICES},
        "merged_model_save_path": "stacked",
        "overwrite": True,
        "baselines": "all_tasks",
    }
    (place / "stack.yaml").write_text(yaml.safe_dump(content))
    return place


def run(place: Path, *words: str) -> CompletedProcess[str]:
    env = {**os.environ, "FUSION_BENCH_CACHE": str(place / "cache"), "COLUMNS": "200"}
    return fusion_bench(*words, cwd=place, env=env)


def stacked(place: Path, *words: str) -> CompletedProcess[str]:
    return run(place, "--config-path", str(place), "--config-name", "stack", *words)


def test_from_slices_to_a_verified_model(place: Path) -> None:
    done = stacked(place, "dry_run=true")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "layers 0–1 of a, 2 of a with 3 of b, 2–4 of b → 6 layers; 9.18 K parameters" in told
    assert "model.layers.{3-5}.* (27 tensors) from b (layer {2-4})" in told

    done = stacked(place, "report_save_path=first.json")
    assert done.returncode == 0, done.stderr
    merged = tensors(place / "stacked")
    a, b = (tensors(place / name) for name in DEPTHS)
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    for key in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(merged[key], b[key])
    part = "mlp.up_proj.weight"
    for layer, (model, own) in {1: (a, 1), 3: (b, 2), 5: (b, 4)}.items():
        assert torch.equal(
            merged[f"model.layers.{layer}.{part}"], model[f"model.layers.{own}.{part}"]
        )
    one = a[f"model.layers.2.{part}"].double().flatten()
    other = b[f"model.layers.3.{part}"].double().flatten()
    angle = torch.arccos(one @ other / one.norm() / other.norm())
    want = (torch.sin(0.75 * angle) * one + torch.sin(0.25 * angle) * other) / angle.sin()
    got = merged[f"model.layers.2.{part}"].double().flatten()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    model, info = AutoModelForCausalLM.from_pretrained(place / "stacked", output_loading_info=True)
    assert not any(info.values()) and len(model.model.layers) == 6
    report = Report.load(place / "first.json")
    assert {n: len(m.tasks) for n, m in report.models.items()} == {"a": 1, "b": 1, "merged": 1}
    verified = run(place, "verify", "stacked")
    assert verified.returncode == 0, verified.stderr
    assert "computed again from the recipe" in verified.stdout

    again = stacked(place, "report_save_path=second.json")
    assert again.returncode == 0, again.stderr
    assert "'merged' was evaluated before on texts" in " ".join(again.stdout.split())
    second = Report.load(place / "second.json")
    assert second.models["merged"].tasks == report.models["merged"].tasks


def test_mistakes_have_their_places(place: Path) -> None:
    slices = "method.slices=[{models: {a: [0, 4]}}, {models: {b: [0, 1], c: [0, 1]}}]"
    done = stacked(place, slices, "method@method.base_method=simple_average", "dry_run=true")
    assert done.returncode == 2
    assert "method.slices[1].models.c: Model 'c' is not in the pool. Known: a, b." in done.stderr
    slices = slices.replace("c:", "a:")
    done = stacked(place, slices, "method@method.base_method=simple_average")
    assert done.returncode == 2
    assert "method.slices[0].models.a: there are no layers [0, 4): 'a' has 3" in done.stderr
    done = stacked(place, slices.replace("[0, 4]", "[0, 3]"))
    assert done.returncode == 2
    assert "method.slices[1]: Passthrough takes one model, and here are 2: b, a" in done.stderr
    assert not (place / "other").exists()


def test_models_of_other_depth_are_still_refused_by_other_methods(place: Path) -> None:
    done = stacked(place, "method=simple_average", "merged_model_save_path=other")
    assert done.returncode == 2
    assert "b: num_hidden_layers is 5, in a 3" in done.stderr
    assert "b: has extra model.layers.{3-4}.* (18 tensors)" in done.stderr
    assert "They differ in depth alone: merge equally many layers of each" in done.stderr


def test_models_that_compute_otherwise_are_refused_by_all(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "b", tmp_path / "b")
    rewrite(tmp_path / "b", lambda config: config.update(hidden_act="gelu"))
    done = stacked(place, f"modelpool.models.b={tmp_path / 'b'}", "dry_run=true")
    assert done.returncode == 2
    assert 'b: \'hidden_act\' is "gelu", in a "silu"' in done.stderr
