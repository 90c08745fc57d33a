import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import examples
from fixtures_weights import (
    FLOATS,
    METHODS,
    all_bits,
    bits,
    families,
    first,
    oracle,
    tolerance,
    total,
    weights,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, Weights, in_memory, merge, stream

Family = dict[str, dict[str, Tensor]]
quick = settings(max_examples=examples(40), deadline=None)
inf, nan = torch.inf, torch.nan


def split(family: Family) -> tuple[Weights, dict[str, Weights]]:
    base, *models = (TensorWeights(tensors) for tensors in family.values())
    return base, dict(zip(list(family)[1:], models, strict=True))


def pieced(merged: Weights, piece: int) -> dict[str, Tensor]:
    """Gather what ``stream`` hands over in pieces of a certain size."""
    tensors = {
        key: torch.empty(merged.spec(key).shape, dtype=merged.spec(key).dtype) for key in merged
    }
    stream(
        merged,
        lambda key, start, values: tensors[key].view(-1)[start : start + len(values)].copy_(values),
        piece,
    )
    return tensors


# --- against float64


@given(
    families(), st.sampled_from(sorted(METHODS)), st.booleans(), st.sampled_from([None, *FLOATS])
)
@settings(max_examples=examples(120), deadline=None)
def test_the_formula_in_float64_rounded_once(
    family: Family, method: str, elementwise: bool, dtype: torch.dtype | None
) -> None:
    base, models = split(family)
    policy = MergePolicy(dtype=str(dtype).removeprefix("torch.") if dtype else None)
    merged = in_memory(
        merge(models, METHODS[method].merge_tensor, base, elementwise=elementwise, policy=policy)
    )
    assert list(merged) == list(base)
    for key, tensor in merged.items():
        if not base[key].dtype.is_floating_point:
            assert bits(tensor) == bits(base[key])
            continue
        assert tensor.dtype == (dtype or base[key].dtype)
        inputs = [model[key] for model in models.values()]
        expected = oracle(method, inputs, base[key])
        allowed = tolerance(expected, [*inputs, base[key]], tensor.dtype)
        assert ((tensor.double() - expected).abs() <= allowed).all()


@given(families(), st.sampled_from(sorted(METHODS)), st.booleans(), st.data())
@quick
def test_files_shards_pieces_and_key_order_change_no_bit(
    family: Family, method: str, elementwise: bool, data: st.DataObject
) -> None:
    base, models = split(family)
    merge_tensor = METHODS[method].merge_tensor
    expected = all_bits(in_memory(merge(models, merge_tensor, base, elementwise=True)))
    sizes = st.sampled_from([1, 16, 100, 10**6])
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: written(
                TensorWeights(tensors), Path(folder, name), max_shard_size=data.draw(sizes)
            )
            for name, tensors in family.items()
        }
        opened_base = files.pop("_pretrained_")
        lazy = merge(files, merge_tensor, opened_base, elementwise=elementwise)
        assert all_bits(pieced(lazy, data.draw(st.sampled_from([1, 7, 64, 2**18])))) == expected
        assert all_bits(lazy) == expected
        output = written(lazy, Path(folder, "merged"), max_shard_size=data.draw(sizes))
        assert all_bits(output) == expected


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    # In bfloat16, 256 + 1 is 256: adding one by one would lose every one of the eight ones.
    parts = [torch.tensor([256.0])] + [torch.tensor([1.0])] * 8
    models = {str(i): weights(w=part.bfloat16()) for i, part in enumerate(parts)}
    assert merge(models, total)["w"].item() == 264


def test_float64_keeps_its_precision() -> None:
    tiny = torch.tensor([1 + 2**-40], dtype=torch.float64)
    merged = merge({"m": weights(w=tiny)}, total)
    assert merged["w"].dtype == torch.float64 and torch.equal(merged["w"], tiny)


def test_a_whole_tensor_method_sees_the_shape_and_an_elementwise_one_pieces() -> None:
    seen: list[torch.Size] = []

    def look(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        seen.append(tensors[0].shape)
        assert tensors[0].dtype == torch.float32
        return tensors[0]

    model = weights(w=torch.ones(4, 5, dtype=torch.float16))
    pieced(merge({"m": model}, look), 7)
    assert seen == [(4, 5)]
    seen.clear()
    pieced(merge({"m": model}, look, elementwise=True), 7)
    assert sorted(seen) == [(6,), (7,), (7,)]


def test_tensors_come_in_the_order_of_the_models_and_as_a_sequence() -> None:
    def look(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert [tensor.item() for tensor in tensors[1:]] == [2, 3]
        assert len(tensors) == 3 and base is None
        return tensors[-1]

    assert merge({"b": weights(w=1.0), "a": weights(w=2.0), "c": weights(w=3.0)}, look)["w"] == 3


# --- entries that are not merged, and those that are merged once


def test_entries_come_in_the_order_and_dtype_of_the_base() -> None:
    base = weights(b=torch.zeros(2, dtype=torch.bfloat16), a=torch.zeros(()))
    model = weights(a=torch.ones(()), b=torch.ones(2, dtype=torch.bfloat16))
    merged = merge({"m": model, "n": model}, total, base)
    assert list(merged) == ["b", "a"]
    assert merged["b"].dtype == torch.bfloat16 and merged["b"].tolist() == [2, 2]
    assert merged["a"].dtype == torch.float32 and merged["a"].item() == 2


def test_without_a_base_the_first_model_is_the_reference() -> None:
    merged = merge({"x": weights(b=1.0, i=1), "y": weights(i=2, b=2.0)}, total)
    assert list(merged) == ["b", "i"]
    assert merged["i"] == 1


def test_integers_and_booleans_are_copies_of_the_base() -> None:
    base = weights(i=[5], f=[True])
    merged = merge({"m": weights(i=[9], f=[False])}, total, base)
    assert merged["i"].tolist() == [5] and merged["f"].tolist() == [True]
    assert merged["i"].data_ptr() != base["i"].data_ptr()


def test_the_policy_states_the_dtype_of_floating_point_entries_alone() -> None:
    merged = merge({"m": weights(a=1.0, i=1)}, total, policy=MergePolicy(dtype="bfloat16"))
    assert merged.spec("a").dtype == merged["a"].dtype == torch.bfloat16
    assert merged.spec("i").dtype == merged["i"].dtype == torch.int64


def tied(value: float, *order: str) -> TensorWeights:
    shared = torch.full((3, 2), float(value))
    return TensorWeights(dict.fromkeys(order or ("a", "b"), shared))


def test_tied_entries_are_merged_once_and_stay_tied() -> None:
    calls = []

    def count(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        calls.append(key)
        return tensors[0]

    merged = merge({"m": tied(1), "n": tied(2)}, count, tied(0))
    tensors = in_memory(merged)
    assert calls == ["a"]
    assert merged.tied_to("b") == "a"
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()


def test_tied_entries_are_written_once(tmp_path: Path) -> None:
    merged = merge({"m": tied(1), "n": tied(2)}, total)
    assert list(written(merged, tmp_path / "out")) == ["a"]


def test_the_order_of_a_models_keys_does_not_untie() -> None:
    assert merge({"m": tied(1, "b", "a")}, total, tied(0, "a", "b")).tied_to("b") == "a"


def test_entries_that_one_model_unties_are_merged_apart() -> None:
    merged = in_memory(
        merge({"m": tied(1), "n": weights(a=torch.ones(3, 2), b=torch.zeros(3, 2))}, total)
    )
    assert merged["a"].unique() == 2 and merged["b"].unique() == 1


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_file_may_hold_tied_entries_once(order: tuple[str, ...], lacking: str) -> None:
    held = weights(**{"ab".replace(lacking, ""): torch.ones(3, 2)})
    if lacking == order[0]:  # only an entry that is tied to an earlier one may be left out
        with pytest.raises(FusionBenchError, match=f"lacks '{lacking}'"):
            merge({"m": held}, total, tied(0, *order))
        return
    merged = in_memory(merge({"m": held}, total, tied(0, *order)))
    assert merged["a"].unique() == merged["b"].unique() == 1
    assert merged["a"].data_ptr() == merged["b"].data_ptr()


def test_a_tied_entry_more_is_no_difference() -> None:
    base = weights(a=torch.zeros(3, 2))
    assert in_memory(merge({"m": tied(1)}, total, base))["a"].unique() == 1


# --- inputs


def test_inputs_stay_as_they_are() -> None:
    base, model = weights(w=torch.zeros(3)), weights(w=torch.ones(3))
    for method in METHODS.values():
        in_memory(merge({"m": model, "n": model}, method.merge_tensor, base))["w"].fill_(9)
    assert base["w"].tolist() == [0, 0, 0] and model["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("which", ["model", "base"])
def test_a_method_that_writes_to_its_input_is_an_error(which: str, elementwise: bool) -> None:
    def in_place(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        return (base if which == "base" else tensors[0]).add_(1)

    merged = merge(
        {"m": weights(w=torch.ones(3))}, in_place, weights(w=torch.ones(3)), elementwise=elementwise
    )
    with pytest.raises(RuntimeError, match="changed the input tensors of 'w'"):
        in_memory(merged)


def test_a_result_of_another_shape_is_an_error() -> None:
    merged = merge({"m": weights(w=torch.ones(2, 3))}, lambda key, tensors, base: tensors[0].T)
    with pytest.raises(RuntimeError, match=r"the shape \[3, 2\] for 'w', which has \[2, 3\]"):
        in_memory(merged)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("elementwise", [True, False])
def test_a_methods_exception_surfaces_as_itself(
    error: type[BaseException], elementwise: bool
) -> None:
    def fail(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        raise error("boom")

    with pytest.raises(error, match="boom"):
        in_memory(merge({"m": weights(w=torch.ones(3))}, fail, elementwise=elementwise))


def test_a_modules_tensors_need_not_be_contiguous() -> None:
    module = nn.Module()
    module.register_buffer("w", torch.arange(6.0).view(2, 3).T)
    module.register_parameter("p", nn.Parameter(torch.arange(24.0).view(2, 3, 4)[:, ::2, 1]))
    model = TensorWeights(module.state_dict())
    for elementwise in (True, False):
        merged = pieced(merge({"m": model, "n": model}, total, elementwise=elementwise), 4)
        assert torch.equal(merged["w"], 2 * module.w) and torch.equal(merged["p"], 2 * module.p)
        assert not merged["p"].requires_grad


# --- NaN, infinity and overflow


def problem(models: dict[str, Any], base: Any = None, method: Any = first, **policy: Any) -> str:
    with pytest.raises(FusionBenchError) as raised:
        in_memory(merge(models, method, base, policy=MergePolicy(**policy)))
    return str(raised.value)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_input_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    bad = weights(a=torch.ones(3, dtype=dtype), b=torch.tensor([1, value], dtype=dtype))
    good = weights(a=torch.ones(3, dtype=dtype), b=torch.ones(2, dtype=dtype))
    message = problem({"x": good, "y": bad}, method=total)
    assert "y: 'b'" in message and "merged: 'b'" in message
    assert "'a'" not in message and "x:" not in message


def test_a_result_that_is_not_finite_is_named() -> None:
    message = problem(
        {"m": weights(w=[1.0, 0.0])}, method=lambda key, tensors, base: tensors[0].log()
    )
    assert "merged: 'w'" in message and "m:" not in message


def test_a_base_that_is_not_finite_is_named() -> None:
    message = problem({"m": weights(w=[1.0])}, weights(w=[nan]), METHODS["arithmetic"].merge_tensor)
    assert "_pretrained_: 'w'" in message


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [("float16", 6e4, None), ("float32", 1e5, "float16"), ("float64", 1e300, "float32")],
)
def test_overflow_of_the_stated_dtype_is_named(
    stored: str, value: float, dtype: str | None
) -> None:
    model = weights(a=[1.0], w=torch.tensor([value], dtype=getattr(torch, stored)))
    model = TensorWeights({key: tensor.to(model["w"].dtype) for key, tensor in model.items()})
    message = problem({"m": model, "n": model}, method=total, dtype=dtype)
    assert "merged: 'w' exceeds torch.float" in message and "'a'" not in message


def test_overflow_of_what_is_copied_is_named_too() -> None:
    policy = {"on_missing": "skip", "on_vocabulary": "common", "dtype": "float16"}
    base = weights(e=torch.tensor([[1.0], [1e5]]), s=[1e5])
    merged = merge(
        {"m": weights(e=[[1.0]])}, first, base, policy=MergePolicy(**policy), vocabulary=2
    )
    with pytest.raises(FusionBenchError) as raised:
        in_memory(merged)
    assert "merged: 'e' exceeds" in str(raised.value) and "merged: 's' exceeds" in str(raised.value)


def test_finite_values_whose_sum_overflows_are_sound() -> None:
    for dtype in FLOATS:
        model = weights(w=torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
        assert in_memory(merge({"m": model}, first))["w"].isfinite().all()


def test_a_warning_does_where_the_policy_says_so(caplog: pytest.LogCaptureFixture) -> None:
    policy = MergePolicy(on_nonfinite="warn")
    merged = in_memory(merge({"m": weights(w=[nan, 1.0])}, first, policy=policy))
    assert merged["w"].isnan().tolist() == [True, False]
    assert [(r.levelno, "m: 'w'" in r.message) for r in caplog.records] == [(logging.WARNING, True)]
