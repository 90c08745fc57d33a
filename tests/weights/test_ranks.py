from collections.abc import Callable

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.weights import ranks
from fusion_bench.weights.ranks import by_rank

quick = settings(deadline=None, max_examples=examples(80))


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


#: Of normal numbers: some with equal magnitudes, with none, with few that are large, or no numbers.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda rows: rows,
    "equal": lambda rows: rows.bfloat16().float(),
    "zero": lambda rows: rows * 0,
    "small": lambda rows: rows * 1e-44,
    "large": lambda rows: rows * 1e38,
    "far apart": lambda rows: rows**9,
    "infinite": lambda rows: torch.where(rows > 2, torch.inf, rows),
    "none": lambda rows: torch.where(rows > 2, torch.nan, rows),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 2, 3, 512, 513, 5000, 2**16, 2**16 + 1])
def test_ranks_of_long_rows_against_a_stable_sort(kind: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    rows = KINDS[kind](torch.randn(max(1, 20000 // columns), columns, generator=generator))
    order = np.argsort(rows.abs().double().numpy(), axis=1, kind="stable")
    expected = np.empty(rows.shape, np.float32)
    np.put_along_axis(expected, order, np.arange(columns, dtype=np.float32)[None], 1)
    found = by_rank(rows, torch.arange(columns).float())
    np.testing.assert_array_equal(found.numpy(), expected)


def test_neighbours_in_the_wrong_order_are_swapped() -> None:
    magnitudes = np.array([3, 2, 1, 1, 0, 9, 8, 8, 7, 7], np.float32)
    order = np.array([0, 1, 2, 3, 4] * 2)
    wrong = np.flatnonzero([*(magnitudes[:-1] > magnitudes[1:]), False])
    ranks._swap(order, magnitudes, wrong[wrong != 4], 5)
    assert order.tolist() == [4, 2, 3, 1, 0, 3, 4, 1, 2, 0]
