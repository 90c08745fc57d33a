from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import write_llama
from safetensors.torch import load_file, save_file

from fusion_bench.method import DareTaskArithmetic
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import ResultError
from fusion_bench.programs.recompute import NotComputed, recompute


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A saved merge in bfloat16, and its config."""
    place = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(place / name, seed=seed, dtype=torch.float32)
    models = {"_pretrained_": place / "base", "a": place / "a", "b": place / "b"}
    config: dict[str, Any] = {
        "method": {"_target_": "fusion_bench.method.DareTaskArithmetic", "scaling_factor": 0.5},
        "modelpool": {
            "_target_": "fusion_bench.modelpool.CausalLMPool",
            "models": {name: str(path) for name, path in models.items()},
            "policy": {"dtype": "bfloat16"},
        },
        "seed": 3,
    }
    pool = CausalLMPool(config["modelpool"]["models"], policy={"dtype": "bfloat16"})
    weights = DareTaskArithmetic(0.5, seed=3).fuse(pool)
    pool.save_model(weights, place / "merged", config)
    return place / "merged", config


def test_a_merge_is_what_its_recipe_gives(merged: tuple[Path, dict[str, Any]]) -> None:
    told = recompute(*merged, entries=None)
    count = len(load_file(merged[0] / "model.safetensors"))
    assert (
        told
        == f"{count} of {count} entries, computed again from the recipe, are equal bit for bit."
    )
    told = recompute(*merged, entries=2)
    assert told.startswith(f"2 of {count} entries")


@pytest.mark.parametrize("change", [{"seed": 4}, {"scale": 0.51}])
def test_another_recipe_is_found_out(
    merged: tuple[Path, dict[str, Any]], change: dict[str, Any]
) -> None:
    folder, config = merged
    method = {**config["method"], "scaling_factor": change.get("scale", 0.5)}
    other = {**config, "method": method, "seed": change.get("seed", 3)}
    with pytest.raises(ResultError, match="is not the merge of its recipe"):
        recompute(folder, other, entries=None)


def test_a_changed_entry_is_named(merged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, config = merged
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][1] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResultError, match=r"1 of \d+ entries .*\n.*'model.norm.weight': 1 of "):
        recompute(tmp_path, config, entries=None)


def test_the_base_is_not_taken_for_the_merge(
    merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, config = merged
    base = load_file(folder.parent / "base" / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    near = {  # as far as a small change is from the base in 16 bits: a step in most elements
        key: torch.where(torch.rand(own.shape) < 0.1, own * (1 + 2**-8), own).bfloat16()
        for key, own in tensors.items()
    }
    assert base.keys() == near.keys()
    save_file(near, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResultError, match="is not the merge of its recipe"):
        recompute(tmp_path, config, entries=None)


def test_rounding_on_another_processor_is_no_difference(
    merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, config = merged
    tensors = load_file(folder / "model.safetensors")
    entry = tensors["model.embed_tokens.weight"].view(-1)
    entry[5] = torch.nextafter(entry[5], torch.tensor(1.0, dtype=torch.bfloat16))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = recompute(tmp_path, config, entries=None)
    assert told.endswith("are equal but for rounding in 1 elements.")


def test_classes_of_others_are_not_called(merged: tuple[Path, dict[str, Any]]) -> None:
    folder, config = merged
    node = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    pool = {**config["modelpool"], "models": {"a": [node]}}
    with pytest.raises(NotComputed, match=r"'torch.nn.Linear', which is not run"):
        recompute(folder, {**config, "modelpool": pool}, entries=None)


def test_a_method_that_learns_is_not_run(merged: tuple[Path, dict[str, Any]]) -> None:
    folder, config = merged
    method = {"_target_": "fusion_bench.method.FisherMergingAlgorithm"}
    with pytest.raises(NotComputed, match="learns from data"):
        recompute(folder, {**config, "method": method}, entries=None)
