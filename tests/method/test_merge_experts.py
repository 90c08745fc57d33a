"""Experts that become fewer, against means by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_experts import begun, loaded, logits, pool
from fixtures_llm import VOCABULARY, seeded, tensors, write_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_bench.method import MergeExperts
from fusion_bench.method.merge_experts import grouped
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Model

TYPES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
TEXTS = ["the cat sat on the mat", "a bird flew under the tree"]
EXPERTS = 4


def write_moe(folder: Path, kind: str, *, fused: bool = False, **more: Any) -> None:
    """Write a mixture of four experts, each by itself as in files on the Hub, or all in one."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **more,
    }
    config = getattr(transformers, f"{TYPES[kind]}Config")(**sizes)
    model = seeded(lambda: getattr(transformers, f"{TYPES[kind]}ForCausalLM")(config), 0)
    model.save_pretrained(folder)
    if fused:
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moe")
    for kind in TYPES:
        write_moe(root / kind, kind, mlp_only_layers=[0] if kind == "qwen3_moe" else [])
        write_moe(root / f"{kind}_fused", kind, fused=True)
    return root


def save(method: MergeExperts, models: Any, place: Path) -> dict[str, Tensor]:
    fused = method.fuse(models)
    assert isinstance(fused, Model)
    models.save_model(fused, place)
    return tensors(place)


def by_hand(folder: Path, groups: list[list[list[int]]], shares: Any = None) -> Tensor:
    """Return the logits of a mixture in which means stand for groups of experts."""
    model, m = loaded(folder), len(groups[0])
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        experts, gate = layer.mlp.experts, layer.mlp.gate
        weights = torch.ones(2, EXPERTS).double() if shares is None else shares
        for parameter in ("gate_up_proj", "down_proj"):
            own = getattr(experts, parameter).data
            means = [
                sum(weights[index][e] * own[e] for e in g) / sum(weights[index][e] for e in g)
                for g in groups[index]
            ]
            setattr(experts, parameter, torch.nn.Parameter(torch.stack(means)))
        gate.weight.data = torch.stack([gate.weight.data[g].mean(dim=0) for g in groups[index]])
        gate.top_k = min(gate.top_k, m)
        gate.num_experts = experts.num_experts = m
    return logits(model)


@pytest.mark.parametrize("fused", ["", "_fused"])
@pytest.mark.parametrize("kind", TYPES)
def test_consecutive_experts_become_their_mean(
    places: Path, tmp_path: Path, kind: str, fused: str
) -> None:
    models = pool(places, f"{kind}{fused}")
    written = save(MergeExperts(2, grouping="consecutive"), models, tmp_path / "out")
    before = tensors(places / f"{kind}{fused}")
    assert {key for key in before if ".experts." not in key} <= set(written)
    assert len(written) == len(before) - (0 if fused else 2 * 3 * (2 - (kind == "qwen3_moe")))
    expected = by_hand(places / f"{kind}{fused}", [[[0, 1], [2, 3]]] * 2)
    assert torch.allclose(logits(loaded(tmp_path / "out")), expected, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = {config[key] for key in ("num_experts", "num_local_experts") if key in config}
    assert (counts, config["num_experts_per_tok"]) == ({2}, 2)
    built = models.build_model(MergeExperts(2, grouping="consecutive").fuse(models))
    assert torch.allclose(logits(built).double(), expected, atol=1e-4)


def test_entries_are_read_in_pieces(places: Path) -> None:
    weights = MergeExperts(2).fuse(pool(places, "mixtral_fused")).weights
    for key in weights:
        whole = weights[key].flatten()
        parts = [weights.read(key, *ends) for ends in weights.pieces(key, 100)]
        assert torch.equal(torch.cat(parts).to(whole.dtype), whole)
    key = "model.layers.1.mlp.experts.down_proj"
    assert weights.spec(key).shape == (2, 16, 24)
    assert [origin.key for origin in weights.origins(key)] == [key]
    assert weights.bytes_to_read(key) == 4 * 4 * 16 * 24


@pytest.mark.parametrize("grouping", ["router", "weights"])
@pytest.mark.parametrize("kind", ["mixtral", "mixtral_fused"])
def test_similar_experts_are_found(places: Path, tmp_path: Path, kind: str, grouping: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(places / kind)
    groups = [[[0, 3], [1, 2]], [[0, 1, 2], [3]]]
    for layer, own in zip(model.model.layers, groups, strict=True):
        for members in own:
            for other in members[1:]:
                for tensor in (layer.mlp.gate.weight, *layer.mlp.experts.parameters()):
                    if (tensor is layer.mlp.gate.weight) == (grouping == "router"):
                        tensor.data[other] = 2 * tensor.data[members[0]] + 0.001
    model.save_pretrained(tmp_path / "in")
    if "fused" in kind:
        save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    save(MergeExperts(2, grouping=grouping), pool(tmp_path, "in"), tmp_path / "out")  # type: ignore[arg-type]
    expected = by_hand(tmp_path / "in", groups)
    assert torch.allclose(logits(loaded(tmp_path / "out")), expected, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_experts_count_by_how_often_they_are_chosen(
    places: Path, tmp_path: Path, kind: str
) -> None:
    folder = places / f"{kind}_fused"
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(places / "mixtral")
    counts = torch.zeros(2, EXPERTS).double()
    for text in TEXTS:
        found = model(torch.tensor([begun(tokenizer, text)]), output_router_logits=True)
        for layer, scores in enumerate(found.router_logits):
            for token in scores:
                counts[layer][token.argsort(descending=True)[:3]] += 1
    models = pool(places, f"{kind}_fused", tokenizer=str(places / "mixtral"))
    method = MergeExperts(2, grouping="consecutive", average="usage", prompts=TEXTS)
    save(method, models, tmp_path / "out")
    expected = by_hand(folder, [[[0, 1], [2, 3]]] * 2, counts)
    assert torch.allclose(logits(loaded(tmp_path / "out")), expected, atol=1e-6)


def test_groups_by_average_linkage() -> None:
    similar = torch.tensor([[1.0, 0.1, 0.9, 0.0], [0, 1, 0.2, 0.8], [0, 0, 1, 0.1], [0, 0, 0, 1]])
    similar = torch.maximum(similar, similar.T)
    assert grouped(similar, 2) == [[0, 2], [1, 3]]
    assert grouped(similar, 3) == [[0, 2], [1], [3]]
    assert grouped(similar, 1) == [[0, 1, 2, 3]]
    assert grouped(torch.ones(3, 3), 2) in ([[0, 1], [2]], [[0, 2], [1]], [[0], [1, 2]])


def test_an_expert_that_is_never_chosen_counts_as_the_others_of_its_group(
    places: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(places / "mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2:] = 0
        layer.mlp.gate.weight.data[1] = -layer.mlp.gate.weight.data[0]  # one of the two is positive
    model.save_pretrained(tmp_path / "in")
    models = pool(tmp_path, "in", tokenizer=str(places / "mixtral"))
    method = MergeExperts(2, grouping="consecutive", average="usage", prompts=TEXTS)
    written, before = save(method, models, tmp_path / "out"), tensors(tmp_path / "in")
    key = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    mean = (before[key.format(2)] + before[key.format(3)]) / 2
    assert torch.allclose(written[key.format(1)], mean)


def refusal(method: MergeExperts, models: Any) -> str:
    with pytest.raises(FusionBenchError) as raised:
        method.check_pool(models)
    return str(raised.value)


def test_what_cannot_be_merged_is_refused_by_headers(places: Path, tmp_path: Path) -> None:
    assert refusal(MergeExperts(5), pool(places, "mixtral")) == (
        "num_experts: 5 are more than the 4 experts of 'mixtral'. Choose fewer."
    )
    both = pool(places, "mixtral", "mixtral_fused")
    assert refusal(MergeExperts(2), both).startswith("models: there are 2 models")
    write_moe(tmp_path / "cut", "mixtral")
    stored = tensors(tmp_path / "cut")
    del stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(stored, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    said = refusal(MergeExperts(2), pool(tmp_path, "cut"))
    assert "models.cut: 'model.layers.1.block_sparse_moe.gate.weight' has rows for 4" in said
    from fixtures_experts import write_dense

    write_dense(tmp_path / "dense")
    said = refusal(MergeExperts(2), pool(tmp_path, "dense"))
    assert said.startswith("models.dense: it is a 'llama'.") and "mixtral, qwen2_moe" in said
    with pytest.raises(FusionBenchError, match="prompts: there are none"):
        MergeExperts(2, average="usage")
    with pytest.raises(FusionBenchError, match="num_experts: 0 is not a number of experts"):
        MergeExperts(0)
