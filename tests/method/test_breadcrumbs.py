from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench.method import ModelBreadcrumbs, TaskArithmeticAlgorithm
from fusion_bench.problems import FusionBenchError

TEN = [4.0, -10, 2, 9, -1, 5, 6, -3, 8, 7]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_by_hand(scope: Any) -> None:
    method = ModelBreadcrumbs(1, density=0.6, gamma=0.1, scope=scope)
    expected = [x if 4 <= abs(x) <= 9 else 0 for x in TEN]
    assert merged(method, [TEN], [0.0] * 10).tolist() == expected


def test_rows_are_masked_apart() -> None:
    models, base = [[TEN, [100 * x for x in TEN]]], [[0.0] * 10] * 2
    row = merged(ModelBreadcrumbs(1, 0.6, 0.1, "row"), models, base)
    assert (row != 0).sum(1).tolist() == [6, 6]
    tensor = merged(ModelBreadcrumbs(1, 0.5, 0.1), models, base)
    assert (tensor != 0).sum(1).tolist() == [2, 8]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_without_tails_it_is_task_arithmetic(scope: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = torch.randn(4, 3, 5, generator=generator).tolist()
    ours = merged(ModelBreadcrumbs(0.3, density=1, gamma=0, scope=scope), models, base)
    assert torch.equal(ours, merged(TaskArithmeticAlgorithm(0.3), models, base))


@settings(deadline=None, max_examples=examples(60))
@given(
    shape=st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4)]),
    density=st.integers(0, 100),
    gamma=st.integers(0, 100),
    scope=st.sampled_from(["tensor", "row"]),
    seed=st.integers(0, 99),
)
def test_against_the_formula(
    shape: tuple[int, ...], density: int, gamma: int, scope: Any, seed: int
) -> None:
    tau = np.random.default_rng(seed).permuted(
        np.arange(1, 2 * np.prod(shape) + 1).reshape(2, *shape) * 0.5
    )
    expected = np.zeros(shape)
    for own in tau:
        for row, out in (
            zip(own.reshape(-1, shape[-1]), expected.reshape(-1, shape[-1]), strict=True)
            if scope == "row"
            else [(own.reshape(-1), expected.reshape(-1))]
        ):
            top, kept = len(row) * gamma // 100, len(row) * density // 100
            chosen = np.argsort(-np.abs(row))[top : top + kept]
            out[chosen] += row[chosen]
    method = ModelBreadcrumbs(0.5, density / 100, gamma / 100, scope)
    found = merged(method, tau.tolist(), np.zeros(shape).tolist())
    np.testing.assert_allclose(found.double().numpy(), 0.5 * expected)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_counts_are_exact_however_many_are_equal(scope: Any) -> None:
    method = ModelBreadcrumbs(1, density=0.29, gamma=0.07, scope=scope)
    result = merged(method, [[1.0] * 100], [0.0] * 100)
    assert result.sum() == 29


def test_a_number_alone_is_kept() -> None:
    assert merged(ModelBreadcrumbs(1), [3.0], 1.0).item() == 3


def test_nothing_changed() -> None:
    base = [0.1, 0.2, 0.3]
    assert torch.equal(merged(ModelBreadcrumbs(), [base] * 2, base), torch.tensor(base))


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"density: 2 is not"):
        ModelBreadcrumbs(density=2)
    with pytest.raises(FusionBenchError, match=r"gamma: -1 is not"):
        ModelBreadcrumbs(gamma=-1)
    with pytest.raises(FusionBenchError, match=r"scope.*Did you mean 'row'"):
        ModelBreadcrumbs(scope="rows")  # type: ignore[arg-type]
