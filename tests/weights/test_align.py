import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fixtures_weights import (
    FLOATS,
    METHODS,
    bits,
    first,
    oracle,
    random_tensor,
    tolerance,
    total,
    weights,
)
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, align, in_memory, merge, shortened


def refusal(models: dict[str, Any], base: Any = None, **options: Any) -> str:
    with pytest.raises(FusionBenchError) as raised:
        align(models, base, **options)
    return str(raised.value)


def test_no_models_is_an_error() -> None:
    assert "nothing to merge" in refusal({})


def test_every_difference_is_listed_by_name_in_one_error() -> None:
    base = weights(a=torch.ones(2), b=torch.ones(2), c=torch.ones(2), d=1)
    x = weights(a=torch.ones(3), b=torch.ones(2, dtype=torch.float16), c=torch.ones(2), d=1.0)
    y = weights(a=torch.ones(2), b=torch.ones(2), e=torch.ones(1), d=1)
    message = refusal({"x": x, "y": y}, base, policy=MergePolicy(on_dtype="error"))
    for line in (
        "x: 'a' is [3], in _pretrained_ [2]",
        "x: 'b' is float16, in _pretrained_ float32",
        "x: 'd' is float32, in _pretrained_ int64",
        "y: lacks 'c'",
        "y: has an extra 'e'",
    ):
        assert line in message
    assert "on_dtype=cast policy.on_missing=base policy.on_extra=drop" in message


def test_the_first_model_is_named_where_there_is_no_base() -> None:
    assert "y: 'a' is [2], in x []" in refusal({"x": weights(a=1.0), "y": weights(a=[1.0, 2.0])})


def test_what_the_policy_cannot_mend_is_not_promised() -> None:
    assert "policy" not in refusal({"x": weights(a=1.0), "y": weights(a=1)})


@pytest.mark.parametrize(("on_missing", "expected"), [("base", 3.0), ("skip", 1.0)])
def test_a_missing_entry(on_missing: Any, expected: float) -> None:
    base, models = weights(a=1.0, b=1.0), {"x": weights(a=2.0), "y": weights(a=2.0, b=2.0)}
    assert "x: lacks 'b'" in refusal(models, base)
    merged = in_memory(merge(models, total, base, policy=MergePolicy(on_missing=on_missing)))
    assert merged == {"a": 4.0, "b": expected}


def test_a_skipped_entry_is_the_references_to_the_bit() -> None:
    base = weights(a=torch.tensor([1.1, -0.0], dtype=torch.float16))
    merged = merge({"x": weights()}, total, base, policy=MergePolicy(on_missing="skip"))
    assert bits(merged["a"]) == bits(base["a"])


def test_an_extra_entry_can_be_dropped() -> None:
    models = {"x": weights(a=2.0, b=1.0)}
    assert "x: has an extra 'b'" in refusal(models, weights(a=1.0))
    merged = merge(models, first, weights(a=1.0), policy=MergePolicy(on_extra="drop"))
    assert in_memory(merged) == {"a": 2.0}


@pytest.mark.parametrize("dtype", FLOATS)
def test_another_float_type_is_cast(dtype: torch.dtype) -> None:
    models = {"x": weights(a=torch.tensor([2.5], dtype=dtype)), "y": weights(a=[1.0])}
    merged = in_memory(merge(models, total, weights(a=[0.0])))
    assert merged["a"].dtype == torch.float32 and merged["a"].item() == 3.5


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("own", FLOATS)
def test_mixed_types_are_merged_in_the_wider_one_and_rounded_once(
    own: torch.dtype, stored: torch.dtype, method: str, elementwise: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    base, x, y = (random_tensor((5, 7), dtype, random) for dtype in (stored, own, stored))
    merge_tensor = METHODS[method].merge_tensor
    merged = merge({"x": weights(a=x), "y": weights(a=y)}, merge_tensor, weights(a=base))
    got = merged["a"]
    exact = oracle(method, [x, y], base)
    assert got.dtype == stored
    exactly = torch.float64 in (own, stored)
    inputs = [t.double() if exactly else t.float() for t in (x, y, base)]
    allowed = tolerance(exact, inputs, stored)
    assert ((got.double() - exact).abs() <= allowed).all()


def test_all_tensors_of_a_mixed_entry_are_of_one_type() -> None:
    def product(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        return tensors[0] @ tensors[1] @ base

    square = torch.eye(3)
    for dtypes in itertools.product(FLOATS, repeat=3):
        base, x, y = (weights(a=square.to(dtype)) for dtype in dtypes)
        assert torch.equal(merge({"x": x, "y": y}, product, base)["a"], square.to(dtypes[0]))


def test_what_is_cast_is_said_and_how_to_refuse_it() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    models = {"x": weights(a=half, b=half), "y": weights(a=torch.ones(2), b=half)}
    base = weights(a=torch.ones(2), b=torch.ones(2))
    cast = "they are merged in float32 and written in float32. "
    cast += "policy.on_dtype=error refuses that."
    assert align(models, base).notes == (
        f"x: 2 entries are bfloat16, and float32 in _pretrained_; {cast}",
        f"y: 1 entry is bfloat16, and float32 in _pretrained_; {cast}",
    )
    note, *_ = align(models, base, MergePolicy(dtype="float16")).notes
    assert "written in float16" in note
    exact = {"x": weights(a=half, b=half.double()), "y": weights(a=half, b=half)}
    (note,) = align(exact).notes
    assert note.startswith("y: 1 entry is bfloat16, and float64 in x; they are merged in float64")
    assert align({"x": base, "y": base}, base).notes == ()


@pytest.mark.parametrize("policy", ["cast", "error"])
def test_types_that_need_scales_are_never_cast(policy: Any) -> None:
    narrow = weights(a=torch.ones(2).to(torch.float8_e4m3fn))
    for models in (
        {"x": weights(a=torch.ones(2)), "y": narrow},
        {"y": narrow, "x": weights(a=1.0)},
    ):
        message = refusal(models, policy=MergePolicy(on_dtype=policy))
        assert "float8_e4m3fn" in message and "on_dtype" not in message


# --- vocabularies


def models_of(*rows: int) -> list[TensorWeights]:
    random = torch.Generator().manual_seed(0)
    return [
        TensorWeights(
            {
                "embed": random_tensor((n, 3), torch.bfloat16, random),
                "bias": random_tensor((n,), torch.bfloat16, random),
                "norm": random_tensor((3,), torch.bfloat16, random),
            }
        )
        for n in rows
    ]


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("x", "y", "common"), [(5, 7, 5), (9, 4, 4), (9, 7, 7), (0, 7, 0)])
def test_common_rows_are_merged_and_further_ones_copied(
    x: int, y: int, common: int, method: str, elementwise: bool
) -> None:
    base, *models = models_of(7, x, y)
    merge_tensor = METHODS[method].merge_tensor
    merged = merge(
        dict(zip("xy", models, strict=True)),
        merge_tensor,
        base,
        elementwise=elementwise,
        policy=MergePolicy(on_vocabulary="common"),
        vocabulary=7,
    )
    for key, rows in {"embed": common, "bias": common, "norm": 3}.items():
        tensors = [model[key][:rows].float() for model in models]
        expected = merge_tensor(key, tensors, base[key][:rows].float()).bfloat16()
        for tensor in (merged[key], in_memory(merged)[key]):
            assert bits(tensor[:rows]) == bits(expected)
            assert bits(tensor[rows:]) == bits(base[key][rows:])
    flat = merged["embed"].float().view(-1)
    for start in range(0, 21, 4):
        stop = min(start + 4, 21)
        assert torch.equal(merged.read("embed", start, stop).bfloat16().float(), flat[start:stop])


def test_another_vocabulary_is_an_error_unless_the_policy_allows_it() -> None:
    base, model = models_of(7, 5)
    message = refusal({"x": model}, base, vocabulary=7)
    assert "x: 'embed' is [5, 3], in _pretrained_ [7, 3]: another vocabulary" in message
    assert "policy.on_vocabulary=common" in message


@pytest.mark.parametrize("vocabulary", [None, 5, 3])
def test_rows_of_what_is_no_vocabulary_may_never_differ(vocabulary: int | None) -> None:
    base, model = models_of(7, 5)
    policy = MergePolicy(on_vocabulary="common")
    message = refusal({"x": model}, base, policy=policy, vocabulary=vocabulary)
    assert "'embed'" in message and "policy.on_vocabulary" not in message


@pytest.mark.parametrize("shape", [(5, 4), (5,), (), (5, 3, 1)])
def test_only_the_rows_may_differ(shape: tuple[int, ...]) -> None:
    policy = MergePolicy(on_vocabulary="common")
    for base in (torch.ones(7, 3), torch.ones(7, 3, 2)):
        message = refusal(
            {"x": weights(e=torch.ones(shape))}, weights(e=base), policy=policy, vocabulary=7
        )
        assert f"x: 'e' is {list(shape)}" in message


def test_a_scalar_is_no_vocabulary() -> None:
    policy = MergePolicy(on_vocabulary="common")
    models = {"x": weights(e=1.0)}
    assert "'e' is []" in refusal(models, weights(e=torch.ones(7)), policy=policy, vocabulary=7)


# --- the policy itself


def test_a_policy_names_its_choices() -> None:
    for wrong in ("on_missing", "on_extra", "on_dtype", "on_vocabulary", "on_nonfinite"):
        with pytest.raises(FusionBenchError, match=f"{wrong}: 'eror' .* 'error'"):
            MergePolicy(**{wrong: "eror"})


@pytest.mark.parametrize("dtype", ["bfloat61", "int8", "nn", 16])
def test_a_policys_dtype_is_a_floating_point_type(dtype: Any) -> None:
    with pytest.raises(FusionBenchError, match=f"dtype: '{dtype}' is not a floating-point"):
        MergePolicy(dtype=dtype)


def test_long_lists_are_cut() -> None:
    assert shortened([str(i) for i in range(60)]).endswith("49\n  … and 10 more")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(FusionBenchError, match=rf"device: '{device}' cannot be used here"):
        MergePolicy(device=device)


def test_a_dtype_may_be_torchs_own() -> None:
    assert MergePolicy(dtype=torch.float16) == MergePolicy(dtype="float16")  # type: ignore[arg-type]


def test_all_values_that_a_policy_cannot_have_are_told() -> None:
    with pytest.raises(FusionBenchError) as refused:
        MergePolicy(on_extra="x", device="abacus", dtype="int8")  # type: ignore[arg-type]
    keys = [problem.key for problem in refused.value.problems]
    assert keys == ["on_extra", "device", "dtype"]


def test_what_configs_say_comes_first_and_many_entries_are_patterns() -> None:
    def stack(layers: int, width: int) -> TensorWeights:
        names = ("a", "b", "c")
        keys = [f"layers.{i}.{name}" for i in range(layers) for name in names]
        return weights(**{key: torch.ones(width) for key in ["head", *keys]})

    configs = {
        "_pretrained_": {"num_hidden_layers": 2, "hidden_size": 4, "dtype": "float16"},
        "deep": {"num_hidden_layers": 9, "hidden_size": 4, "dtype": "float32"},
        "wide": {"num_hidden_layers": 2, "hidden_size": 5},
        "other": {"model_type": "gpt2", "num_hidden_layers": 2},
    }
    base = stack(2, 4)
    told = refusal({"deep": stack(9, 4)}, base, configs=configs.get)
    assert told.splitlines()[1:] == [
        "  deep: num_hidden_layers is 9, in _pretrained_ 2",
        "  deep: has extra layers.{2-8}.* (21 tensors)",
    ]
    assert "They differ in depth alone: merge equally many layers of each as slices" in told
    assert "policy.on_extra=drop" in told
    told = refusal({"deep": stack(9, 4), "wide": stack(2, 5)}, base, configs=configs.get)
    assert told.splitlines()[1:] == [
        "  deep: num_hidden_layers is 9, in _pretrained_ 2",
        "  wide: hidden_size is 5, in _pretrained_ 4",
        "  wide: so 7 tensors differ, such as 'head'",
        "  deep: has extra layers.{2-8}.* (21 tensors)",
    ]
    assert "depth alone" not in told and "policy" not in told
    part = {"model_type": "outer", "inner_config": {"model_type": "inner", "hidden_size": 5}}
    whole = {"_pretrained_": part, "wide": {"model_type": "inner", "hidden_size": 4}}
    told = refusal({"wide": stack(2, 5)}, base, configs=whole.get)
    assert "wide: hidden_size is 4, in _pretrained_ 5" in told and "model_type" not in told
    told = refusal({"x": stack(1, 4)}, base)
    assert "x: lacks 'layers.1.a'" in told  # few are told by themselves
