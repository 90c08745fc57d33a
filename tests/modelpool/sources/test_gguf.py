"""Files of llama.cpp are models: decoded, under the names and in the order of transformers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from fixtures_llm import average, tensors
from gguf.quants import dequantize, quantize
from torch import Tensor

from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import GgufWeights, in_memory

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
}
Q8, Q5, BF16 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "BF16"))
MORE = ("Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
IDS = torch.arange(10)[None]


def made(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def write(
    model: Any, path: Path, kind: str = "llama", type_: Any = None, tokens: bool = False
) -> Path:
    """Write a model as llama.cpp's converter does: its names, its order, its norms."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    path.parent.mkdir(exist_ok=True)
    config = model.config
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        names = ["<unk>", "<s>", "</s>", "\u2581a", "b", "\u2581", "a", "c"]
        names += [f"t{number}" for number in range(config.vocab_size - len(names))]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(number) for number in range(len(names))])
        writer.add_token_types([2, 3, 3, *[1] * (len(names) - 3)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages }}")
        writer.add_token_list(names)
    else:
        writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])

    def add(name: str, values: Tensor) -> None:
        numbers = values.detach().float().contiguous().numpy()
        if type_ is not None and numbers.ndim > 1:
            writer.add_tensor(name, quantize(numbers, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, numbers)

    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)()
    names = {own: name for name, own in get_gguf_hf_weights_map(model, processor).items()}
    for key, values in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith("experts.gate_up_proj"):
            layer = key.split(".")[2]
            for part, half in zip(("gate", "up"), values.chunk(2, dim=1), strict=True):
                add(f"blk.{layer}.ffn_{part}_exps.weight", half)
        elif key.endswith("experts.down_proj"):
            add(f"blk.{key.split('.')[2]}.ffn_down_exps.weight", values)
        elif kind == "llama" and re.search("[qk]_proj", key):
            heads = values.shape[0] // config.head_dim
            pairs = values.reshape(heads, 2, config.head_dim // 2, -1)
            add(names[key], pairs.transpose(1, 2).reshape(values.shape))
        else:
            add(names[key], values + 1 if kind == "gemma2" and "norm" in key else values)
    if kind == "llama":
        writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES),
}


@pytest.mark.parametrize("type_", [None, Q8, Q5, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_reads(kind: str, type_: Any, tmp_path: Path) -> None:
    file = write(made(KINDS[kind]()), tmp_path / "x.gguf", kind, type_)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).state_dict()
    weights = CausalLMPool({"a": str(file)}).weights("a")
    assert expected.keys() - set(weights) <= {"lm_head.weight"}
    for key in weights:
        spec = weights.spec(key)
        plain = type_ is None or len(spec.shape) == 1
        assert spec.dtype == (torch.float32 if plain else torch.bfloat16)
        read = weights.read(key, 0, spec.numel).float()
        assert torch.equal(read.view(spec.shape), expected[key])
        assert torch.equal(weights.read(key, 37, 51).float(), read[37:51])


@pytest.mark.parametrize("name", MORE)
def test_a_type_that_the_library_decodes(name: str, tmp_path: Path) -> None:
    type_ = gguf.GGMLQuantizationType[name]
    values = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).numpy()
    stored = quantize(values, type_)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("a", stored, raw_dtype=type_)
    writer.add_tensor("b", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = GgufWeights(tmp_path / "x.gguf")
    expected = torch.from_numpy(dequantize(stored, type_)).flatten()
    assert torch.equal(weights.read("a", 300, 1200), expected[300:1200])
    assert weights.bytes_to_read("a") == stored.nbytes
    assert torch.equal(weights["b"], torch.from_numpy(values))


def test_a_type_that_is_not_supported_is_named(tmp_path: Path) -> None:
    content = write(made(KINDS["llama"]()), tmp_path / "x.gguf", type_=Q8).read_bytes()
    name = b"output.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    for number, told in ((40, "NVFP4"), (24, "I8"), (250, "250")):
        (tmp_path / "x.gguf").write_bytes(content[:at] + bytes([number]) + content[at + 1 :])
        with pytest.raises(
            FusionBenchError, match=f"has the type {told}, which is not su"
        ) as error:
            CausalLMPool({"a": str(tmp_path / "x.gguf")}).weights("a")
        assert "output.weight'" in str(error.value) and "Download" not in str(error.value)


def test_it_merges_with_the_original_and_is_written_as_that(tmp_path: Path) -> None:
    one, other = made(KINDS["llama"](), 0), made(KINDS["llama"](), 1)
    one.save_pretrained(tmp_path / "a")
    file = write(other, tmp_path / "q" / "x.gguf", type_=Q8)
    pool = CausalLMPool({"a": str(tmp_path / "a"), "b": str(file)})
    assert any("llama.cpp" in note for note in pool.plan().notes)
    pool.save_model(average(pool), tmp_path / "out")
    decoded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", gguf_file="x.gguf", dtype=torch.float32
    ).state_dict()
    exact = {key: (v.double() + decoded[key]) / 2 for key, v in one.state_dict().items()}
    written = tensors(tmp_path / "out")
    assert written.keys() == tensors(tmp_path / "a").keys()
    assert all(torch.equal(written[key], exact[key].float()) for key in written)
    with torch.no_grad():
        found = pool.load_model("b")(IDS).logits.float()
        assert (found - other(IDS).logits).abs().max() < 0.05


def test_alone_it_has_a_config_of_its_own(tmp_path: Path) -> None:
    model = made(KINDS["llama"]())
    file = write(model, tmp_path / "q" / "x.gguf", type_=BF16)
    pool = CausalLMPool({"a": str(file)})
    pool.save_model(pool.weights("a"), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=0.05)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rms_norm_eps"] == model.config.rms_norm_eps == 1e-6
    assert not {"_name_or_path", "id2label", "output_attentions", "return_dict"} & written.keys()


def test_the_tokenizer_in_it_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(made(KINDS["llama"]()), tmp_path / "q" / "x.gguf", tokens=True)
    pool = CausalLMPool({"a": str(file)})
    pool.save_model(pool.weights("a"), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("ab a") == [1, 3, 4, 3]
    assert tokenizer.chat_template == "{{ messages }}"
    assert "has no tokenizer" not in caplog.text
    file = write(made(KINDS["llama"]()), tmp_path / "p" / "x.gguf")
    pool = CausalLMPool({"a": str(file)})
    pool.save_model(pool.weights("a"), tmp_path / "none")
    assert "The merged model has no tokenizer: transformers makes none of" in caplog.text
    assert not (tmp_path / "none" / "tokenizer.json").exists()


def test_experts_and_a_config_beside(tmp_path: Path) -> None:
    """Of the size of experts transformers makes nothing, so the original's config is needed."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    model = made(config)
    file = write(model, tmp_path / "x.gguf", "qwen3moe")
    with pytest.raises(FusionBenchError, match=r"gate_up_proj' is \[4, 64, 64\].*config\.json of"):
        CausalLMPool({"a": str(file)}).weights("a")
    config.save_pretrained(tmp_path)
    weights = in_memory(CausalLMPool({"a": str(file)}).weights("a"))
    state = model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)


def test_what_cannot_be_read_by_the_order_of_rows_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    config.intermediate_size, config.num_key_value_heads, config.head_dim = 128, 2, 16
    config.rms_norm_eps = 1e-5
    file = write(made(config), tmp_path / "x.gguf", "gpt2")
    with pytest.raises(FusionBenchError, match=r"x\.gguf.*(not read here|cannot make a config)"):
        CausalLMPool({"a": str(file)}).weights("a")


def test_an_architecture_of_which_nobody_knows(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "rwkv99")
    writer.add_tensor("a", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FusionBenchError, match="'rwkv99', whose GGUF files are not read"):
        CausalLMPool({"a": str(tmp_path / "x.gguf")}).weights("a")


def test_tensors_that_are_not_there(tmp_path: Path) -> None:
    file = write(made(KINDS["llama"]()), tmp_path / "x.gguf")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"blk.1.ffn_up", b"blk.1.ffn_ux"))
    with pytest.raises(FusionBenchError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        CausalLMPool({"a": str(file)}).weights("a")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(made(KINDS["llama"]()), tmp_path / "x.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf.quants", None)
    with pytest.raises(FusionBenchError, match=r"pip install 'fusion_bench\[gguf\]'"):
        CausalLMPool({"a": str(file)}).weights("a")


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    """Every kind of damage: cut, a byte changed, sizes that no file has."""
    whole = write(made(KINDS["llama"]()), tmp_path / "x.gguf", type_=Q8).read_bytes()
    file = tmp_path / "y.gguf"
    random = torch.Generator().manual_seed(0)
    header = whole.index(b"blk.0.attn_q") + 500
    changes = [whole[:size] for size in (0, 3, 4, 20, 24, 100, header, len(whole) - 40)]
    changes += [whole[:8] + b"\xff" * 8 + whole[16:], whole[:16] + b"\xff" * 8 + whole[24:]]
    for place in torch.randint(4, header, (60,), generator=random).tolist():
        for value in (0, 255):
            changes.append(whole[:place] + bytes([value]) + whole[place + 1 :])
    for content in changes:
        file.write_bytes(content)
        try:
            weights = CausalLMPool({"a": str(file)}).weights("a")
            in_memory(weights)
        except FusionBenchError as error:
            first = str(error).partition("\n")[0]
            assert error.exit_code == 2 and first.startswith("models.a: ") and "y.gguf" in first


def test_a_folder_with_such_a_file_says_how_to_name_it(tmp_path: Path) -> None:
    file = write(made(KINDS["llama"]()), tmp_path / "q" / "x.gguf")
    with pytest.raises(FusionBenchError) as told:
        CausalLMPool({"a": str(tmp_path / "q")}).weights("a")
    (named,) = re.findall(r"Name '(\S+)' as the model", str(told.value))
    assert named == str(file) and CausalLMPool({"a": named}).weights("a")


def test_a_link_to_a_file_is_read_and_it_is_not_changed(tmp_path: Path) -> None:
    file = write(made(KINDS["llama"]()), tmp_path / "x.gguf", type_=Q8)
    before = file.read_bytes()
    shutil.copy(file, tmp_path / "z.gguf")
    stored = GgufWeights(tmp_path / "z.gguf")
    assert stored.architecture == "llama" and stored.files == (tmp_path / "z.gguf",)
    assert stored.bytes_to_read("token_embd.weight") == 48 * 64 // 32 * 34
    _ = stored["token_embd.weight"].add_(1)
    assert (tmp_path / "z.gguf").read_bytes() == before
