from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError
from fusion_bench.weights import TensorWeights, merge


def module(**tensors: Tensor) -> nn.Module:
    result = nn.Module()
    for name, tensor in tensors.items():
        result.register_buffer(name, tensor)
    return result


def weights(**tensors: Tensor) -> TensorWeights:
    return TensorWeights(tensors)


def total(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def test_entries_come_in_the_order_and_dtype_of_the_base() -> None:
    base = weights(b=torch.zeros(2, dtype=torch.bfloat16), a=torch.zeros(()))
    model = weights(a=torch.ones(()), b=torch.ones(2))
    merged = merge({"m": model, "n": model}, total, base)
    assert list(merged) == ["b", "a"]
    assert merged["b"].dtype == torch.bfloat16 and merged["b"].tolist() == [2, 2]
    assert merged["a"].dtype == torch.float32 and merged["a"].item() == 2


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    # In bfloat16, 256 + 1 is 256: adding one by one would lose every one of the eight ones.
    parts = [torch.tensor([256.0])] + [torch.tensor([1.0])] * 8
    models = {str(i): weights(w=p.bfloat16()) for i, p in enumerate(parts)}
    assert merge(models, total)["w"].item() == 264


def test_float64_keeps_its_precision() -> None:
    tiny = torch.tensor([1 + 2**-40], dtype=torch.float64)
    merged = merge({"m": weights(w=tiny)}, total)
    assert merged["w"].dtype == torch.float64 and torch.equal(merged["w"], tiny)


def test_integers_and_booleans_are_copied_from_the_base() -> None:
    base = weights(i=torch.tensor([5]), f=torch.tensor([True]))
    model = weights(i=torch.tensor([9]), f=torch.tensor([False]))
    merged = merge({"m": model}, total, base)
    assert merged["i"].tolist() == [5] and merged["f"].tolist() == [True]
    assert merged["i"].data_ptr() != base["i"].data_ptr()


def test_inputs_stay_as_they_are_when_the_method_works_in_place() -> None:
    base, model = weights(w=torch.ones(3)), weights(w=torch.ones(3))

    def in_place(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        return base.add_(tensors[0].mul_(2))

    assert merge({"m": model}, in_place, base)["w"].tolist() == [3, 3, 3]
    assert base["w"].tolist() == model["w"].tolist() == [1, 1, 1]


def test_tied_entries_are_merged_once_and_stay_tied() -> None:
    shared = torch.ones(2)
    calls = []

    def count(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        calls.append(key)
        return tensors[0]

    merged = merge({"m": weights(a=shared, b=shared)}, count)
    assert calls == ["a"]
    assert merged["a"].data_ptr() == merged["b"].data_ptr()


def test_every_difference_is_listed_by_name() -> None:
    base = weights(a=torch.ones(2), b=torch.ones(2))
    models = {
        "x": weights(a=torch.ones(3), b=torch.ones(2)),
        "y": weights(a=torch.ones(2), c=torch.ones(1)),
    }
    with pytest.raises(FusionBenchError) as error:
        merge(models, total, base)
    message = str(error.value)
    assert "x: 'a' is [3], in _pretrained_ [2]" in message
    assert "y: lacks 'b'" in message
    assert "y: has an extra 'c'" in message


def test_no_models_is_an_error() -> None:
    with pytest.raises(FusionBenchError, match="nothing to merge"):
        merge({}, total)
