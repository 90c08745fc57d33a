"""Adapters extracted from models, held against PEFT and against float64."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from fixtures_peft import FAMILIES, outputs, read, write_pair
from safetensors.torch import load_file

from fusion_bench.method import ExtractLora
from fusion_bench.modelpool import HFModelPool, adapter_folder
from fusion_bench.problems import FusionBenchError, ResultError
from fusion_bench.weights import in_memory
from fusion_bench.weights.adapter_builder import AdaptedModel

ATTENTION = "model.layers.0.self_attn.q_proj"


def pool_of(family: str, base: Path, *models: Path) -> HFModelPool:
    named = {f"m{index}": str(model) for index, model in enumerate(models)}
    return HFModelPool({"_pretrained_": str(base), **named}, model_class=FAMILIES[family][0])


def extracted(pool: HFModelPool, method: ExtractLora) -> AdaptedModel:
    made = method.fuse(pool)
    assert isinstance(made, AdaptedModel)
    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes longer than all else."""
    monkeypatch.setattr(adapter_folder, "draw", lambda changes, file: None)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_is_extracted(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = write_pair(family, tmp_path)
    wanted = outputs(read(family, tuned))
    assert (outputs(read(family, base)) - wanted).abs().max() > 1e-2
    pool = pool_of(family, base, tuned)
    ways: tuple[Literal["whole", "factors"], ...] = ("whole", "factors")
    for way in ways:
        model = extracted(pool, ExtractLora(rank=64, embeddings=way))
        assert (outputs(pool.build_model(model)) - wanted).abs().max() < 1e-5, way
        place = tmp_path / way
        pool.save_model(model, place)
        theirs = peft.PeftModel.from_pretrained(read(family, base), place).eval()
        assert (outputs(theirs) - wanted).abs().max() < 1e-5, way
        # Put on its base again, it is the model.
        again = in_memory(pool_of(family, base, place).weights("m0"))
        for key, value in in_memory(pool.weights("m0")).items():
            assert (again[key] - value).abs().max() < 1e-6, way
        for key, value in in_memory(pool.open_saved(place)).items():
            assert torch.equal(value, model.weights[key]), way


def test_a_layer_has_the_best_product_of_its_rank(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path)
    pool = pool_of("llama", base, tuned)
    model = extracted(pool, ExtractLora(rank=3))
    key = f"{ATTENTION}.weight"
    one, other = (pool.weights(name)[key].double().numpy() for name in ("m0", "_pretrained_"))
    u, s, vh = np.linalg.svd(one - other)
    prefix = f"base_model.model.{ATTENTION}"
    b, a = (model.adapter.tensors[f"{prefix}.lora_{side}.weight"] for side in "BA")
    assert np.abs((b @ a).numpy() - (u[:, :3] * s[:3]) @ vh[:3]).max() < 1e-6
    change = next(own for own in model.adapter.changes if own.module == ATTENTION)
    assert change.how == "factors" and change.rank == 3
    assert change.error == pytest.approx(np.sqrt((s[3:] ** 2).sum() / (s**2).sum()), rel=1e-4)
    assert {own.how for own in model.adapter.changes if "norm" in own.module} == {"whole"}


def test_ranks_differ_by_energy(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path)
    pool = pool_of("llama", base, tuned)
    model = extracted(pool, ExtractLora(energy=0.8))
    settings = model.adapter.settings
    ranks = {own.module: own.rank for own in model.adapter.changes if own.how == "factors"}
    assert len(set(ranks.values())) > 1
    pattern = settings["rank_pattern"]
    assert isinstance(pattern, dict) and settings["alpha_pattern"] == pattern
    assert settings["lora_alpha"] == settings["r"]
    assert ranks == {module: pattern.get(module, settings["r"]) for module in ranks}
    for change in model.adapter.changes:
        assert change.error <= np.sqrt(0.2) + 1e-4


def test_what_has_not_changed_is_not_in_the_adapter(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path, lambda name: name == f"{ATTENTION}.weight")
    model = extracted(pool_of("llama", base, tuned), ExtractLora())
    assert [own.module for own in model.adapter.changes] == [ATTENTION]
    assert model.adapter.settings["target_modules"] == [ATTENTION]  # in one of two layers
    assert model.adapter.settings["modules_to_save"] is None


@pytest.mark.usefixtures("undrawn")
def test_a_bias_alone_has_factors_of_zeros(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = write_pair("llama-biases", tmp_path, lambda name: name.endswith("bias"))
    pool = pool_of("llama-biases", base, tuned)
    model = extracted(pool, ExtractLora())
    assert {own.rank for own in model.adapter.changes} == {1}
    pool.save_model(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(read("llama", base), tmp_path / "adapter").eval()
    assert (outputs(theirs) - outputs(read("llama", tuned))).abs().max() < 1e-5


def test_excluded_entries_stay_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = write_pair("llama", tmp_path)
    pool = pool_of("llama", base, tuned)
    model = extracted(pool, ExtractLora(rank=64, exclude_keys=["*norm*", "lm_head*"]))
    assert "stay as they are in the base" in caplog.text and "model.norm" not in "".join(
        model.adapter.tensors
    )
    for key in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.weights[key], pool.weights("_pretrained_")[key])
    left = [own.module for own in model.adapter.changes if own.how == "left"]
    assert len(left) == 6 and {own.error for own in model.adapter.changes if own.how == "left"} == {
        1
    }


def test_a_bfloat16_model_has_bfloat16_factors_and_their_error(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path)
    for folder in (base, tuned):
        read("llama", folder).bfloat16().save_pretrained(folder)
    pool = pool_of("llama", base, tuned)
    model = extracted(pool, ExtractLora(rank=64))
    assert {
        spec.dtype for k in model.adapter.tensors for spec in [model.adapter.tensors.spec(k)]
    } == {torch.bfloat16}
    errors = [own.error for own in model.adapter.changes if own.how == "factors"]
    assert min(errors) > 1e-4 and max(errors) < 1e-2


@pytest.mark.usefixtures("undrawn")
def test_the_adapter_of_a_merge_is_put_on_the_base_and_merged(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path / "one")
    _, other = write_pair("llama", tmp_path / "two", lambda name: "mlp" in name)
    pool = pool_of("llama", base, tuned, other)
    node = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.5}
    method = ExtractLora(node, rank=64)
    method.check_pool(pool)
    pool.save_model(extracted(pool, method), tmp_path / "adapter")
    again = pool_of("llama", base, tmp_path / "adapter")
    for key in pool.weights("m0"):
        zero, one, two = (pool.weights(n)[key].double() for n in ("_pretrained_", "m0", "m1"))
        exact = zero + 0.5 * ((one - zero) + (two - zero))
        assert (again.weights("m0")[key] - exact).abs().max() < 1e-6


def test_the_folder_tells_what_is_missing(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path)
    pool = pool_of("llama", base, tuned)
    model = extracted(pool, ExtractLora(rank=2))
    pool.save_model(model, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_errors.json",
        "adapter_errors.png",
        "adapter_model.safetensors",
    }
    told = json.loads((tmp_path / "adapter" / "adapter_errors.json").read_text())["modules"]
    assert len(told) == len(model.adapter.changes)
    assert (tmp_path / "adapter" / "adapter_errors.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "PeftModel.from_pretrained(base, name)" in card
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == set(model.adapter.tensors)


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair("llama", tmp_path)
    with pytest.raises(FusionBenchError, match="there are 2 models"):
        ExtractLora().check_pool(pool_of("llama", base, tuned, base))
    with pytest.raises(ResultError, match="No layer of the model differs"):
        ExtractLora().fuse(pool_of("llama", base, base))
    with pytest.raises(FusionBenchError, match="needs"):
        ExtractLora().check_pool(HFModelPool({"a": str(tuned)}))
    with pytest.raises(FusionBenchError, match="not a method"):
        ExtractLora(base_method=3)
