"""Recipes with a body for each module, on tiny T5s, against values computed by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import Seq2SeqLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import translate
from fusion_bench.weights import Model

POOL = {"_target_": "fusion_bench.modelpool.Seq2SeqLMPool"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=4,
        num_heads=2,
        vocab_size=40,
    )
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.normal_()
        model.save_pretrained(folder / name)
    return folder


def merged(text: str) -> tuple[Model, Seq2SeqLMPool]:
    found = translate(text, POOL)
    pool = instantiate({"_recursive_": False, **found.modelpool}, "modelpool")
    assert isinstance(pool, Seq2SeqLMPool)
    method = instantiate(found.method, "method")
    method.check_pool(pool)
    made = method.fuse(pool)
    assert isinstance(made, Model)
    return made, pool


TEXT = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
modules:
  decoder:
    parameters: {lambda: 0.5}
    slices:
      - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
      - sources:
          - {model: base, layer_range: [2, 3]}
          - {model: b, layer_range: [3, 4], parameters: {weight: 0.3}}
  encoder:
    models: [{model: b, parameters: {weight: [{filter: wo, value: 0.25}, {value: 1}]}}]
  shared:
    models: [{model: a}]
"""


def test_modules_with_slices_and_models(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(models)
    made, pool = merged(TEXT)
    own = {name: pool.weights(name) for name in ("base", "a", "b")}

    def at(key: str, model: str, share: float, here: str = "", there: str = "") -> None:
        base, other = own["base"][here or key].double(), own[model][there or key].double()
        want = base + share * (other - base)
        torch.testing.assert_close(made.weights[key].double(), want, rtol=1e-5, atol=1e-6)

    wi = "decoder.block.{}.layer.2.DenseReluDense.wi.weight".format
    at(wi(0), "a", 0.5)
    at(wi(1), "a", 0.5)
    at(wi(2), "b", 0.5 * 0.3, wi(2), wi(3))
    assert wi(3) not in made.weights
    at("decoder.final_layer_norm.weight", "b", 0.5 * 0.3)
    at("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "a", 0.5)
    for layer in range(4):
        at(f"encoder.block.{layer}.layer.1.DenseReluDense.wi.weight", "b", 1)
        at(f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight", "b", 0.25)
    at("encoder.final_layer_norm.weight", "b", 1)
    at("shared.weight", "a", 1)
    assert made.config is not None
    assert (made.config["num_layers"], made.config["num_decoder_layers"]) == (4, 3)
    pool.save_model(made, tmp_path / "out")
    from transformers import T5ForConditionalGeneration

    loaded, info = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(loaded.decoder.block) == 3 and len(loaded.encoder.block) == 4


def test_modules_of_other_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    text = (
        "merge_method: passthrough\nmodules:\n  encoder: {models: [{model: a}]}\n"
        "  decoder: {models: [{model: b}]}\n  shared: {models: [{model: base}]}"
    )
    made, pool = merged(text)
    homes = {"encoder": "a", "decoder": "b", "shared": "base"}
    for key in made.weights:
        tensor: Tensor = pool.weights(homes[key.split(".")[0]])[key]
        assert torch.equal(made.weights[key], tensor), key


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("middle", "the model has no stack 'middle' and no 'model.middle'."),
        ("shared", "'shared' has no layers. Give null for each model."),
    ],
)
def test_modules_that_are_not_there(
    module: str, said: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    text = (
        "merge_method: passthrough\nmodules:\n  encoder: {models: [{model: a}]}\n"
        f"  {module}: {{slices: [{{sources: [{{model: b, layer_range: [0, 1]}}]}}]}}"
    )
    with pytest.raises(FusionBenchError) as caught:
        merged(text)
    assert said in str(caught.value)
