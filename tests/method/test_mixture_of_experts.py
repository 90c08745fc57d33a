"""Mixtures of dense models, against dense models whose MLPs are mixed by hand in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_experts import PROMPTS, ByHand, begun, loaded, logits, pool, states, write_dense
from fixtures_llm import rewrite, tensors
from torch import Tensor
from transformers import AutoTokenizer

from fusion_bench.method import MixtureOfExperts
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Model

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
EXPERTS = [{"model": name, "positive_prompts": own} for name, own in PROMPTS.items()]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    for family in FAMILIES:
        for seed, name in enumerate(("base", *PROMPTS)):
            more: dict[str, Any] = {"tie_word_embeddings": family == "qwen3"}
            if family == "llama":
                more["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
                more["head_dim"] = 4
            if family == "mistral":
                more["sliding_window"] = 3
            write_dense(root / family / name, family, seed=seed, **more)
    return root


def save(method: MixtureOfExperts, models: Any, place: Path) -> dict[str, Tensor]:
    fused = method.fuse(models)
    assert isinstance(fused, Model)
    models.save_model(fused, place)
    return tensors(place)


def mixed(folder: Path, rows: list[Tensor], names: tuple[str, ...] = ("a", "b", "c")) -> Tensor:
    """Return the logits of the base with its MLPs replaced by hand."""
    base = loaded(folder / "base")
    dense = [loaded(folder / name) for name in names]
    for index, layer in enumerate(base.model.layers):
        own = [model.model.layers[index].mlp for model in dense]
        layer.mlp = ByHand(own, rows[index], 2)
    return logits(base)


def rows_by_hand(folder: Path, mean: bool = False) -> list[Tensor]:
    base = loaded(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "llama" / "base")
    each = [states(base, prompts, tokenizer, mean) for prompts in PROMPTS.values()]
    return [torch.stack([v[i] / v[i].norm() for v in each]) for i in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_chooses_experts_by_hidden_states(
    places: Path, tmp_path: Path, family: str
) -> None:
    # transformers makes a tokenizer of Qwen's own out of any files beside a Qwen2.
    models = pool(places / family, "base", *PROMPTS, tokenizer=str(places / "llama" / "base"))
    written = save(MixtureOfExperts(EXPERTS), models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == FAMILIES[family]
    expected = mixed(places / family, rows_by_hand(places / family))
    assert torch.allclose(logits(loaded(tmp_path / "out")), expected, atol=1e-6)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_model_compute_what_it_does(
    places: Path, tmp_path: Path, family: str
) -> None:
    method = MixtureOfExperts(num_experts=3, gate="random", seed=1)
    save(method, pool(places / family, "a"), tmp_path / "out")
    result, dense = loaded(tmp_path / "out"), loaded(places / family / "a")
    assert torch.allclose(logits(result), logits(dense), atol=1e-6)


def test_what_is_told_of_other_states_and_experts(places: Path, tmp_path: Path) -> None:
    folder = places / "llama"
    models = pool(folder, "base", *PROMPTS)
    save(MixtureOfExperts(EXPERTS, state="mean"), models, tmp_path / "mean")
    expected = mixed(folder, rows_by_hand(folder, mean=True))
    assert torch.allclose(logits(loaded(tmp_path / "mean")), expected, atol=1e-6)

    negative = [
        {"model": "a", "positive_prompts": PROMPTS["a"], "negative_prompts": PROMPTS["b"]},
        {"model": "b", "positive_prompts": PROMPTS["b"]},
    ]
    written = save(MixtureOfExperts(negative), models, tmp_path / "negative")
    base, tokenizer = loaded(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    plus, minus = (states(base, PROMPTS[name], tokenizer) for name in "ab")
    for layer in range(2):
        row = plus[layer] - minus[layer]
        found = written[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        assert torch.allclose(found[0], row / row.norm(), atol=1e-6)
        assert torch.allclose(found[1], minus[layer] / minus[layer].norm(), atol=1e-6)


def test_the_router_of_embeddings_is_alike_in_all_layers(places: Path, tmp_path: Path) -> None:
    folder = places / "llama"
    models = pool(folder, "base", *PROMPTS)
    written = save(MixtureOfExperts(EXPERTS, gate="embedding"), models, tmp_path / "out")
    embeddings = tensors(folder / "base")["model.embed_tokens.weight"].double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for index, prompts in enumerate(PROMPTS.values()):
        row = sum(embeddings[token] for p in prompts for token in begun(tokenizer, p))
        assert isinstance(row, Tensor)
        for layer in range(2):
            found = written[f"model.layers.{layer}.block_sparse_moe.gate.weight"][index].double()
            assert torch.allclose(found, row / row.norm(), atol=1e-6)


def test_experts_are_scaled_and_get_noise(places: Path, tmp_path: Path) -> None:
    folder = places / "llama"
    experts = ["a", {"model": "a", "noise": 0.0, "scale": 0.5}]
    method = MixtureOfExperts(experts, gate="random", noise=0.5, seed=0)
    written = save(method, pool(folder, "a"), tmp_path / "out")
    again = method.fuse(pool(folder, "a")).weights
    dense = tensors(folder / "a")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    noise = []
    for name, part in names.items():
        own = dense[f"model.layers.1.mlp.{part}.weight"]
        key = "model.layers.1.block_sparse_moe.experts.{}." + f"{name}.weight"
        assert torch.equal(written[key.format(1)], own * (0.5 if name == "w2" else 1))
        assert torch.equal(again[key.format(0)], written[key.format(0)])
        assert torch.equal(again.read(key.format(0), 5, 9), written[key.format(0)].flatten()[5:9])
        noise.append((written[key.format(0)] - own).flatten())
    drawn = torch.cat(noise)
    assert abs(float(drawn.std()) - 0.5) < 0.05 and abs(float(drawn.mean())) < 0.05
    other = MixtureOfExperts(experts, gate="random", noise=0.5, seed=1).fuse(pool(folder, "a"))
    assert not torch.equal(other.weights[key.format(0)], written[key.format(0)])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_shared_expert_reads_every_token(places: Path, tmp_path: Path, family: str) -> None:
    folder, tokens = places / family, str(places / "llama" / "base")
    models = pool(folder, "base", *PROMPTS, tokenizer=tokens)
    shared = {"model": "c", "positive_prompts": PROMPTS["c"], "scale": 0.1}
    method = MixtureOfExperts(EXPERTS[:2], shared_expert=shared)
    save(method, models, tmp_path / "out")
    result = loaded(tmp_path / "out")
    assert result.config.model_type == "qwen2_moe"

    rows, base = rows_by_hand(folder), loaded(folder / "base")
    dense = [loaded(folder / name) for name in "abc"]
    for index, layer in enumerate(base.model.layers):
        one, two, every = (model.model.layers[index].mlp for model in dense)

        def often(token: Tensor, row: Tensor = rows[index][2], mlp: Any = every) -> Tensor:
            share = 1 / (1 + torch.exp(-(row @ token)))
            return share * 0.1 * mlp(token[None])[0]

        layer.mlp = ByHand([one, two], rows[index][:2], 2, often)
    assert torch.allclose(logits(result), logits(base), atol=1e-6)


def test_entries_are_views_in_the_type_of_the_policy(places: Path, tmp_path: Path) -> None:
    models = pool(places / "llama", "base", "a", "b", policy={"dtype": "bfloat16"})
    fused = MixtureOfExperts(gate="random").fuse(models)
    key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    (origin,) = fused.weights.origins(key)
    assert origin.key == "model.layers.0.mlp.gate_proj.weight"
    assert origin.weights.files == models.weights("b").files
    models.save_model(fused, tmp_path / "out")
    assert {own.dtype for own in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def refusal(method: MixtureOfExperts, models: Any) -> str:
    with pytest.raises(FusionBenchError) as raised:
        method.check_pool(models)
    return str(raised.value)


def test_models_that_do_not_fit_are_refused_by_headers(places: Path, tmp_path: Path) -> None:
    random = MixtureOfExperts(gate="random")
    write_dense(tmp_path / "wide", intermediate_size=32)
    write_dense(tmp_path / "deep", num_hidden_layers=3)
    write_dense(tmp_path / "biased", attention_bias=True)
    write_dense(tmp_path / "mlp", mlp_bias=True)
    write_dense(tmp_path / "gelu", hidden_act="gelu")
    write_dense(tmp_path / "a")

    said = refusal(random, pool(tmp_path, "a", "wide"))
    assert "models.wide: 'model.layers.0.mlp.down_proj.weight' is [16, 32]" in said
    assert "[16, 24]" in said and "'a'" in said
    assert "models.deep: it has 3 layers, 'a' has 2." in refusal(
        random, pool(tmp_path, "a", "deep")
    )
    said = refusal(random, pool(tmp_path, "biased", "a"))
    assert "models.biased: 'model.layers.0.self_attn.k_proj.bias' has no place in a" in said
    assert "models.mlp: 'model.layers.0.mlp." in refusal(random, pool(tmp_path, "a", "mlp"))
    assert "models.gelu: its activation is gelu" in refusal(random, pool(tmp_path, "a", "gelu"))
    rewrite(tmp_path / "gelu", lambda config: config.update(model_type="gemma"))
    assert "models.gelu: it is a 'gemma'" in refusal(random, pool(tmp_path, "gelu", "a"))
    qwen = pool(places / "qwen2", "a", "b")
    assert "layout: a 'qwen2' does not become a 'mixtral'. Choose layout=qwen2_moe." in refusal(
        MixtureOfExperts(gate="random", layout="mixtral"), qwen
    )
    said = refusal(
        MixtureOfExperts(gate="random", layout="mixtral", shared_expert="a"),
        pool(places / "llama", "a", "b"),
    )
    assert "shared_expert: a 'mixtral' has no shared expert." in said
    assert "or choose layout=qwen2_moe" in said
    said = refusal(MixtureOfExperts(gate="random", shared_expert="a"), pool(places / "qwen3", "a"))
    assert "experts_per_token: 2 experts a token, and there are 1." in said
    said = refusal(
        MixtureOfExperts(gate="random", shared_expert="a", num_experts=2),
        pool(places / "qwen3", "a"),
    )
    assert "has no shared expert. Remove it, or use other models." in said
    said = refusal(
        MixtureOfExperts(gate="random", layout="qwen2_moe"), pool(places / "mistral", "a", "b")
    )
    assert "models.a: its attention has a window of 3 tokens" in said


def test_experts_that_are_named_wrongly_are_refused(places: Path, tmp_path: Path) -> None:
    models = pool(places / "llama", "base", "a", "b")
    assert "experts: the expert 'a' has no positive_prompts" in refusal(MixtureOfExperts(), models)
    said = refusal(MixtureOfExperts(["a", "bb"], gate="random"), models)
    assert said.startswith("experts[1].model: there is no model 'bb'.")
    said = refusal(MixtureOfExperts(num_experts=3, gate="random"), models)
    assert said.startswith("num_experts: 3 for 2 experts.")
    with pytest.raises(FusionBenchError) as raised:
        MixtureOfExperts([{"model": "a", "positive_prompt": ["x"], "noise": -1}, 3])  # type: ignore[list-item]
    said = str(raised.value)
    assert (
        "experts[0].positive_prompt: there is no such key. Did you mean 'positive_prompts'?" in said
    )
    assert "experts[0].noise: -1 is less than 0" in said and "experts[1]: 3 is no expert" in said
    same = [{"model": n, "positive_prompts": ["a"], "negative_prompts": ["a"]} for n in "ab"]
    with pytest.raises(FusionBenchError, match="prompts of 'a' cancel"):
        MixtureOfExperts(same).fuse(models)
    (places / "llama" / "a" / "tokenizer.json").rename(tmp_path / "t.json")
    try:
        said = refusal(MixtureOfExperts(EXPERTS[:2]), pool(places / "llama", "a", "b"))
    finally:
        (tmp_path / "t.json").rename(places / "llama" / "a" / "tokenizer.json")
    assert "the pool has no tokenizer" in said
