"""Formats that are not merged are called by their names."""

import json
import re
from pathlib import Path

import pytest
import torch
from fixtures_llm import rewrite, write_bert
from fixtures_weights import weights
from safetensors.torch import save_file
from torch import Tensor

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import locate
from fusion_bench.weights import open_checkpoint, open_repository, quantised
from fusion_bench.weights.adapter_config import AdapterConfig
from fusion_bench.weights.formats import foreign_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


def refusal(folder: Path) -> str:
    with pytest.raises(FusionBenchError) as refused:
        open_repository(locate(str(folder)))
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model-Q4_K_M.gguf", "llama.cpp.*use the original model"),
        ("MODEL.GGUF", "llama.cpp"),
        ("ggml-model-q4_0.bin", "llama.cpp"),
        ("model.onnx", "exported for inference"),
        ("onnx/model.onnx", "'onnx' is exported for inference"),
        ("openvino_model.xml", "exported for inference"),
        ("tf_model.h5", r"TensorFlow.*from_tf=True"),
        ("flax_model.msgpack", r"Flax.*from_flax=True"),
        ("saved_model.pb", "TensorFlow graph"),
        ("rust_model.ot", "rust-bert"),
        ("weights.npz", "NumPy"),
        ("__0_0.distcp", r"dcp_to_torch"),
        ("mp_rank_00_model_states.pt", "DeepSpeed.*zero_to_fp32"),
        ("model_index.json", "diffusers pipeline"),
        ("consolidated.00.pth", r"Name one of its files: '.*consolidated\.00\.pth'"),
        ("pytorch_model.pt", r"Name one of its files: '.*pytorch_model\.pt'"),
    ],
)
def test_what_a_folder_holds_instead_of_weights(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert re.search(told, refusal(tmp_path))


def test_the_part_of_a_pipeline_that_is_named_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("vae", "unet"):
        (tmp_path / part).mkdir()
        name = "diffusion_pytorch_model.safetensors"
        save_file({"w": torch.ones(2)}, tmp_path / part / name)
    assert f"such as '{tmp_path}/unet'" in refusal(tmp_path)
    assert list(open_repository(locate(str(tmp_path / "unet")))) == ["w"]


def test_the_folder_of_an_older_sentence_transformer(tmp_path: Path) -> None:
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "modules.json").write_text("[]")
    assert f"Name that: '{tmp_path}/0_Transformer'" in refusal(tmp_path)


def test_several_files_of_which_none_is_the_model(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    assert f"Name one of its files: '{tmp_path}/a.safetensors'" in refusal(tmp_path)
    assert list(open_checkpoint(tmp_path / "a.safetensors")) == ["w"]


def test_several_gguf_files_are_not_told_as_one() -> None:
    told = foreign_folder(["b.gguf", "a.gguf"], [], "x")
    assert told is not None and "one of the 2 such files, for example 'x/a.gguf', as the" in told
    assert "pip install" not in told  # it is installed here
    assert told.endswith("or use the original model.")


def test_a_repository_is_fetched_first() -> None:
    told = foreign_folder(["a.pt"], [], "o/n", on_hub=True)
    assert told is not None and "'hf download o/n --local-dir FOLDER'" in told
    assert foreign_folder(["notes.txt"], [], "o/n") is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "step.ckpt"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GGUF\x03\0\0\0" + bytes(40), "is a GGUF file.*use the original"),
        (b"tjgg" + bytes(40), "is a GGML file"),
        (LFS, "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "is HDF5"),
        (b"\x1f\x8b\x08" + bytes(40), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), "compressed with zstd"),
        (b"\x93NUMPY" + bytes(40), "NumPy"),
    ],
)
def test_what_a_file_is_instead(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FusionBenchError, match=told) as refused:
        open_checkpoint(tmp_path / name)
    assert "Delete" not in str(refused.value)


@pytest.mark.parametrize(
    ("named", "right"),
    [("model.safetensors", "model.bin"), ("pytorch_model.bin", "pytorch_model.safetensors")],
)
def test_a_file_of_the_other_kind_can_be_renamed(tmp_path: Path, named: str, right: str) -> None:
    if named.endswith(".bin"):
        save_file({"w": torch.ones(2)}, tmp_path / named)
    else:
        torch.save({"w": torch.ones(2)}, tmp_path / named)
    with pytest.raises(FusionBenchError, match=f"Rename it to '{right}'"):
        open_checkpoint(tmp_path / named)
    (tmp_path / named).rename(tmp_path / right)
    assert list(open_checkpoint(tmp_path / right)) == ["w"]


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx", "tf_model.h5", "model.msgpack"])
def test_a_file_that_is_named_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x08\x07" + bytes(40))
    with pytest.raises(FusionBenchError, match=f"{name}' (is|holds|has)"):
        open_checkpoint(tmp_path / name)


FLOAT8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
INT8, UINT8 = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4, dtype=torch.uint8)
INT32 = torch.ones(4, 4, dtype=torch.int32)
ONE = torch.ones(1)
QUANTISED: list[tuple[str, dict[str, Tensor]]] = [
    ("fp8 with scales", {"a.weight": FLOAT8, "a.weight_scale_inv": ONE}),
    ("fp8 with scales", {"a.weight": FLOAT8, "a.weight_scale": ONE}),
    ("fp8 with scales", {"a.weight": FLOAT8, "a.input_scale": ONE}),
    ("fp8 with scales", {"a.weight": FLOAT8, "a.scale_weight": ONE}),
    ("fp8 with scales", {"experts": FLOAT8, "experts_scale_inv": ONE}),
    ("integers with scales", {"a.weight": INT8, "a.weight_scale": ONE}),
    ("GPTQ", {"a.qweight": INT32, "a.g_idx": INT32, "a.scales": ONE}),
    ("GPTQ or AWQ", {"a.qweight": INT32, "a.qzeros": INT32, "a.scales": ONE}),
    ("bitsandbytes, 4", {"a.weight": UINT8, "a.weight.quant_state.bitsandbytes__nf4": UINT8}),
    ("bitsandbytes, 8", {"a.weight": INT8, "a.SCB": ONE}),
    ("EXL2", {"a.q_weight": INT32, "a.q_scale": INT32}),
    ("EXL3", {"a.trellis": torch.ones(4, dtype=torch.int16), "a.suh": ONE}),
    ("compressed-tensors", {"a.weight_packed": INT32, "a.weight_scale": ONE}),
    ("MXFP4", {"a.proj_blocks": UINT8, "a.proj_scales": UINT8}),
    ("HQQ", {"a.W_q": UINT8, "a.scale": ONE}),
    ("Quanto", {"a.weight._data": INT8, "a.weight._scale": ONE}),
    ("AQLM", {"a.codes": INT8, "a.codebooks": ONE}),
    ("MLX", {"a.weight": torch.ones(4, dtype=torch.uint32), "a.scales": ONE}),
]


@pytest.mark.parametrize(("name", "state"), QUANTISED, ids=range(len(QUANTISED)))
def test_weights_that_mean_nothing_without_their_scales(
    name: str, state: dict[str, Tensor]
) -> None:
    told = quantised(weights(**state))
    assert told is not None and told.startswith(name)
    assert set(re.findall("'(.+?)'", told)) <= set(state)


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": FLOAT8, "b.weight": torch.ones(2)},
        {"a.weight": torch.ones(2), "a.scale": ONE},
        {"position_ids": torch.arange(4), "logit_scale": ONE},
        {"attn.bias": UINT8, "attn.scale": ONE},
        {"attn.index": INT32, "attn.index_scale": ONE},
    ],
)
def test_weights_that_mean_something(state: dict[str, Tensor]) -> None:
    assert quantised(weights(**state)) is None


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("method", [None, "modelopt"])
def test_nobody_is_told_to_merge_without_scales(
    tmp_path: Path, method: str | None, of_all: bool, as_file: bool
) -> None:
    """The scales were an extra entry, and `on_extra=drop on_dtype=cast` the advice."""
    config = {"quantization_config": {"quant_method": method}} if method else {}
    for seed, name in enumerate("ab"):
        state = write_bert(tmp_path / name, seed=seed)
        if name == "b" or of_all:
            key = "encoder.layer.0.attention.self.query.weight"
            state[key] = state[key].to(torch.float8_e4m3fn)
            state[f"{key}_scale_inv"] = ONE
            rewrite(tmp_path / name, lambda c: c.update(config))
            save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    file = "/model.safetensors" if as_file else ""
    pool = HFModelPool({name: f"{tmp_path}/{name}{file}" for name in "ab"})
    with pytest.raises(FusionBenchError, match=r"models\.[ab].*is quantised") as refused:
        SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert not re.search("cast|drop", str(refused.value))


def test_plain_fp8_is_merged_with_its_like(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        state = write_bert(tmp_path / name, seed=seed)
        state = {key: value.to(torch.float8_e5m2) for key, value in state.items()}
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    pool = HFModelPool({name: str(tmp_path / name) for name in "ab"})
    assert SimpleAverageAlgorithm(show_pbar=False).run(pool)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("IA3", "merge_and_unload"),
        ("VERA", "merge_and_unload"),
        ("PROMPT_TUNING", "not its weights"),
        ("XLORA", "not its weights"),
    ],
)
def test_an_adapter_of_another_kind(tmp_path: Path, kind: str, told: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(FusionBenchError, match=f"of the type {kind} .*{told}"):
        AdapterConfig.read(path)
