"""Quantised weights are what the libraries that made them decode."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import TensorWeights, Weights, dequantised, undecodable

AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}


def of_bits(bits: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "group_size": 8, "strategy": "group", **more}
    return {"config_groups": {"group_0": {"weights": weights}}}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int32)


def check(
    weights: Weights, key: str, expected: Tensor, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Compare an entry as a whole, and pieces that begin and end anywhere."""
    spec = weights.spec(key)
    assert (spec.shape, spec.dtype) == (tuple(expected.shape), dtype)
    flat, count = expected.reshape(-1), expected.numel()
    for start, stop in [(0, count), (0, 1), (37, 38), (37, count - 5), (count - 1, count)]:
        assert torch.equal(weights.read(key, start, stop).float(), flat[start:stop])
    assert torch.equal(weights[key], expected.to(dtype))


def repeated(scales: Tensor, down: int, across: int) -> Tensor:
    return scales.repeat_interleave(down, -2).repeat_interleave(across, -1)


def test_blocks_of_fp8() -> None:
    """The last block of each direction may be smaller, which the shapes alone do not tell."""
    stored, scales = drawn(43, 36).to(torch.float8_e4m3fn), drawn(6, 5).abs()
    state = {"l.weight": stored, "l.weight_scale_inv": scales, "n": torch.ones(2)}
    weights = dequantised(TensorWeights(state), {"weight_block_size": [8, 8]})
    assert list(weights) == ["l.weight", "n"]
    check(weights, "l.weight", stored.float() * repeated(scales, 8, 8)[:43, :36])
    assert weights.bytes_to_read("l.weight") == 43 * 36 + 30 * 4


@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1), (1, 1), (4, 10)])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8])
def test_a_scale_for_all_for_a_row_and_for_a_block(shape: tuple[int, ...], dtype: Any) -> None:
    stored, scales = (drawn(16, 40) * 20).to(dtype), drawn(*shape).abs()
    state = {"l.weight": stored, "l.weight_scale": scales, "l.input_scale": torch.ones(1)}
    settings = {"weight_block_size": [4, 4]} if shape == (4, 10) else {}
    weights = dequantised(TensorWeights(state), settings, torch.float16)
    spread = {0: scales, 1: scales[:, None] if len(scales.shape) else scales, 2: scales}[len(shape)]
    if shape == (4, 10):
        spread = repeated(scales, 4, 4)
    assert list(weights) == ["l.weight"]
    check(weights, "l.weight", stored.float() * spread, torch.float16)


def test_fused_experts_in_fp8_and_a_zero_point() -> None:
    stored, scales = drawn(3, 16, 40).to(torch.float8_e4m3fn), drawn(3, 2, 5)
    state = {"e.gate_up_proj": stored, "e.gate_up_proj_scale_inv": scales}
    weights = dequantised(TensorWeights(state), {"weight_block_size": [8, 8]})
    check(weights, "e.gate_up_proj", stored.float() * repeated(scales, 8, 8))
    numbers, zeros = (drawn(8, 6) * 20).to(torch.int8), torch.arange(8)[:, None].to(torch.int8)
    state = {"l.weight": numbers, "l.weight_scale": scales[0, :1, :1], "l.weight_zero_point": zeros}
    state["l.weight_scale"] = torch.full((8, 1), 0.5)
    weights = dequantised(TensorWeights(state), {})
    check(weights, "l.weight", (numbers.float() - zeros) * 0.5)


def test_awq_and_packed_integers() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    stored = {"l.qweight": words(32, 2), "l.qzeros": words(4, 2), "l.scales": drawn(4, 16).half()}
    packed = AutoAWQConverter(group_size=8).process(dict(stored))
    numbers = unpack_from_int32(packed["l.weight_packed"], 4, torch.Size((16, 32))).float()
    zeros = unpack_from_int32(packed["l.weight_zero_point"], 4, torch.Size((16, 4)), packed_dim=0)
    scales = packed["l.weight_scale"].float()
    expected = (numbers - repeated(zeros.float(), 1, 8)) * repeated(scales, 1, 8)
    for state, settings in ((stored, AWQ), (packed, of_bits(4))):
        weights = dequantised(TensorWeights(state), settings)
        assert list(weights) == ["l.weight"]
        check(weights, "l.weight", expected)
    order = torch.arange(32).flip(0) // 8  # as with act-order: columns know their group
    weights = dequantised(TensorWeights(packed | {"l.weight_g_idx": order.int()}), of_bits(4))
    check(weights, "l.weight", (numbers - zeros.float()[:, order]) * scales[:, order])
    bytes_ = torch.arange(-128, 128).to(torch.int8).view(8, 32)
    state = {"l.weight_packed": pack_to_int32(bytes_, 8), "l.weight_scale": torch.ones(8, 1)}
    weights = dequantised(TensorWeights(state), of_bits(8, group_size=None, strategy="channel"))
    check(weights, "l.weight", bytes_.float())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind: str, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        drawn(66, 40), blocksize=64, compress_statistics=nested, quant_type=kind
    )
    beside = {f"l.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    weights = dequantised(TensorWeights({"l.weight": codes, **beside}), {})
    assert list(weights) == ["l.weight"]
    check(weights, "l.weight", dequantize_4bit(codes, state), torch.float32)


def test_bitsandbytes_with_8_bits() -> None:
    stored, largest = (drawn(8, 6) * 40).to(torch.int8), drawn(8).abs()
    state = {"l.weight": stored, "l.SCB": largest, "l.weight_format": torch.zeros(1).byte()}
    weights = dequantised(TensorWeights(state), {})
    assert list(weights) == ["l.weight"]
    check(weights, "l.weight", stored.float() * (largest / 127)[:, None])


def test_mxfp4() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 12, 3, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(110, 134, (2, 12, 3), generator=random, dtype=torch.uint8)
    state = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales, "e.down_proj_bias": blocks}
    weights = dequantised(TensorWeights(state), {})
    assert list(weights) == ["e.down_proj", "e.down_proj_bias"]
    check(weights, "e.down_proj", convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


FP8 = torch.ones(16, 40).to(torch.float8_e4m3fn)
STATE = {"shape": [4, 4], "blocksize": 64, "dtype": "float16"}


def four_bits(state: object) -> dict[str, Tensor]:
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "l.weight": torch.zeros(8, 1).byte(),
        "l.weight.absmax": torch.ones(1),
        "l.weight.quant_map": torch.ones(16),
        "l.weight.quant_state.bitsandbytes__nf4": text,
    }


@pytest.mark.parametrize(
    ("state", "settings"),
    [
        ({"l.weight": FP8, "l.weight_scale": torch.ones(3, 5)}, {}),
        ({"l.weight": FP8, "l.weight_scale": torch.ones(16, 40).byte()}, {}),
        ({"l.weight": FP8, "l.weight_scale": torch.ones(0, 5)}, {}),
        ({"l.weight": FP8[0], "l.weight_scale": torch.ones(5)}, {}),
        ({"l.weight_packed": words(4, 4), "l.weight_scale": torch.ones(4, 4)}, {}),
        ({"l.weight_packed": words(4, 4), "l.weight_scale": torch.ones(3, 4)}, of_bits(4)),
        ({"l.weight_packed": words(4, 4), "l.weight_scale": torch.ones(4, 4)}, of_bits(3)),
        ({"l.weight_packed": words(4, 4)}, of_bits(4)),
        ({"l.qweight": words(8, 2), "l.scales": torch.ones(2, 17)}, AWQ),
        ({"l.qweight": words(8, 2)}, AWQ),
        ({"e_blocks": torch.zeros(2, 4, 16).byte(), "e_scales": torch.zeros(2, 4).byte()}, {}),
        (four_bits("x"), {}),
        (four_bits(STATE | {"shape": [5, 4]}), {}),
        (four_bits(STATE | {"shape": [-4, -4]}), {}),
        (four_bits(STATE | {"blocksize": 0}), {}),
        (four_bits(STATE | {"dtype": "save"}), {}),
        (four_bits(STATE | {"dtype": 3}), {}),
        (four_bits(STATE | {"nested_blocksize": 256}), {}),
    ],
)
def test_what_does_not_fit_is_told_before_it_is_read(
    state: Mapping[str, Tensor], settings: dict[str, Any]
) -> None:
    with pytest.raises(FusionBenchError, match=r"'m': '.*is quantised in a way that is not under"):
        dequantised(TensorWeights(state), settings, name="m")


def test_a_group_that_is_not_there() -> None:
    state = {"l.weight_packed": words(4, 2), "l.weight_scale": torch.ones(4, 2)}
    state["l.weight_g_idx"] = torch.tensor([0, 1, 2, 0, 0, 0, 0, 0] * 2)
    weights = dequantised(TensorWeights(state), of_bits(4))
    with pytest.raises(FusionBenchError, match=r"'l.weight_g_idx' names groups .* not there"):
        weights.read("l.weight", 0, 8)


def test_the_shape_of_packed_integers_that_fill_no_word() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    numbers = (torch.arange(4 * 20) % 16 - 8).to(torch.int8).view(4, 20)
    state = {"l.weight_packed": pack_to_int32(numbers, 4), "l.weight_scale": torch.ones(4, 1)}
    state["l.weight_shape"] = torch.tensor([4, 20])
    settings = of_bits(4, group_size=None, strategy="channel")
    weights = dequantised(TensorWeights(state), settings)
    assert list(weights) == ["l.weight"]
    check(weights, "l.weight", numbers.float())
    for strange in ([4, 16], [8, 20], [4], [4, -20]):
        state["l.weight_shape"] = torch.tensor(strange)
        with pytest.raises(FusionBenchError, match=r"'l\.weight_shape' says"):
            dequantised(TensorWeights(state), settings)


INT8, SCALE = torch.ones(8, 16).to(torch.int8), torch.ones(8, 1)


@pytest.mark.parametrize(
    ("lost", "state", "settings"),
    [
        ("l.weight", {"l.weight": FP8}, {"quant_method": "fp8"}),
        ("l.weight", {"l.weight": INT8}, {"quant_method": "bitsandbytes"}),
        ("l.weight", {"l.weight": INT8.byte()}, {"quant_method": "bitsandbytes"}),
        ("e.down_proj_blocks", {"e.down_proj_blocks": INT8.byte()}, {"quant_method": "mxfp4"}),
        ("l.weight", {"l.weight": INT8}, {}),  # as another entry of the file is quantised
    ],
)
def test_a_scale_that_is_missing(
    lost: str, state: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    whole = {"n.weight": FP8, "n.weight_scale": torch.ones(1), "ids": INT8.byte()}
    with pytest.raises(FusionBenchError, match=f"'m': the scale of '{lost}' is missing"):
        dequantised(TensorWeights(whole | state), settings, name="m")
    for name, listed in (
        ("ignore", "re:[el][.].*"),
        ("modules_to_not_convert", lost.removesuffix(".weight")),
        ("llm_int8_skip_modules", lost.partition(".")[0]),
    ):
        kept = dequantised(TensorWeights(whole | state), settings | {name: ["*", listed]})
        assert lost in kept


@pytest.mark.parametrize(
    ("lost", "state", "settings"),
    [
        ("l.weight_zero_point", {"l.weight": INT8, "l.weight_scale": SCALE}, of_bits(8)),
        (
            "l.weight_zero_point",
            {"l.weight_packed": words(8, 2), "l.weight_scale": torch.ones(8, 2)},
            of_bits(4),
        ),
        ("l.qzeros", {"l.qweight": words(16, 1), "l.scales": torch.ones(2, 8)}, AWQ),
    ],
)
def test_zero_points_that_are_missing(
    lost: str, state: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    said = json.loads(json.dumps(settings))
    for group in said.get("config_groups", {}).values():
        group["weights"] |= {"symmetric": False}
        if "l.weight" in state:
            group["weights"] |= {"strategy": "channel"}
            settings["config_groups"]["group_0"]["weights"] |= {"strategy": "channel"}
    with pytest.raises(FusionBenchError, match=f"'{lost}' is missing"):
        dequantised(TensorWeights(state), said)
    assert "l.weight" in dequantised(TensorWeights(state), settings | {"zero_point": False})


def test_groups_of_the_config_that_name_modules_go_before_those_that_name_classes() -> None:
    state = {}
    for name in ("a.q", "a.v"):
        state |= {f"{name}.weight": INT8, f"{name}.weight_scale": SCALE}
    own = {"targets": ["re:.*v"], "weights": {"symmetric": False}}
    settings = {"config_groups": {"g": {"targets": ["Linear"], "weights": {}}, "h": own}}
    with pytest.raises(FusionBenchError, match=r"'a\.v\.weight_zero_point' is missing"):
        dequantised(TensorWeights(state), settings)


@pytest.mark.parametrize(
    ("state", "settings"),
    [
        ({"l.weight_scale_inv": torch.ones(3, 5)}, {"weight_block_size": [8, 16]}),
        ({"l.weight_scale_inv": torch.ones(1)}, {"weight_block_size": [8, 8]}),
        ({"l.weight_scale_inv": torch.ones(2, 5)}, {"weight_block_size": "8"}),
        ({"l.weight_scale_inv": torch.ones(2, 5)}, {}),  # blocks of 128
        ({"l.weight_scale": torch.ones(16, 5)}, of_bits(8, group_size=16)),
    ],
)
def test_blocks_that_contradict_the_config(
    state: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    with pytest.raises(FusionBenchError, match=r"blocks of (\[[0-9, ]+\]|8)"):
        dequantised(TensorWeights({"l.weight": FP8, **state}), settings)


def test_blocks_are_of_128_where_the_config_says_nothing() -> None:
    stored, scales = drawn(130, 300).to(torch.float8_e4m3fn), drawn(2, 3).abs()
    state = {"l.weight": stored, "l.weight_scale_inv": scales}
    weights = dequantised(TensorWeights(state), {"quant_method": "fp8"})
    check(weights, "l.weight", stored.float() * repeated(scales, 128, 128)[:130, :300])


def test_groups_of_awq_that_contradict_the_config() -> None:
    state = {"l.qweight": words(32, 2), "l.qzeros": words(4, 2), "l.scales": torch.ones(4, 16)}
    assert dequantised(TensorWeights(state), {**AWQ, "group_size": 8})
    for size in (16, 4, -1):
        with pytest.raises(FusionBenchError, match=f"4 scales a row of 32 in groups of {size}"):
            dequantised(TensorWeights(state), {**AWQ, "group_size": size})


def test_a_piece_reads_its_own_scales_only() -> None:
    asked = {}

    class Watched(TensorWeights):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(key)

        def read(self, key: str, start: int, stop: int) -> Tensor:
            asked[key] = (start, stop)
            return super().read(key, start, stop)

    state = {
        "e.down_proj": drawn(3, 16, 40).to(torch.float8_e4m3fn),
        "e.down_proj_scale": drawn(3, 2, 5),
    }
    weights = dequantised(Watched(state), {"weight_block_size": [8, 8]})
    weights.read("e.down_proj", (16 + 9) * 40, (32 + 3) * 40)
    assert asked["e.down_proj_scale"] == (3 * 5, 5 * 5)


def test_an_entry_that_is_missing_is_named() -> None:
    state = four_bits(STATE)
    del state["l.weight.absmax"]
    with pytest.raises(FusionBenchError, match=r"understood: 'l.weight.absmax' is missing"):
        dequantised(TensorWeights(state), {})
    nested = {"l.weight.nested_absmax": torch.ones(1), "l.weight.nested_quant_map": torch.ones(256)}
    state = four_bits(STATE | {"nested_blocksize": 256}) | nested
    with pytest.raises(FusionBenchError, match=r"understood: 'nested_offset' is missing"):
        dequantised(TensorWeights(state), {})


def test_plain_weights_stay_as_they_are() -> None:
    stored = TensorWeights({"a.weight": torch.ones(2, 2), "ids": torch.arange(3)})
    assert dequantised(stored, {}) is stored


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "gptq"}, "gptq"),
        ({"bits": 4}, "with an unnamed method"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, None),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors, nvfp4-pack-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"g": {"format": "marlin-24"}},
            },
            "compressed-tensors, marlin-24",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "compressed-tensors with a sparsity_config",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, None),
        ({"quant_method": "awq", "version": "gemv"}, "awq, gemv, 4 bits"),
    ],
)
def test_what_cannot_be_decoded(settings: dict[str, Any], told: str | None) -> None:
    assert undecodable(settings) == told
