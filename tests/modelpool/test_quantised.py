"""Quantised models in a pool: read as numbers, merged like others, written unquantised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import TEXT, average, rewrite, tensors, write_llama, write_lora
from safetensors.torch import save_file
from torch import Tensor

from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import in_memory

State = dict[str, Tensor]
IDS = torch.arange(8)[None]
AWAY = ("quantization_config", "compression_config")


def of_fp8(key: str, weight: Tensor) -> tuple[State, Tensor]:
    """A scale a row, as compressed-tensors keeps it."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {key: codes, f"{key}_scale": scale}, codes.float() * scale


def of_packed(key: str, weight: Tensor) -> tuple[State, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scale = weight.float().abs().amax(dim=1, keepdim=True) / 7
    codes = (weight.float() / scale).round().clamp(-8, 7).to(torch.int8)
    shape = torch.tensor(weight.shape)
    stored = {f"{key}_packed": pack_to_int32(codes, 4), f"{key}_scale": scale}
    return {**stored, f"{key}_shape": shape}, codes.float() * scale


def of_4_bits(key: str, weight: Tensor) -> tuple[State, Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    beside = {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32  # what the library decodes is then not rounded
    return {key: codes, **beside}, dequantize_4bit(codes, state)


def compressed(form: str) -> dict[str, Any]:
    group = {"weights": {"num_bits": 4, "strategy": "channel"}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


KINDS: dict[str, tuple[Callable[[str, Tensor], tuple[State, Tensor]], dict[str, Any]]] = {
    "fp8": (of_fp8, compressed("float-quantized")),
    "packed": (of_packed, compressed("pack-quantized")),
    "4 bits": (of_4_bits, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def quantise(folder: Path, kind: str) -> State:
    """Quantise a model's projections in place; return what they stand for."""
    code, section = KINDS[kind]
    stored: State = {}
    exact = {}
    for key, weight in tensors(folder).items():
        if "_proj" in key and weight.shape[1] == 24:  # rows that fill words
            more, exact[key] = code(key, weight)
            stored |= more
        else:
            stored[key] = exact[key] = weight
    assert len(stored) > len(exact)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(folder, lambda config: config.update(quantization_config=section))
    return exact


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_written_unquantised(kind: str, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed)
    exact = [quantise(tmp_path / "a", kind), tensors(tmp_path / "b")]
    pool = CausalLMPool({name: str(tmp_path / name) for name in "ab"})
    notes = pool.plan().notes
    assert any(note.startswith("a: its weights are quantised (") for note in notes)
    pool.save_model(average(pool), tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written.keys() == exact[1].keys()
    for key, value in written.items():
        expected = (exact[0][key].double() + exact[1][key].double()) / 2
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected, rtol=2**-8, atol=1e-9)
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).keys() & {*AWAY}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(pool.build_model(average(pool))(IDS).logits, loaded(IDS).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_evaluated_as_what_it_stands_for(kind: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "a")
    exact = quantise(tmp_path / "a", kind)
    module = CausalLMPool({"a": str(tmp_path / "a")}).load_model("a")
    state = module.state_dict()
    assert all(torch.equal(state[key], exact[key].bfloat16()) for key in exact)


def test_an_adapter_on_a_base_of_4_bits(tmp_path: Path) -> None:
    """As QLoRA trains it."""
    write_llama(tmp_path / "base")
    exact = quantise(tmp_path / "base", "4 bits")
    module = "model.layers.0.mlp.down_proj"
    added = write_lora(tmp_path / "x", exact, [module], base_name=str(tmp_path / "base"))
    found = CausalLMPool({"x": str(tmp_path / "x")}).weights("x")[f"{module}.weight"]
    expected = exact[f"{module}.weight"].double() + added[f"{module}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-3)


def test_experts_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        dtype="bfloat16",
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
    state = tensors(tmp_path / "b")
    exact = dict(state)
    random = torch.Generator().manual_seed(0)
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(118, 126, shape, generator=random, dtype=torch.uint8)
        state |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        exact[key] = convert_moe_packed_tensors(blocks, scales)
    save_file(state, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "mxfp4"}
    rewrite(tmp_path / "b", lambda config: config.update(quantization_config=section))
    pool = CausalLMPool({name: str(tmp_path / name) for name in "ab"})
    merged, plain = in_memory(average(pool)), tensors(tmp_path / "a")
    assert merged.keys() == plain.keys()
    for key, value in merged.items():
        assert torch.equal(value, ((plain[key].double() + exact[key].double()) / 2).bfloat16())


def test_a_config_that_says_so_of_plain_weights(tmp_path: Path) -> None:
    write_llama(tmp_path / "a")
    section = {"quant_method": "fp8"}
    rewrite(tmp_path / "a", lambda config: config.update(quantization_config=section))
    with pytest.raises(FusionBenchError, match=r"quantised \(fp8\) by its config.json, and no ent"):
        CausalLMPool({"a": str(tmp_path / "a")}).weights("a")


@pytest.mark.parametrize("method", ["gptq", "quanto", "hqq", "modelopt", "bitnet"])
def test_others_are_refused_by_their_names(method: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "a")
    section = {"quant_method": method}
    rewrite(tmp_path / "a", lambda config: config.update(quantization_config=section))
    with pytest.raises(FusionBenchError, match=rf"quantised \({method}\).*\n?.*it was made from"):
        CausalLMPool({"a": str(tmp_path / "a")}).weights("a")
