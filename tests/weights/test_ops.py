import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights import TensorSpec, ops
from fusion_bench.weights.ops import (
    bernoulli,
    by_rank,
    disjoint_merge,
    drop,
    elected_signs,
    is_linear_weight,
    task_vectors,
    uniform,
)

quick = settings(deadline=None, max_examples=examples(80))
#: They add up without rounding, and are often equal.
quarters = st.integers(-8, 8).map(lambda n: n / 4)


def vectors_of(models: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(model) for model in models]


# --- ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(st.integers(0, 99), st.sampled_from([(1,), (7,), (4, 1), (3, 50), (2, 3, 5)]))
@quick
def test_ranks_against_a_stable_sort(dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=shape).round(1)  # there are equal ones, and zeros of both signs
    values = generator.normal(size=shape[-1])
    found = by_rank(torch.tensor(rows).to(dtype), torch.tensor(values))
    magnitudes = np.abs(torch.tensor(rows).to(dtype).double().numpy())
    order = np.argsort(magnitudes, axis=-1, kind="stable")
    expected = np.empty(shape)
    np.put_along_axis(expected, order, np.broadcast_to(values, shape), -1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_infinity_has_the_last_rank_and_nan_comes_after_it() -> None:
    rows = torch.tensor([[float("nan"), -1e30, float("-inf"), 1e-45, -0.0]])
    assert by_rank(rows, torch.arange(5)).tolist() == [[4, 2, 3, 1, 0]]


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


# --- random draws


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.25, 0.5, 1 / 3, 0.9, 0.999, 1 - 2.0**-20])
def test_so_many_are_kept_as_chance_would_have_it(keep: float) -> None:
    size = 2**19 + 1234
    for seed in range(3):
        drawn = bernoulli(keep, size, (seed, "model", "key"))
        assert drawn.dtype == np.float32 and set(np.unique(drawn)) <= {0, 1}
        slack = 5 * math.sqrt(size * keep * (1 - keep)) + 1
        assert abs(drawn.sum(dtype=np.float64) - size * keep) <= slack
        # The same holds at any place of a byte, a word and a block.
        for step in (2, 8, 256):
            for first in (0, 1, step - 1):
                part = drawn[first::step]
                slack = 6 * math.sqrt(len(part) * keep * (1 - keep)) + 1
                assert abs(part.sum(dtype=np.float64) - len(part) * keep) <= slack


def test_neighbours_are_independent() -> None:
    drawn = bernoulli(0.3, 2**19, ("x",)) - 0.3
    for lag in (1, 2, 8, 64, 2**18):
        correlation = float(np.mean(drawn[:-lag] * drawn[lag:])) / (0.3 * 0.7)
        assert abs(correlation) < 5 / math.sqrt(len(drawn) - lag)


def test_certain_draws() -> None:
    assert bernoulli(0.0, 5, (1,)).tolist() == [0] * 5
    assert bernoulli(1.0, 5, (1,), start=7).tolist() == [1] * 5
    assert bernoulli(0.5, 0, (1,)).tolist() == uniform(0, (1,)).tolist() == []


CUTS = [0, 1, 7, 8, 63, 64, 1000, 2**18 - 1, 2**18, 2**18 + 9, 2**19, 2**19 + 65]


@pytest.mark.parametrize("keep", [0.3, 0.5, 1 - 1e-3])
def test_draws_do_not_depend_on_the_cut(keep: float) -> None:
    whole = bernoulli(keep, CUTS[-1], (0, "a", "w"))
    numbers = uniform(CUTS[-1], (0, "a", "w"))
    for start, stop in product(CUTS, CUTS):
        if start < stop:
            size = stop - start
            assert np.array_equal(bernoulli(keep, size, (0, "a", "w"), start), whole[start:stop])
            assert np.array_equal(uniform(size, (0, "a", "w"), start), numbers[start:stop])


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.01, 0.99), st.integers(1, 40))
@quick
def test_nor_on_where_blocks_end(start: int, size: int, keep: float, words: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_BLOCK", 8 * words)
        whole = bernoulli(keep, start + size, ("s",))
        assert np.array_equal(bernoulli(keep, size, ("s",), start), whole[start:])
        numbers = uniform(start + size, ("s",))
        assert np.array_equal(uniform(size, ("s",), start), numbers[start:])


def test_seeds_models_and_keys_differ_and_nothing_else_matters() -> None:
    seeds: list[Sequence[object]] = [
        (0, "a", "w"),
        (1, "a", "w"),
        (0, "b", "w"),
        (0, "a", "v"),
        (0, "aw"),
        (0, "w", "a"),
    ]
    draws = [bernoulli(0.5, 200, seed).tobytes() for seed in seeds]
    numbers = [uniform(200, seed).tobytes() for seed in seeds]
    assert len(set(draws)) == len(set(numbers)) == len(seeds)
    np.random.seed(1)
    torch.manual_seed(1)
    assert [bernoulli(0.5, 200, seed).tobytes() for seed in seeds] == draws
    assert bernoulli(0.5, 100, (0, "a", "w")).tobytes() == draws[0][:400]


def test_draws_are_the_same_on_every_machine() -> None:
    assert "".join(f"{x:.0f}" for x in bernoulli(0.3, 24, (7, "model", "key"))) == BITS
    assert uniform(3, (7, "model", "key")).tolist() == pytest.approx(NUMBERS)


BITS = "000001011110011101010110"
NUMBERS = [0.9007672071456909, 0.044330060482025146, 0.7233152985572815]


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(2**19, ("u",))
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = len(numbers) / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 6 * math.sqrt(2 * 63)


# --- dropping


def test_what_is_left_is_scaled_up() -> None:
    vector = torch.arange(1.0, 1001)
    for rescale, factor in ((True, 4), (False, 1)):
        found = drop(vector, 0.75, rescale, (0, "m", "k"))
        left = found != 0
        assert torch.equal(found[left], vector[left] * factor)
        assert 0.15 < float(left.float().mean()) < 0.35
    assert vector.tolist() == list(range(1, 1001))


@pytest.mark.parametrize("rescale", [True, False])
def test_nothing_and_everything_dropped(rescale: bool) -> None:
    vector = torch.tensor([1.0, -2, 3])
    assert drop(vector, 0, rescale, (0,)) is vector
    assert drop(vector, 1, rescale, (0,)).tolist() == [0, 0, 0]
    assert drop(torch.zeros(3), 0.5, rescale, (0,)).tolist() == [0, 0, 0]
    assert drop(torch.tensor(2.0), 0.5, rescale, (0,)).shape == ()
    assert drop(torch.empty(0, 2), 0.5, rescale, (0,)).shape == (0, 2)


def test_dropping_does_not_depend_on_the_cut() -> None:
    vector = torch.arange(1.0, 101, dtype=torch.float64)
    whole = drop(vector.view(10, 10), 0.6, True, (3, "m", "k")).view(-1)
    parts = [
        drop(part, 0.6, True, (3, "m", "k"), start)
        for start, part in zip(range(0, 100, 7), vector.split(7), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole) and whole.dtype == torch.float64


def test_on_average_a_task_vector_stays_what_it_was() -> None:
    vector = torch.tensor([1.0, -2, 0.5])
    draws = 2000
    mean = sum(drop(vector, 0.8, True, (seed,)) for seed in range(draws)) / draws
    deviation = vector.abs() * math.sqrt(0.8 / 0.2 / draws)
    assert ((mean - vector).abs() <= 4 * deviation).all()
