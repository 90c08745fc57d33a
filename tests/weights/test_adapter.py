import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_weights import all_bits, total, weights
from torch import Tensor

from fusion_bench.method.checks import bits
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import AdapterConfig, AdapterWeights, TensorWeights, in_memory, merge

PEFT = "base_model.model."
RANK = 2


def config(**changes: Any) -> AdapterConfig:
    plain = AdapterConfig(None, 3.0, False, False, {})
    return AdapterConfig(**{**vars(plain), **changes})


def base_model(dtype: torch.dtype = torch.float32) -> TensorWeights:
    random = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (7, 5),
        "block.0.q.weight": (4, 5),
        "block.0.q.bias": (4,),
        "block.1.q.weight": (4, 5),
        "conv.weight": (4, 3, 2, 2),
        "head.weight": (6, 5),
    }
    tensors = {k: torch.randn(shape, generator=random).to(dtype) for k, shape in shapes.items()}
    return TensorWeights(tensors)


def lora(
    module: str, a: tuple[int, ...], b: tuple[int, ...], kind: str = "lora_"
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    suffix = "" if "embedding" in kind else ".weight"
    return {
        f"{PEFT}{module}.{kind}A{suffix}": torch.randn(a, generator=random),
        f"{PEFT}{module}.{kind}B{suffix}": torch.randn(b, generator=random),
    }


def magnitude(module: str, *shape: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    name = f"{PEFT}{module}.lora_magnitude_vector"
    return {name: torch.rand(shape, generator=random) + 0.5}


QUERY = lora("block.0.q", (RANK, 5), (4, RANK))
CONV = lora("conv", (RANK, 3, 2, 2), (4, RANK, 1, 1))
EMBEDDING = lora("embed", (RANK, 7), (5, RANK), "lora_embedding_")
TRANSPOSED = lora("block.0.q", (RANK, 4), (5, RANK))


def product(tensors: dict[str, Tensor]) -> Tensor:
    """Return B A in float64."""
    a, b, *_ = (tensor.double().flatten(1) for tensor in tensors.values() if tensor.ndim > 1)
    return b @ a


def normalised(weight: Tensor, norms: Tensor, dim: int) -> Tensor:
    """Give rows (dim 1) or columns (dim 0) of a matrix the norms of DoRA."""
    shape = (-1, 1) if dim else (1, -1)
    return weight / weight.norm(dim=dim, keepdim=True) * norms.double().view(shape)


def expected_of(case: str) -> tuple[AdapterWeights, str, Tensor]:
    """Return an adapted model, the key that was changed, and its values in float64."""
    base = base_model()
    kind, _, dora = case.partition(" ")
    key, tensors, options, change = {
        "linear": ("block.0.q", QUERY, {}, 1.5 * product(QUERY)),
        "rslora": (
            "block.0.q",
            QUERY,
            {"rank_stabilised": True},
            3 / math.sqrt(2) * product(QUERY),
        ),
        "transposed": ("block.0.q", TRANSPOSED, {"transposed": True}, 1.5 * product(TRANSPOSED).T),
        "embedding": ("embed", EMBEDDING, {}, 1.5 * product(EMBEDDING).T),
        "conv": ("conv", CONV, {}, 1.5 * product(CONV)),
    }[kind]
    weight = base[f"{key}.weight"]
    value = weight.double().flatten(1) + change
    if dora:
        along_columns = kind in ("transposed", "embedding")
        outputs = value.shape[1 if along_columns else 0]
        shape = (1, outputs, 1, 1) if kind == "conv" else (outputs,)
        norms = magnitude(key, *shape)
        tensors = tensors | norms
        value = normalised(value, *norms.values(), dim=0 if along_columns else 1)
    return (
        AdapterWeights(base, TensorWeights(tensors), config(**options)),
        f"{key}.weight",
        value.view(weight.shape),
    )


CASES = [
    f"{kind}{dora}"
    for kind in ("linear", "rslora", "transposed", "embedding", "conv")
    for dora in ("", " dora")
]


@pytest.mark.parametrize("case", CASES)
def test_the_formula_in_float64(case: str) -> None:
    adapted, key, expected = expected_of(case)
    assert adapted[key].dtype == torch.float32
    torch.testing.assert_close(adapted[key].double(), expected, rtol=1e-5, atol=1e-5)
    base = base_model()
    assert not torch.allclose(adapted[key], base[key], atol=0.01)
    for other in base.keys() - {key}:
        assert bits(adapted[other]) == bits(base[other])


@pytest.mark.parametrize("case", CASES)
def test_any_range_is_part_of_the_whole(case: str) -> None:
    adapted, key, _ = expected_of(case)
    whole = adapted[key].flatten()
    for start in range(0, len(whole) + 1, 3):
        for stop in range(start, len(whole) + 1, 4):
            torch.testing.assert_close(adapted.read(key, start, stop), whole[start:stop])


def test_keys_specs_and_order_are_the_bases() -> None:
    base = base_model(torch.bfloat16)
    adapted = AdapterWeights(base, TensorWeights(QUERY), config())
    assert list(adapted) == list(base) and len(adapted) == len(base)
    assert all(adapted.spec(key) == base.spec(key) for key in base)
    assert all(adapted[key].dtype == torch.bfloat16 for key in adapted)


def test_the_sum_is_rounded_only_by_who_stores_it() -> None:
    base = base_model(torch.bfloat16)
    adapted = AdapterWeights(base, TensorWeights(QUERY), config())
    expected = base["block.0.q.weight"].double() + 1.5 * product(QUERY)
    assert adapted.read("block.0.q.weight", 0, 20).dtype == torch.float32
    torch.testing.assert_close(
        adapted.read("block.0.q.weight", 0, 20).double(), expected.flatten(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(in_memory(adapted)["block.0.q.weight"], adapted["block.0.q.weight"])


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("q", 8.0),
        ("block.0.q", 8.0),
        (r"block\.\d+\.q", 8.0),
        ("block.1.q", 3.0),
        ("0", 3.0),
        ("lock.0.q", 3.0),
    ],
)
def test_an_alpha_of_its_own_for_modules_that_match(pattern: str, alpha: float) -> None:
    adapted = AdapterWeights(
        base_model(), TensorWeights(QUERY), config(alpha_pattern={"no": 9.0, pattern: 8.0})
    )
    expected = base_model()["block.0.q.weight"].double() + alpha / RANK * product(QUERY)
    torch.testing.assert_close(adapted["block.0.q.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_rank_is_that_of_each_module() -> None:
    tensors = lora("block.0.q", (1, 5), (4, 1))
    adapted = AdapterWeights(base_model(), TensorWeights(tensors), config())
    expected = base_model()["block.0.q.weight"].double() + 3 * product(tensors)
    torch.testing.assert_close(adapted["block.0.q.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["block.0.q.bias", "block.0.q.base_layer.bias", "block.0.q.modules_to_save.bias"]
)
def test_entries_that_were_trained_as_a_whole_replace_the_bases(name: str) -> None:
    bias = torch.rand(4)
    adapted = AdapterWeights(base_model(), TensorWeights({f"{PEFT}{name}": bias}), config())
    assert torch.equal(adapted["block.0.q.bias"], bias)
    assert torch.equal(adapted.read("block.0.q.bias", 1, 3), bias[1:3])


def test_a_replaced_entry_may_have_more_rows() -> None:
    head = torch.rand(9, 5).bfloat16()
    adapted = AdapterWeights(base_model(), TensorWeights({f"{PEFT}head.weight": head}), config())
    assert adapted.spec("head.weight").shape == adapted["head.weight"].shape == (9, 5)
    assert adapted["head.weight"].dtype == torch.float32
    assert torch.equal(in_memory(adapted)["head.weight"], head.float())


def test_an_entry_may_be_both_replaced_and_changed() -> None:
    own = torch.rand(9, 5)
    tensors = lora("head", (RANK, 5), (9, RANK))
    expected = own.double() + 1.5 * product(tensors)
    tensors[f"{PEFT}head.base_layer.weight"] = own
    adapted = AdapterWeights(base_model(), TensorWeights(tensors), config())
    torch.testing.assert_close(adapted["head.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("vision_model.", ""), ("", "vision_model."), ("a.", "b.")]
)
def test_prefixes_may_differ(ours: str, theirs: str) -> None:
    base = TensorWeights({f"{ours}{key}": tensor for key, tensor in base_model().items()})
    tensors = {
        name.replace(PEFT, f"{PEFT}{theirs}"): tensor
        for name, tensor in (QUERY | {f"{PEFT}block.0.q.bias": torch.zeros(4)}).items()
    }
    if ours and theirs:
        with pytest.raises(FusionBenchError, match="do not have under this name"):
            AdapterWeights(base, TensorWeights(tensors), config())
        return
    adapted = AdapterWeights(base, TensorWeights(tensors), config())
    plain = AdapterWeights(base_model(), TensorWeights(QUERY), config())
    assert torch.equal(adapted[f"{ours}block.0.q.weight"], plain["block.0.q.weight"])
    assert not adapted[f"{ours}block.0.q.bias"].any()


def test_ties_that_the_adapter_changes_are_untied() -> None:
    shared = torch.rand(4, 5)
    base = TensorWeights({"a.weight": shared, "b.weight": shared, "c.weight": shared})
    tensors = lora("b", (RANK, 5), (4, RANK))
    adapted = AdapterWeights(base, TensorWeights(tensors), config())
    assert [adapted.tied_to(key) for key in adapted] == ["a.weight", "b.weight", "a.weight"]
    merged = in_memory(adapted)
    assert not torch.equal(merged["a.weight"], merged["b.weight"])
    first = AdapterWeights(base, TensorWeights(lora("a", (RANK, 5), (4, RANK))), config())
    assert torch.equal(in_memory(first)["c.weight"], shared)


def test_adapted_models_are_merged_like_others() -> None:
    base = base_model(torch.bfloat16)
    adapted = AdapterWeights(base, TensorWeights(QUERY), config())
    values = {key: adapted.read(key, 0, base.spec(key).numel) for key in base}
    merged = in_memory(merge({"m": adapted, "n": adapted}, total, base, elementwise=True))
    for key, value in values.items():
        assert torch.equal(merged[key].flatten(), (2 * value.float()).bfloat16())


def test_the_base_is_not_written_to() -> None:
    base = base_model()
    before = all_bits(base)
    in_memory(AdapterWeights(base, TensorWeights(QUERY | CONV | EMBEDDING), config()))
    assert all_bits(base) == before


# --- adapters that do not fit


def refusal(base: TensorWeights, tensors: dict[str, Tensor], **options: Any) -> str:
    with pytest.raises(FusionBenchError) as raised:
        AdapterWeights(base, TensorWeights(tensors), config(**options))
    return str(raised.value)


def test_unknown_modules_are_named() -> None:
    other = lora("block.9.q", (RANK, 5), (4, RANK))
    message = refusal(base_model(), QUERY | other | {"lost.bias": torch.ones(1)})
    for name in [*other, "lost.bias"]:
        assert f"'{name}'" in message
    assert "block.0" not in message


def test_a_name_that_fits_twice_is_unknown() -> None:
    base = weights(**{"x.q.weight": torch.ones(4, 5), "y.q.weight": torch.ones(4, 5)})
    assert "q.lora_A" in refusal(base, lora("q", (RANK, 5), (4, RANK)))


def test_a_bias_of_the_product_is_refused() -> None:
    name = f"{PEFT}block.0.q.lora_B.bias"
    assert "'lora_B.bias'" in refusal(base_model(), QUERY | {name: torch.ones(4)})


@pytest.mark.parametrize("part", ["A", "B"])
def test_half_an_adapter_is_not_whole(part: str) -> None:
    half = {name: tensor for name, tensor in QUERY.items() if f"lora_{part}" not in name}
    assert f"'block.0.q.weight' lacks 'lora_{part}'" in refusal(base_model(), half)


@pytest.mark.parametrize(
    ("a", "b"),
    [((RANK, 6), (4, RANK)), ((RANK, 5), (5, RANK)), ((RANK, 5), (4, 3)), ((5,), (4, RANK))],
)
def test_other_shapes_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    message = refusal(base_model(), lora("block.0.q", a, b))
    assert "'block.0.q.weight'" in message


def test_a_magnitude_has_one_number_an_output() -> None:
    message = refusal(base_model(), QUERY | magnitude("block.0.q", 5))
    assert "'block.0.q.weight'" in message


# --- biases of the product, and tokens that were trained alone


def product_bias(module: str, size: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {f"{PEFT}{module}.lora_B.bias": torch.randn(size, generator=random)}


BIASED = QUERY | product_bias("block.0.q", 4)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1.5),
        ({"rank_stabilised": True}, 3 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 8.0}}, 4.0),
    ],
)
def test_a_bias_of_the_product_is_scaled_and_added_to_the_layers(
    options: dict[str, Any], factor: float
) -> None:
    base = base_model()
    adapted = AdapterWeights(base, TensorWeights(BIASED), config(bias=True, **options))
    key = "block.0.q.bias"
    expected = base[key].double() + factor * BIASED[f"{PEFT}block.0.q.lora_B.bias"].double()
    torch.testing.assert_close(adapted[key].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(adapted.read(key, 1, 3), adapted[key][1:3])
    weight = base["block.0.q.weight"].double() + factor * product(QUERY)
    torch.testing.assert_close(adapted["block.0.q.weight"].double(), weight, rtol=1e-5, atol=1e-5)


def test_a_bias_may_be_both_trained_and_added_to(tmp_path: Path) -> None:
    own = torch.rand(4)
    tensors = BIASED | {f"{PEFT}block.0.q.base_layer.bias": own}  # as bias='all' stores it
    adapted = AdapterWeights(base_model(), TensorWeights(tensors), config(bias=True))
    expected = own.double() + 1.5 * BIASED[f"{PEFT}block.0.q.lora_B.bias"].double()
    torch.testing.assert_close(adapted["block.0.q.bias"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_without_a_bias_cannot_have_one_added() -> None:
    tensors = lora("head", (RANK, 5), (6, RANK)) | product_bias("head", 6)
    message = refusal(base_model(), tensors, bias=True)
    assert "head.lora_B.bias" in message and "layers that have none" in message


@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_their_setting_belong_together(bias: bool) -> None:
    message = refusal(base_model(), QUERY if bias else BIASED, bias=bias)
    assert "incomplete" in message and "block.0.q.bias" in message


def test_a_bias_of_another_size_does_not_fit() -> None:
    tensors = QUERY | product_bias("block.0.q", 5)
    assert "'block.0.q.bias' is [4]" in refusal(base_model(), tensors, bias=True)


def trained(module: str, rows: int, width: int = 5) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(4)
    values = torch.randn(rows, width, generator=random)
    return {f"{PEFT}{module}.token_adapter.trainable_tokens_delta": values}


@pytest.mark.parametrize("named", ["", "embed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trained_tokens_take_the_place_of_the_bases(named: str, dtype: torch.dtype) -> None:
    base = base_model(dtype)
    tokens = trained("embed", 3)
    rows = (6, 0, 3)
    adapted = AdapterWeights(base, TensorWeights(QUERY | tokens), config(tokens={named: rows}))
    expected = base["embed.weight"].clone()
    expected[list(rows)] = next(iter(tokens.values())).to(dtype)
    assert torch.equal(adapted["embed.weight"], expected)
    whole = adapted.read("embed.weight", 0, 35)
    for start in range(36):
        for stop in range(start, 36):
            assert torch.equal(adapted.read("embed.weight", start, stop), whole[start:stop])
    assert bits(base["embed.weight"]) == bits(base_model(dtype)["embed.weight"])


def test_tokens_of_several_modules_are_told_apart() -> None:
    tokens = {"head": (1,), "embed": (2, 4)}
    tensors = trained("embed", 2) | trained("head", 1)
    adapted = AdapterWeights(base_model(), TensorWeights(tensors), config(tokens=tokens))
    first, second = tensors.values()
    assert torch.equal(adapted["embed.weight"][[2, 4]], first)
    assert torch.equal(adapted["head.weight"][1:2], second)
    assert torch.equal(adapted["head.weight"][2:], base_model()["head.weight"][2:])


def test_tied_layers_share_their_trained_tokens_and_stay_tied() -> None:
    shared = torch.rand(4, 5)
    base = TensorWeights({"embed.weight": shared, "head.weight": shared, "x.weight": shared + 1})
    tokens = trained("embed", 1)
    adapted = AdapterWeights(base, TensorWeights(tokens), config(tokens={"": (2,)}))
    assert [adapted.tied_to(key) for key in adapted] == ["embed.weight"] * 2 + ["x.weight"]
    for key in ("embed.weight", "head.weight"):
        assert torch.equal(adapted[key][2:3], next(iter(tokens.values())))
    both = tokens | trained("head", 2)
    adapted = AdapterWeights(
        base, TensorWeights(both), config(tokens={"embed": (2,), "head": (0, 1)})
    )
    assert adapted.tied_to("head.weight") == "head.weight"
    assert torch.equal(adapted["head.weight"][2:], shared[2:])


@pytest.mark.parametrize("kind", ["tokens", "low rank", "whole"])
def test_a_tied_head_that_the_base_does_not_store_may_be_stored_twice(kind: str) -> None:
    own = torch.rand(9, 5)
    if kind == "tokens":  # of a vocabulary that was resized
        parts: Any = {"token_adapter.base_layer.weight": own}
        parts["token_adapter.trainable_tokens_delta"] = torch.rand(2, 5)
        tensors = {f"{PEFT}{m}.{p}": t for m in ("embed", "lm_head") for p, t in parts.items()}
    elif kind == "low rank":
        tensors = dict(EMBEDDING)
        a, b = EMBEDDING.values()
        tensors |= {f"{PEFT}lm_head.lora_B.weight": a.T, f"{PEFT}lm_head.lora_A.weight": b.T}
    else:
        tensors = {f"{PEFT}{module}.weight": own for module in ("embed", "lm_head")}
    options = {"tokens": {"": (1, 8)}} if kind == "tokens" else {}
    adapted = AdapterWeights(base_model(), TensorWeights(tensors), config(**options))
    alone = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    expected = AdapterWeights(base_model(), TensorWeights(alone), config(**options))
    assert all_bits(adapted) == all_bits(expected)
    last = list(tensors)[-1]
    other = tensors | {last: tensors[last] + 1}
    assert "lm_head" in refusal(base_model(), other, **options)


@pytest.mark.parametrize(
    ("tensors", "tokens", "fact"),
    [
        (QUERY, {"": (1,)}, "incomplete"),
        (trained("embed", 2), {}, "do not list them"),
        (trained("embed", 2), {"head": (1, 2)}, "do not list them"),
        (trained("embed", 2), {"": (1,)}, "does not fit"),
        (trained("embed", 2), {"": (1, 7)}, "does not fit"),
        (trained("embed", 2, width=4), {"": (1, 2)}, "does not fit"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    tensors: dict[str, Tensor], tokens: dict[str, tuple[int, ...]], fact: str
) -> None:
    assert fact in refusal(base_model(), tensors, tokens=tokens)


# --- the configuration


def written(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16, **content}))
    return path


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "adapter_config.json",
        base_model_name_or_path="owner/base",
        use_rslora=True,
        fan_in_fan_out=True,
        alpha_pattern={"q": 4},
        r=8,
        revision="main",
        lora_bias=True,
        trainable_token_indices={"embed": [3, 1]},
    )
    read = AdapterConfig.read(path)
    expected = AdapterConfig("owner/base", 16.0, True, True, {"q": 4})
    assert read == replace(expected, revision="main", bias=True, tokens={"embed": (3, 1)})
    assert read.scaling("block.q", 4) == 2 and read.scaling("block.k", 4) == 8


def test_what_is_not_said_is_plain(tmp_path: Path) -> None:
    read = AdapterConfig.read(written(tmp_path / "adapter_config.json", alpha_pattern=None))
    assert read == AdapterConfig(None, 16.0, False, False, {})


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter_config.json", peft_type="IA3")
    with pytest.raises(FusionBenchError, match=f"{path}.*type IA3 is not supported"):
        AdapterConfig.read(path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "null", "{}", '{"peft_type": "LORA"}', "\ud800"),
        *('{"peft_type": "LORA", "lora_alpha": "x"}', '{"peft_type": "LORA", "lora_alpha": [1]}'),
        '{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": [1]}',
        *(
            f'{{"peft_type": "LORA", "lora_alpha": 1, "trainable_token_indices": {tokens}}}'
            for tokens in ("3", "[-1]", "[true]", "[1, 1]", '{"embed": 1}', '["a"]')
        ),
        '{"peft_type": "LORA", "lora_alpha": 1, "revision": 3}',
    ],
)
def test_what_is_no_configuration_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(FusionBenchError, match=f"{path}"):
        AdapterConfig.read(path)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"init_lora_weights": "olora"}, "changes the base model"),
        ({"alora_invocation_tokens": [1]}, "some tokens only"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"use_qalora": True}, "its 'use_qalora' is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "its 'use_bdlora' is not supported"),
        ({"kasa_config": {"beta": 1}}, "its 'kasa_config' is not supported"),
        ({"monteclora_config": {"x": 1}}, "its 'monteclora_config' is not supported"),
        ({"arrow_config": {"top_k": 1}}, "its 'arrow_config' is not supported"),
        ({"target_parameters": ["x"]}, "its 'target_parameters' is not supported"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias together with use_dora"),
    ],
)
def test_adapters_whose_arithmetic_is_another_are_refused(
    setting: dict[str, object], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapter_config.json"
    plain = {"peft_type": "LORA", "lora_alpha": 1, "init_lora_weights": True}
    file.write_text(json.dumps(plain | setting))
    with pytest.raises(FusionBenchError, match=f"{reason}.*merge_and_unload"):
        AdapterConfig.read(file)
    file.write_text(json.dumps(plain))
    assert AdapterConfig.read(file).alpha == 1


class _Counting(TensorWeights):
    """Notes which tensors are read."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        return super().__getitem__(key)


def test_an_adapter_is_read_module_by_module() -> None:
    base = TensorWeights({f"layers.{i}.up.weight": torch.zeros(6, 5) for i in range(3)})
    tensors = {
        f"base_model.model.layers.{i}.up.lora_{side}.weight": torch.ones(shape)
        for i in range(3)
        for side, shape in (("A", (2, 5)), ("B", (6, 2)))
    }
    adapter = _Counting(tensors)
    config = AdapterConfig.of({"peft_type": "LORA", "lora_alpha": 2, "r": 2})
    weights = AdapterWeights(base, adapter, config)
    assert not adapter.seen  # of all tensors no more than the shapes
    for index, key in enumerate(base):
        adapter.seen.clear()
        assert torch.equal(weights[key], torch.full((6, 5), 2.0))
        assert {int(name.split(".")[3]) for name in adapter.seen} == {index}
