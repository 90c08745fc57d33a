import math
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import BASE, merged
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fusion_bench.method import PCBMerging
from fusion_bench.problems import FusionBenchError

VARIANTS: list[Any] = ["paper", "released"]
Array = NDArray[Any]


def normal(values: Array) -> Array:
    span = values.max() - values.min()
    return (values - values.min()) / span if span else np.zeros_like(values)


def softmax(values: Array) -> Array:
    exponentials = np.exp(values - values.max())
    return np.asarray(exponentials / exponentials.sum())


def in_the_paper(tau: Array, density: float) -> tuple[Array, Array]:
    """Return the scores that count, else 0, and the changes."""
    scores = np.zeros_like(tau)
    for own, row in zip(tau, scores, strict=True):
        inter = sum(softmax(normal(own * other)) for other in tau)
        score = softmax(len(tau) * normal(own**2)) * inter
        kept = np.argsort(-score, kind="stable")[: int(len(row) * density)]
        row[kept] = score[kept]
    return scores, tau


def released(tau: Array, density: float) -> tuple[Array, Array]:
    size = tau.shape[1]
    clipped = size // 10_000
    order = np.sort(np.abs(tau), axis=1)
    magnitude = np.clip(np.abs(tau), order[:, [clipped]], order[:, [size - 1 - clipped]])
    own = np.exp(len(tau) * np.stack([normal(row) for row in magnitude]) ** 2)
    score = own * np.tanh(tau * tau.sum(axis=0))
    below = max(size - 1 - int(size * density), 0)
    score = np.maximum(score, np.sort(score, axis=1)[:, [below]])
    return np.stack([normal(row) for row in score]), np.sign(tau) * magnitude


def reference(tau: Array, density: float, variant: str) -> Array:
    scores, changes = (in_the_paper if variant == "paper" else released)(tau, density)
    total = scores.sum(axis=0)
    merged_changes = (scores * changes).sum(axis=0)
    return np.divide(merged_changes, total, out=np.zeros_like(total), where=total > 0)


def doubles(values: Array) -> nn.Module:
    """Return a module of two entries that have the values one after the other."""
    result = nn.Module()
    cut = len(values) // 3
    result.a = nn.Parameter(torch.tensor(values[:cut]))
    result.b = nn.Parameter(torch.tensor(values[cut:]))
    return result


def run(method: PCBMerging, base: Array, tau: Array) -> Array:
    models = {f"m{i}": doubles(base + row) for i, row in enumerate(tau)}
    made: Any = method.run({BASE: doubles(base), **models})
    return np.concatenate([made["a"].numpy(), made["b"].numpy()])


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(3, 40),
    st.sampled_from([0, 0.1, 0.25, 0.5, 0.9, 1]),
)
@settings(deadline=None, max_examples=examples(40))
def test_against_the_formula(
    variant: Any, seed: int, tasks: int, size: int, density: float
) -> None:
    generator = np.random.default_rng(seed)
    base, tau = generator.normal(size=size), generator.normal(size=(tasks, size))
    found = run(PCBMerging(density, 1.5, variant), base, tau)
    expected = base + 1.5 * reference(tau, density, variant)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_and_small_changes_give_the_same_picture(variant: Any) -> None:
    tau = np.random.default_rng(0).normal(size=(3, 30_000))
    for size in (1e-4, 1):  # 30,000 elements are enough to be clipped
        found = run(PCBMerging(0.2, variant=variant), np.zeros(30_000), size * tau)
        expected = reference(size * tau, 0.2, variant)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9 * size)


def test_by_hand() -> None:
    # N(tau²) is (0, 1/3, 1): scores grow with the magnitude, and one model's mean is itself.
    one = [[1.0, -2.0, 3.1]]
    for density, expected in ((1, [1, -2, 3.1]), (0.67, [0, -2, 3.1]), (0.34, [0, 0, 3.1])):
        found = merged(PCBMerging(density), one, [0.0] * 3)
        assert found.tolist() == pytest.approx(expected)


def test_two_models_by_hand() -> None:
    found = merged(PCBMerging(0.34), [[4.0, 1.0, 0.0], [2.0, 0.0, 1.0]], [0.0] * 3)
    # The first wins in both: N(tau²) is (1, 1/16, 0) and (1, 0, 1/4), between them (1, 0, 0).
    e, between = math.e, math.e / (math.e + 2)
    a = e**2 / (e**2 + e ** (1 / 8) + 1) * (e / (e + e ** (1 / 16) + 1) + between)
    b = e**2 / (e**2 + e ** (1 / 2) + 1) * (e / (e + e ** (1 / 4) + 1) + between)
    assert found.tolist() == pytest.approx([(4 * a + 2 * b) / (a + b), 0, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_models_give_that_change_where_it_counts(variant: Any) -> None:
    tau = np.random.default_rng(1).normal(size=50)
    found = run(PCBMerging(0.3, 2, variant), np.zeros(50), np.stack([tau] * 3))
    kept = np.argsort(-np.abs(tau))[:15]
    np.testing.assert_allclose(found[kept], 2 * tau[kept])
    assert np.count_nonzero(found) == 15


def test_all_of_one_model_is_that_model() -> None:
    generator = torch.Generator().manual_seed(0)
    base, model = torch.randn(2, 60, generator=generator)
    found = merged(PCBMerging(1), [model.tolist()], base.tolist())
    torch.testing.assert_close(found, model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_no_change_is_no_nan(variant: Any, density: float) -> None:
    method = PCBMerging(density, 1, variant)
    base = [1.0, 2.0, 0.1]
    assert torch.equal(merged(method, [base, base], base), torch.tensor(base))
    assert merged(method, [base, [1.5, 2, 0.1]], base).isfinite().all()
    assert merged(method, [[2.0, 3, 1.1]], base).isfinite().all()  # all changes are equal
    assert merged(method, [2.0, 3.0], 1.0).isfinite()
    tiny = [[1e-22, 2e-22, 0.0], [3e-22, 0.0, 1e-30]]
    assert merged(method, tiny, [0.0] * 3).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_without_floats_are_copied(variant: Any) -> None:
    counters = nn.Module()
    counters.register_buffer("count", torch.tensor([1, 2]))
    made: Any = PCBMerging(variant=variant).run({BASE: counters, "a": counters})
    assert made["count"].tolist() == [1, 2]


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"density: 20 is not a number from 0 to 1"):
        PCBMerging(density=20)
    with pytest.raises(FusionBenchError, match=r"variant.*Did you mean 'released'"):
        PCBMerging(variant="release")  # type: ignore[arg-type]
