from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import BASE, merged, module
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion_bench.method import (
    ConsensusTaskArithmetic,
    TallMaskTaskArithmeticAlgorithm,
    TaskArithmeticAlgorithm,
)
from fusion_bench.problems import FusionBenchError

MODELS = {"a": [1.0, 0.0], "b": [1.0, 2.0]}
ZERO = [0.0, 0.0]


def each(method: Any, models: Mapping[str, Any], base: Any) -> dict[str, list[float]]:
    """Return by task the merged `weight`."""
    made = method.run({BASE: module(base)} | {name: module(v) for name, v in models.items()})
    return {name: state["weight"].tolist() for name, state in made.items()}


@pytest.mark.parametrize(
    ("weight", "a", "b"), [(1, [0, 0], [0, 2]), (0.5, [2, 0], [2, 2]), (0, [2, 0], [2, 2])]
)
def test_masks_by_hand(weight: float, a: list[float], b: list[float]) -> None:
    method = TallMaskTaskArithmeticAlgorithm(weight)
    assert each(method, MODELS, ZERO) == {"a": a, "b": b}
    shifted = {name: [v + 1 for v in values] for name, values in MODELS.items()}
    found = each(method, shifted, [1.0, 1.0])
    assert found == {"a": [v + 1 for v in a], "b": [v + 1 for v in b]}


def test_consensus_by_hand() -> None:
    models = list(MODELS.values())
    for k, expected in ((0, [2, 2]), (1, [2, 2]), (2, [2, 0])):
        assert merged(ConsensusTaskArithmetic(1, 0.5, k), models, ZERO).tolist() == expected
    assert merged(ConsensusTaskArithmetic(0.25, 0.5), models, ZERO).tolist() == [0.5, 0]
    assert merged(ConsensusTaskArithmetic(1, 1, 1), models, ZERO).tolist() == [0, 2]


quarters = st.integers(-8, 8).map(lambda n: n / 4)  # they add up without rounding
some_models = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(quarters, min_size=size, max_size=size), min_size=1, max_size=4)
)
some_weights = st.sampled_from([0, 0.25, 0.5, 1, 2])


def masks(models: Sequence[Sequence[float]], weight: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the sum of the task vectors, and each task's mask, in float64."""
    tau = np.array(models)
    total = tau.sum(axis=0)
    return total, np.abs(tau) > weight * np.abs(total - tau)


@given(some_models, some_weights, st.integers(0, 4))
@settings(deadline=None, max_examples=examples(60))
def test_against_the_formula(models: list[list[float]], weight: float, k: int) -> None:
    total, own = masks(models, weight)
    base = np.arange(len(models[0])) / 4
    named = {f"m{i}": base + np.array(model) for i, model in enumerate(models)}
    found = each(TallMaskTaskArithmeticAlgorithm(weight), named, base)
    assert list(found) == list(named)
    for mask, state in zip(own, found.values(), strict=True):
        assert state == (base + mask * total).tolist()
    k = min(k, len(models))
    one = merged(ConsensusTaskArithmetic(0.5, weight, k), named, base)
    assert one.tolist() == (base + 0.5 * (own.sum(axis=0) >= k) * total).tolist()


def test_a_consensus_of_none_is_task_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = torch.randn(4, 50, generator=generator).tolist()
    expected = merged(TaskArithmeticAlgorithm(0.3), models, base)
    torch.testing.assert_close(merged(ConsensusTaskArithmetic(k=0), models, base), expected)


def test_one_model_alone_is_itself() -> None:
    model, base = [3.0, 1.0, -0.5], [1.0, 1.0, 1.0]
    assert each(TallMaskTaskArithmeticAlgorithm(), {"a": model}, base) == {"a": model}
    assert merged(ConsensusTaskArithmetic(1, k=1), [model], base).tolist() == model


def test_models_equal_to_the_base_give_the_base() -> None:
    base = [0.1, -2.7, 0.0]
    assert each(TallMaskTaskArithmeticAlgorithm(), {"a": base, "b": base}, base)["a"] == (
        pytest.approx(base, rel=1e-7)
    )
    assert torch.equal(merged(ConsensusTaskArithmetic(), [base] * 2, base), torch.tensor(base))


def test_a_task_that_changed_nothing_keeps_nothing() -> None:
    found = each(TallMaskTaskArithmeticAlgorithm(0), {"a": [3.0], "b": [1.0]}, [1.0])
    assert found == {"a": [3], "b": [1]}


def test_numbers_alone_are_merged_too() -> None:
    assert merged(ConsensusTaskArithmetic(1, 0.25), [2.0, 3.0], 1.0).tolist() == 4


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"tall_mask_lambda: -1"):
        TallMaskTaskArithmeticAlgorithm(-1)
    with pytest.raises(FusionBenchError, match=r"tall_mask_lambda: 'x'"):
        ConsensusTaskArithmetic(tall_mask_lambda="x")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"k: -1"):
        ConsensusTaskArithmetic(k=-1)
    with pytest.raises(FusionBenchError, match=r"k: 3 is more than the number of models, 2"):
        merged(ConsensusTaskArithmetic(k=3), [[1.0], [2.0]], [0.0])
