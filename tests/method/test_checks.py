"""The checks find what is wrong with a method, and say which rule it breaks."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fusion_bench.method import (
    RegMeanAlgorithm,
    SimpleEnsembleAlgorithm,
    SlerpMergeAlgorithm,
    TaskArithmeticAlgorithm,
    TensorwiseAlgorithm,
    WeightedAverageAlgorithm,
)
from fusion_bench.method.checks import check_method


@pytest.mark.parametrize(
    "method",
    [TaskArithmeticAlgorithm(0.4), RegMeanAlgorithm(), SimpleEnsembleAlgorithm()],
    ids=lambda method: type(method).__name__,
)
def test_methods_of_every_kind_pass(method: TensorwiseAlgorithm) -> None:
    check_method(method)


def test_what_is_special_about_a_method_is_said() -> None:
    check_method(SlerpMergeAlgorithm(0.5), two_ends=True, ordered=True)
    weighted = WeightedAverageAlgorithm([0.5, 0.3, 0.2])
    check_method(weighted, ordered=True, rounds=True)
    with pytest.raises(AssertionError, match=r"^WeightedAverageAlgorithm: The order"):
        check_method(weighted, rounds=True)
    with pytest.raises(AssertionError, match="Models that all equal the base give the base"):
        check_method(weighted, ordered=True)


class Sum(TaskArithmeticAlgorithm):
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        return torch.stack(list(tensors)).sum(0)


class Changing(TaskArithmeticAlgorithm):
    def run(self, modelpool, fabric=None, data=None):  # type: ignore[no-untyped-def]
        if isinstance(modelpool, dict):
            with torch.no_grad():
                modelpool["a"].logit_scale.add_(1)
        return super().run(modelpool, fabric, data)


class First(TaskArithmeticAlgorithm):
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        return tensors[0] * 1


class Random(TaskArithmeticAlgorithm):
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        merged = super().merge_tensor(key, tensors, base)
        assert base is not None
        return torch.where(torch.rand(merged.shape) < 0.5, merged, base)


class Blind(TaskArithmeticAlgorithm):
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        return super().merge_tensor(key, [t.nan_to_num() for t in tensors], base)


class Whole(TaskArithmeticAlgorithm):
    """It is called elementwise, and looks at the whole tensor."""

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        vector = sum(tensor - base for tensor in tensors)
        return base + vector * (vector.abs() >= vector.abs().mean())


class Remembering(TaskArithmeticAlgorithm):
    seen = 0

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        self.seen += 1
        return base + (super().merge_tensor(key, tensors, base) - base) / self.seen


@dataclass(eq=False)
class WithoutBase(TensorwiseAlgorithm):
    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None, "needs_pretrained is missing"
        return base + 0.1 * (tensors[0] - base + tensors[1] - base + tensors[2] - base)


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (Sum(), "Models that all equal the base"),
        (Changing(), "the models are not changed.\na model was changed"),
        (First(), "The order of the models"),
        (Random(), "Entries may be read in any order"),
        (Remembering(), "Entries may be read in any order"),
        (Blind(), "NaN and infinity in a model are noticed"),
        (Whole(), "neither on the number of threads nor on the pieces"),
        (WithoutBase(), "needs_pretrained is missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_rule_is_said(method: TensorwiseAlgorithm, rule: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_method(method)
    assert rule in str(caught.value)
