"""A model per expert and one with fused experts are merged as one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import average, rewrite, tensors, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.modelpool.layouts import in_layout_of
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.outline import outlined
from fusion_bench.weights import Regrouped, TensorWeights, in_memory, merge

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
#: A family's config, and what is in the names of a file with one expert an entry.
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "mixtral": (
        lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
        r"block_sparse_moe\.experts\.3\.w2",
    ),
    "qwen2-moe": (
        lambda: transformers.Qwen2MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=20
        ),
        r"mlp\.experts\.3\.up_proj",
    ),
    "qwen3-moe": (
        lambda: transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=12, head_dim=8
        ),
        r"mlp\.experts\.3\.up_proj",
    ),
    "deepseek-v2": (
        lambda: transformers.DeepseekV2Config(**SIZES, **DEEPSEEK),
        r"layers\.1\.mlp\.experts\.3\.up_proj",
    ),
    "deepseek-v3": (
        lambda: transformers.DeepseekV3Config(**SIZES, **DEEPSEEK),
        r"layers\.1\.mlp\.experts\.3\.up_proj",
    ),
    "gpt-oss": (
        lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8),
        r"mlp\.experts\.down_proj",  # its only layout
    ),
}
IDS = torch.arange(10)[None]


def made(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write(model: Any, folder: Path, *, fused: bool) -> dict[str, Tensor]:
    """Write a model in one of its layouts; return what is in its file."""
    model.save_pretrained(folder)
    if fused:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors(folder)


def reference(one: Any, other: Any) -> dict[str, Tensor]:
    """Return the mean of two modules' entries, in float64."""
    others = other.state_dict()
    return {key: (value.double() + others[key]) / 2 for key, value in one.state_dict().items()}


@pytest.mark.parametrize("base", ["apart", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_merge_and_the_result_has_the_bases(
    family: str, base: str, tmp_path: Path
) -> None:
    one, other = made(family, 0), made(family, 1)
    files = {
        "apart": write(one, tmp_path / "apart", fused=False),
        "fused": write(other, tmp_path / "fused", fused=True),
    }
    assert any(re.search(FAMILIES[family][1], key) for key in files["apart"])
    order = sorted(files, key=lambda name: name != base)
    pool = CausalLMPool({name: str(tmp_path / name) for name in order})
    merged = average(pool)
    assert set(merged) == set(files[base])
    pool.save_model(merged, tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == set(files[base])
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    by_hand = made(family, 2)
    by_hand.load_state_dict(reference(one, other))
    with torch.no_grad():
        expected = by_hand(IDS).logits
        assert torch.equal(loaded(IDS).logits, expected)
        assert torch.equal(pool.build_model(merged)(IDS).logits, expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt-oss"])
def test_there_and_back_is_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = made(family, 0)
    apart = write(model, tmp_path / "apart", fused=False)
    fused = write(model, tmp_path / "fused", fused=True)
    there = in_layout_of(TensorWeights(fused), TensorWeights(apart), model)
    back = in_layout_of(TensorWeights(apart), there, model)
    for found, expected in ((in_memory(there), fused), (in_memory(back), apart)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_fused_entry_is_never_read_as_a_whole(tmp_path: Path) -> None:
    model = made("mixtral", 0)
    apart = write(model, tmp_path / "apart", fused=False)
    asked: list[int] = []

    class Watched(TensorWeights):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(key)

        def read(self, key: str, start: int, stop: int) -> Tensor:
            asked.append(stop - start)
            return super().read(key, start, stop)

    weights = in_layout_of(TensorWeights(model.state_dict()), Watched(apart), model)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    found = [weights.read(key, start, stop) for start, stop in weights.pieces(key, 100)]
    assert torch.equal(torch.cat(found).view(4, 48, 16), model.state_dict()[key])
    assert max(asked) == 100 and sum(asked) == 4 * 48 * 16


def test_the_plan_says_so_and_a_method_of_whole_tensors_agrees(tmp_path: Path) -> None:
    models = {name: made("mixtral", seed) for seed, name in enumerate("pab")}
    for name, model in models.items():
        write(model, tmp_path / name, fused=name == "b")
    named = {"_pretrained_": str(tmp_path / "p")}
    pool = CausalLMPool({**named, "a": str(tmp_path / "a"), "b": str(tmp_path / "b")})
    (note,) = [note for note in pool.plan().notes if "layout" in note]
    assert note.startswith(
        "b: its weights are stored in another layout than those of '_pretrained_'"
    )
    assert "experts.0.w1.weight' is read from 'model.layers.0.mlp.experts.gate_up_proj'" in note
    write(models["b"], tmp_path / "same", fused=False)
    alike = CausalLMPool({**named, "a": str(tmp_path / "a"), "b": str(tmp_path / "same")})
    ties = TiesMergingAlgorithm(show_pbar=False)
    found, expected = (in_memory(ties.run(each)) for each in (pool, alike))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("base", ["apart", "fused"])
def test_the_outline_names_models_not_parts(base: str, tmp_path: Path) -> None:
    for seed, name in enumerate(["apart", "fused"]):
        write(made("mixtral", seed), tmp_path / name, fused=name == "fused")
    order = sorted(["apart", "fused"], key=lambda name: name != base)
    pool = CausalLMPool({name: str(tmp_path / name) for name in order})
    models = {name: pool.weights(name) for name in order}
    merged = merge(models, lambda key, tensors, base: tensors[0])
    (line,) = outlined(merged, models).lines
    assert re.fullmatch(rf"all \d+ tensors from {order[0]} and {order[1]}", line)


def test_a_file_with_both_layouts_is_refused(tmp_path: Path) -> None:
    fused = write(made("mixtral", 0), tmp_path / "base", fused=True)
    apart = write(made("mixtral", 1), tmp_path / "both", fused=False)
    both = {**apart, **{key: value for key, value in fused.items() if "experts" in key}}
    save_file(both, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    write(made("mixtral", 2), tmp_path / "apart", fused=False)
    for base in ("base", "apart"):
        pool = CausalLMPool({name: str(tmp_path / name) for name in (base, "both")})
        with pytest.raises(FusionBenchError) as told:
            pool.weights("both")
        assert re.search(
            r"^models\.both: '\S*mlp\.experts\.\S*_proj' and '\S*experts\.0\.w\d\.weight' are the "
            r"same tensor in two layouts, and both are in the file of the model",
            str(told.value),
        )
    pool = CausalLMPool({name: str(tmp_path / name) for name in ("both", "base")})
    with pytest.raises(FusionBenchError, match="both are in the file of the reference"):
        pool.weights("base")


def test_options_by_model_know_an_entry_by_the_models_own_name(tmp_path: Path) -> None:
    """The base has an entry for each expert, the model one for all of them."""
    base = write(made("mixtral", 0), tmp_path / "base", fused=False)
    write(made("mixtral", 1), tmp_path / "a", fused=True)
    pool = CausalLMPool({"_pretrained_": str(tmp_path / "base"), "a": str(tmp_path / "a")})

    def method(**rule: Any) -> TaskArithmeticAlgorithm:
        rules = [{"match": "*gate_up_proj*", **rule}]
        return TaskArithmeticAlgorithm(1, where=rules, show_pbar=False)

    merged = in_memory(method(weights={"a": 0}).run(pool))
    for key, value in merged.items():
        of_rule = re.search(r"experts\.\d\.w[13]", key) is not None
        assert torch.equal(value, base[key]) == of_rule
    with pytest.raises(FusionBenchError, match=r"where\[0\].*matches no entry. The nearest: model"):
        method(scaling_factor=0).run(pool)


def test_origins_are_the_models_own_entries(tmp_path: Path) -> None:
    write(made("mixtral", 0), tmp_path / "fused", fused=True)
    write(made("mixtral", 1), tmp_path / "apart", fused=False)
    pool = CausalLMPool({name: str(tmp_path / name) for name in ("fused", "apart")})
    origins = pool.weights("apart").origins("model.layers.0.mlp.experts.down_proj")
    assert [origin.key for origin in origins] == [
        f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)
    ]


def test_other_numbers_of_experts_are_told_by_the_models_own_names(tmp_path: Path) -> None:
    write(made("mixtral", 0), tmp_path / "fused", fused=True)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
    write(transformers.MixtralForCausalLM(config), tmp_path / "apart", fused=False)
    pool = CausalLMPool({name: str(tmp_path / name) for name in ("fused", "apart")})
    told = (
        r"^models\.apart: 'model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight' and 2 more "
        r"make \[3, 16, 24\].*in the reference 'model\.layers\.0\.mlp\.experts\.down_proj' makes "
        r"\[4, 16, 24\]"
    )
    with pytest.raises(FusionBenchError, match=told):
        pool.weights("apart")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write(made("mixtral", 0), tmp_path / "fused", fused=True)
    apart = write(made("mixtral", 1), tmp_path / "apart", fused=False)
    del apart["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(apart, tmp_path / "apart" / "model.safetensors", metadata={"format": "pt"})
    pool = CausalLMPool({name: str(tmp_path / name) for name in ("fused", "apart")})
    with pytest.raises(FusionBenchError) as told:
        average(pool)
    assert "apart: lacks 'model.layers.1.mlp.experts.gate_up_proj'" in str(told.value)
    assert "apart: has extra model.layers.1.block_sparse_moe.* (7 tensors)" in str(told.value)
    assert "layers.0" not in str(told.value)


def test_a_module_is_written_in_the_layout_of_the_base(tmp_path: Path) -> None:
    """As methods that learn return one."""
    one, other = made("mixtral", 0), made("mixtral", 1)
    files = write(one, tmp_path / "a", fused=False)
    pool = CausalLMPool({"a": str(tmp_path / "a")})
    pool.save_model(other, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == files.keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, other(IDS).logits)


def test_modules_and_files_of_another_layout_are_one_pool(tmp_path: Path) -> None:
    one, other = made("mixtral", 0), made("mixtral", 1)
    write(one, tmp_path / "a", fused=False)
    pool = HFModelPool({"a": str(tmp_path / "a"), "b": other}, "AutoModelForCausalLM")
    merged = in_memory(average(pool))
    key = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    expected = reference(one, other)["model.layers.0.mlp.experts.gate_up_proj"][1, 24:]
    assert torch.equal(merged[key], expected.float())


def test_an_adapter_of_a_base_in_another_layout(tmp_path: Path) -> None:
    write(made("mixtral", 0), tmp_path / "fused", fused=True)
    base = write(made("mixtral", 1), tmp_path / "apart", fused=False)
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    added = write_lora(tmp_path / "lora", base, [module])
    named = {"path": str(tmp_path / "lora"), "base": str(tmp_path / "apart")}
    pool = CausalLMPool({"fused": str(tmp_path / "fused"), "x": named})
    found = pool.weights("x")["model.layers.0.mlp.experts.down_proj"]
    expected = base[f"{module}.weight"].double() + added[f"{module}.weight"]
    torch.testing.assert_close(found[1], expected.float())


def test_an_adapter_of_one_expert_on_a_fused_base(tmp_path: Path) -> None:
    base = write(made("mixtral", 0), tmp_path / "fused", fused=True)
    apart = write(made("mixtral", 0), tmp_path / "apart", fused=False)
    module = "model.layers.0.block_sparse_moe.experts.1.w3"
    added = write_lora(tmp_path / "lora", apart, [module])[f"{module}.weight"]
    named = {"path": str(tmp_path / "lora"), "base": str(tmp_path / "fused")}
    pool = CausalLMPool({"fused": str(tmp_path / "fused"), "x": named})
    weights = in_memory(pool.weights("x"))
    assert weights.keys() == base.keys()
    for key, value in base.items():
        expected = value.double()
        if key == "model.layers.0.mlp.experts.gate_up_proj":
            expected[1, 24:] += added
        torch.testing.assert_close(weights[key], expected.float())
    write_lora(tmp_path / "other", apart, [module])
    file = tmp_path / "other" / "adapter_model.safetensors"
    state = {key.replace("experts.1", "experts.9"): v for key, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(FusionBenchError, match=r"experts\.9\.w3"):
        CausalLMPool({"x": {**named, "path": str(tmp_path / "other")}}).weights("x")


def test_an_adapter_that_names_modules_as_todays_class_does(tmp_path: Path) -> None:
    """Files of ViT have names of another time, and PEFT those of the module that it was put in."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    module, stored = "vit.layers.1.attention.q_proj", tensors(tmp_path / "base")
    state = model.state_dict()
    own = "vit.encoder.layer.1.attention.attention.query.weight"
    assert torch.equal(stored[own], state[f"{module}.weight"]) and own not in state
    added = write_lora(tmp_path / "x", state, [module], base_name=str(tmp_path / "base"))
    expected = stored[own].double() + added[f"{module}.weight"]
    named = {"_pretrained_": str(tmp_path / "base"), "x": str(tmp_path / "x")}
    weights = HFModelPool(named, "AutoModelForImageClassification").weights("x")
    assert weights.keys() == stored.keys()
    torch.testing.assert_close(weights[own], expected.float())
    alone = HFModelPool({"x": str(tmp_path / "x")}, "AutoModelForImageClassification")
    module_of = alone.load_model("x").state_dict()
    torch.testing.assert_close(module_of[f"{module}.weight"], expected.float())


def test_where_transformers_knows_no_conversion_nothing_changes(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if "experts" not in k})
    for name in "ab":
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    state = tensors(tmp_path / "b")
    state["model.layers.0.mlp.odd.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    pool = CausalLMPool({name: str(tmp_path / name) for name in "ab"})
    assert not isinstance(pool.weights("b"), Regrouped)
    with pytest.raises(FusionBenchError, match=r"b: lacks 'model\.layers\.0\.mlp\.up_proj"):
        average(pool)


def test_one_of_both_may_be_in_fp8(tmp_path: Path) -> None:
    """DeepSeek-V3 as it is published: an expert an entry, blocks of fp8, scales beside."""
    one, other = made("deepseek-v3", 0), made("deepseek-v3", 1)
    write(one, tmp_path / "fused", fused=True)
    state, exact = write(other, tmp_path / "fp8", fused=False), {}
    for key in list(state):
        exact[key] = state[key]
        if "_proj" in key and state[key].ndim == 2:
            blocks = [-(-size // 8) for size in state[key].shape]
            scales = torch.rand(blocks) + 0.5
            state[key] = (state[key] * 8).to(torch.float8_e4m3fn)
            state[f"{key}_scale_inv"] = scales
            spread = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
            rows, columns = state[key].shape
            exact[key] = state[key].float() * spread[:rows, :columns]
    save_file(state, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e4m3"}
    rewrite(tmp_path / "fp8", lambda config: config.update(quantization_config=section))
    write(other, tmp_path / "plain", fused=False)
    save_file(exact, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    pools = [
        CausalLMPool({"fused": str(tmp_path / "fused"), "b": str(tmp_path / name)})
        for name in ("fp8", "plain")
    ]
    found, expected = (in_memory(average(pool)) for pool in pools)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any("quantised (fp8)" in note for note in pools[0].plan().notes)
