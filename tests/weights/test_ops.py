from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights import TensorSpec
from fusion_bench.weights.ops import (
    disjoint_merge,
    elected_signs,
    is_linear_weight,
    task_vectors,
)

quick = settings(deadline=None, max_examples=examples(80))
#: They add up without rounding, and are often equal.
quarters = st.integers(-8, 8).map(lambda n: n / 4)


def vectors_of(models: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(model) for model in models]


# --- task vectors


def test_task_vectors_are_the_caller_s() -> None:
    base, model = torch.tensor([1.0, 2]), torch.tensor([4.0, 2])
    (vector,) = task_vectors("w", 0, [model], base)
    assert vector.tolist() == [3, 0]
    vector.zero_()
    assert base.tolist() == [1, 2] and model.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("key", "shape", "linear"),
    [
        ("encoder.layers.0.mlp.fc1.weight", (4, 2), True),
        ("weight", (4, 2), True),
        ("lm_head.weight", (4, 2), True),
        ("encoder.layers.0.mlp.fc1.bias", (4,), False),
        ("norm.weight", (4,), False),
        ("logit_scale", (), False),
        ("conv.weight", (4, 3, 2, 2), False),
        ("class_matrix", (4, 2), False),
        ("model.embed_tokens.weight", (4, 2), False),
        ("vision_model.embeddings.position_embedding.weight", (4, 2), False),
        ("transformer.wte.weight", (4, 2), False),
        ("wpe.weight", (4, 2), False),
        ("shared.weight", (4, 2), False),
        ("shared_expert.up_proj.weight", (4, 2), True),
    ],
)
def test_linear_weights_are_matrices_but_no_embeddings(
    key: str, shape: tuple[int, ...], linear: bool
) -> None:
    assert is_linear_weight(key, TensorSpec(shape, torch.float32)) == linear


# --- the disjoint merge


def merged_by_the_paper(models: Sequence[Sequence[float]], func: str, zero: int) -> NDArray[Any]:
    values = np.array(models)
    signs = np.sign(values.sum(axis=0))
    signs[signs == 0] = zero
    agree = (np.sign(values) == signs) & (values != 0)
    found = (values * agree).sum(axis=0)
    if func == "mean":
        return np.asarray(found / np.maximum(agree.sum(axis=0), 1))
    if func == "max":
        return np.asarray(signs * np.abs(values * agree).max(axis=0))
    return np.asarray(found)


models_of_quarters = st.integers(0, 5).flatmap(
    lambda size: st.lists(st.lists(quarters, min_size=size, max_size=size), min_size=1, max_size=4)
)


@given(models_of_quarters, st.sampled_from(["sum", "mean", "max"]), st.sampled_from([-1, 0, 1]))
@quick
def test_disjoint_merge_against_the_formula(
    models: list[list[float]], func: Any, zero: int
) -> None:
    found = disjoint_merge(vectors_of(models), func, lambda: zero)
    expected = merged_by_the_paper(models, func, zero)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("func", "expected"),
    [("sum", [5, -7, 0, 2]), ("mean", [2.5, -3.5, 0, 2]), ("max", [3, -4, 0, 2])],
)
def test_disjoint_merge_by_hand(func: Any, expected: list[float]) -> None:
    def unasked() -> int:
        raise AssertionError("no sum is 0 but where all values are")

    models = [[2.0, -3, 0, 0], [3.0, -4, 0, 2], [-4.0, 6, 0, 0]]
    assert disjoint_merge(vectors_of(models), func, unasked).tolist() == expected


@pytest.mark.parametrize("func", ["sum", "mean", "max"])
def test_the_sign_of_a_zero_sum_is_asked_for_once(func: Any) -> None:
    asked: list[int] = []
    models = [[1.0, 2.0, 0.0, -5.0], [-1.0, -2.0, 0.0, -5.0]]

    def negative() -> int:
        asked.append(1)
        return -1

    found = disjoint_merge(vectors_of(models), func, negative)
    assert found.tolist() == [-1, -2, 0, -10 if func == "sum" else -5] and len(asked) == 1


def test_disjoint_merge_of_odd_shapes_and_types() -> None:
    single = disjoint_merge([torch.tensor(2.0)], "mean", lambda: 1)
    assert single.tolist() == 2 and single.shape == ()
    assert disjoint_merge([torch.empty(0, 3)], "max", lambda: 1).shape == (0, 3)
    double = disjoint_merge([torch.ones(2, 2, dtype=torch.float64)], "sum", lambda: 1)
    assert double.dtype == torch.float64 and double.shape == (2, 2)


@pytest.mark.parametrize("func", ["sum", "mean", "max"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_disjoint_merge_shows_what_is_not_finite(func: Any, value: float) -> None:
    for others in ([1.0, 2.0], [-1.0, 2.0], [-1.0, -2.0]):
        vectors = [torch.tensor([v]) for v in [value, *others]]
        assert not disjoint_merge(vectors, func, lambda: 1).isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2e38])
def test_what_is_not_finite_leaves_the_other_elements_alone(value: float) -> None:
    vectors = [torch.tensor([value, 1.0, 1.0]), torch.tensor([value, -1.0, 2.0])]
    assert disjoint_merge(vectors, "max", lambda: -1)[1:].tolist() == [-1, 2]


@given(models_of_quarters)
@quick
def test_elected_signs_are_those_of_the_sum(models: list[list[float]]) -> None:
    found = elected_signs(iter(vectors_of(models)))
    assert found.tolist() == np.sign(np.array(models).sum(axis=0)).tolist()
