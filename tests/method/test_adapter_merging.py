"""Adapters merged in their factors, held against what PEFT makes of them."""

import json
from collections.abc import Mapping
from itertools import product as pairs
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_peft import made, outputs, read, write_adapter
from safetensors.torch import load_file, save_file

from fusion_bench.method import (
    AdapterMerging,
    DareTiesMerging,
    KnOTSMerging,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.modelpool import AdapterPool, HFModelPool, adapter_folder
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Weights
from fusion_bench.weights.lowrank import LowRankWeights

peft = pytest.importorskip("peft")

#: For two adapters each, what PEFT writes them with.
SETTINGS: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("llama", [{"r": 3, "target_modules": ["q_proj", "down_proj"]}] * 2),
    "other modules": (
        "llama",
        [{"r": 3, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["q_proj", "up_proj"]}],
    ),
    "alpha and rslora": (
        "llama",
        [
            {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]},
            # As the first, PEFT would scale what is merged by the root of its rank.
            {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True},
        ],
    ),
    "conv1d": (
        "gpt2",
        [{"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}] * 2,
    ),
    "embedding": ("llama", [{"r": 2, "target_modules": ["embed_tokens", "v_proj"]}] * 2),
    "convolution": ("clip", [{"r": 2, "target_modules": ["patch_embedding", "q_proj"]}] * 2),
}
#: These have two ranks.
RANKS: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "ranks": (
        "llama",
        [{"r": 2, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj"]}],
    ),
    "patterns": (
        "llama",
        [
            {
                "r": 2,
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"v_proj": 4},
                "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
            },
            {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        ],
    ),
}
EVERY = {**SETTINGS, **RANKS}


def written(case: str, root: Path) -> tuple[str, AdapterPool]:
    family, both = EVERY[case]
    made(family).save_pretrained(root / "base")
    for index, settings in enumerate(both):
        write_adapter(root / "ab"[index], read(family, root / "base"), seed=index, **settings)
    return family, AdapterPool({name: str(root / name) for name in "ab"})


def beside(family: str, root: Path) -> Any:
    """Return the base with both adapters, as PEFT reads them."""
    model = peft.PeftModel.from_pretrained(read(family, root / "base"), root / "a", "a")
    model.load_adapter(root / "b", "b")
    return model.eval()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes longer than all else."""
    monkeypatch.setattr(adapter_folder, "draw", lambda changes, file: None)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("case", EVERY)
def test_it_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    family, pool = written(case, tmp_path)
    model = beside(family, tmp_path)
    combinations: tuple[Any, ...] = ("cat", "svd", "linear")
    for combination, weights in pairs(combinations, ([0.7, 0.4], [1.5, -0.5])):
        method = AdapterMerging(combination, weights)
        if combination == "linear" and case in RANKS:
            with pytest.raises(FusionBenchError, match=r"different ranks .*a 2, b 4"):
                method.check_pool(pool)
            continue
        method.check_pool(pool)
        name = f"{combination} of {weights[0] > 1}".replace(" ", "-")
        model.add_weighted_adapter(["a", "b"], weights, name, combination_type=combination)
        pool.save_model(method.fuse(pool), tmp_path / name)
        model.load_adapter(tmp_path / name, f"own-{name}")
        compared = 0
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                wanted = layer.get_delta_weight(name)
                found = layer.get_delta_weight(f"own-{name}")
                assert (found - wanted).abs().max() < 1e-6, name
                compared += 1
        assert compared >= 2
        answers = []
        for active in (name, f"own-{name}"):
            model.set_adapter(active)
            answers.append(outputs(model))
        assert (answers[0] - answers[1]).abs().max() < 1e-5, name
        # and on the base as a model it is the same
        there = HFModelPool({"_pretrained_": str(tmp_path / "base"), "m": str(tmp_path / name)})
        assert len(there.weights("m"))


def test_linear_factors_are_those_of_peft(tmp_path: Path) -> None:
    family, pool = written("plain", tmp_path)
    merged = AdapterMerging("linear", {"a": 0.7, "b": -0.4}).fuse(pool)
    assert isinstance(merged, LowRankWeights)
    model = beside(family, tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "merged", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    factors = merged.factors["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(factors.b, layer.lora_B["merged"].weight, atol=1e-6)
    assert torch.allclose(factors.a, layer.lora_A["merged"].weight, atol=1e-6)


def products(pool: AdapterPool, key: str) -> list[np.ndarray]:
    return [pool.weights(name)[key].double().numpy() for name in pool.model_names]


def saved(pool: AdapterPool, merged: Weights, root: Path) -> Weights:
    pool.save_model(merged, root / "merged")
    return pool.open_saved(root / "merged")


@pytest.mark.usefixtures("undrawn")
def test_ties_on_products_is_that_of_peft(tmp_path: Path) -> None:
    _, pool = written("plain", tmp_path)
    method = TiesMergingAlgorithm(
        threshold=0.5, scope="tensor", keep="exact_topk", merge_func="mean", show_pbar=False
    )
    got = saved(pool, method.fuse(pool), tmp_path)  # type: ignore[arg-type]
    for key in pool.weights("a"):
        trimmed = []
        for product in products(pool, key):
            least = np.sort(np.abs(product).ravel())[-(product.size // 2)]
            trimmed.append(np.where(np.abs(product) >= least, product, 0))
        sign = np.sign(sum(trimmed))
        agree = [np.where(np.sign(t) == sign, t, 0) for t in trimmed]
        count = np.maximum(sum((a != 0).astype(float) for a in agree), 1)
        u, s, vh = np.linalg.svd(sum(agree) / count)
        exact = (u[:, :3] * s[:3]) @ vh[:3]
        assert np.abs(got[key].numpy() - exact).max() < 1e-6


@pytest.mark.usefixtures("undrawn")
def test_any_method_merges_products(tmp_path: Path) -> None:
    _, pool = written("other modules", tmp_path)
    sums = TaskArithmeticAlgorithm(scaling_factor=0.5, show_pbar=False).fuse(pool)
    wide = AdapterPool({n: str(tmp_path / n) for n in "ab"}, energy=1.0)
    got = saved(wide, sums, tmp_path)  # type: ignore[arg-type]
    for key in pool.weights("a"):
        exact = 0.5 * sum(products(pool, key))
        assert np.abs(got[key].numpy() - exact).max() < 1e-6
    # In common directions TIES of one adapter's changes; the rank stays what the two have.
    knots = KnOTSMerging(scaling_factor=1.0, show_pbar=False).fuse(pool)
    assert isinstance(knots, Weights)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(knots[key], rtol=1e-4) <= 6
    dropped = DareTiesMerging(seed=1, show_pbar=False).fuse(pool)
    assert isinstance(saved(pool, dropped, tmp_path), LowRankWeights)  # type: ignore[arg-type]


@pytest.mark.usefixtures("undrawn")
def test_biases_of_factors_are_merged(tmp_path: Path) -> None:
    made("gpt2").save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    for index, biased in enumerate((True, False)):
        base = read("gpt2", tmp_path / "base")
        write_adapter(tmp_path / "ab"[index], base, seed=index, lora_bias=biased, **settings)
    pool = AdapterPool({name: str(tmp_path / name) for name in "ab"})
    pool.save_model(AdapterMerging(weights=[0.5, 2]).fuse(pool), tmp_path / "merged")
    models = HFModelPool(
        {
            "_pretrained_": str(tmp_path / "base"),
            **{n: str(tmp_path / n) for n in ("a", "b", "merged")},
        },
        model_class="GPT2LMHeadModel",
    )
    base = models.weights("_pretrained_")
    for key in base:
        exact = base[key] + 0.5 * (models.weights("a")[key] - base[key])
        exact += 2 * (models.weights("b")[key] - base[key])
        assert (models.weights("merged")[key] - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "its adapter_config.json has use_dora."),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save (lm_head)."),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices."),
    ],
)
def test_what_is_more_than_products_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", made("llama"), r=2, target_modules=["q_proj"], **settings)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"never read")
    pool = AdapterPool({"a": str(tmp_path / "a")})
    (problem,) = pool.plan(built=False).problems
    assert reason in problem.reason and "extract an adapter of the result" in problem.reason


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    _, pool = written("plain", tmp_path)
    for weights in ([1.0], {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(FusionBenchError) as raised:
            AdapterMerging(weights=weights).check_pool(pool)  # type: ignore[arg-type]
        assert raised.value.problems[0].place[0] == "weights"
    with pytest.raises(FusionBenchError, match="does not shorten"):
        AdapterMerging(rank=3)
    whole = HFModelPool({"a": str(tmp_path / "base")})
    with pytest.raises(FusionBenchError, match="these are whole models"):
        AdapterMerging().check_pool(whole)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_nan_is_refused_or_told(
    combination: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written("plain", tmp_path)
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.self_attn.q_proj"
    tensors[f"base_model.model.{key}.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    models = {name: str(tmp_path / name) for name in "ab"}
    method = AdapterMerging(combination)
    with pytest.raises(FusionBenchError, match=rf"'b' has NaN or infinity in '{key}\.weight'"):
        method.fuse(AdapterPool(models))
    pool = AdapterPool(models, policy={"on_nonfinite": "warn"})
    pool.save_model(method.fuse(pool), tmp_path / "merged")
    assert f"'b' has NaN or infinity in '{key}.weight'" in caplog.text
    told = (tmp_path / "merged" / "adapter_errors.json").read_text()
    assert "NaN" not in told and json.loads(told)["modules"]
