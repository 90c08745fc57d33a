import threading
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_weights import noise, opened, themselves
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.weights.statistics import Majority, Piece, extremes, once, sums, total
from fusion_bench.weights.stream import NotYet

State = dict[str, Tensor]
quick = settings(deadline=None, max_examples=examples(40))


# --- sums


def test_sums_by_hand() -> None:
    a = {"w": torch.tensor([[1.0, 2], [3, -4]]), "b": torch.tensor(0.5)}
    b = {"w": torch.ones(2, 2), "b": torch.tensor(-1.0)}
    found = sums(opened(a, b), themselves)
    assert found == {"b": [0.5, -1], "w": [2, 4]} and list(found) == ["b", "w"]
    assert total(found) == [2.5, 3]


def test_what_is_not_merged_has_no_sum() -> None:
    state = {"i": torch.tensor([1, 2]), "e": torch.empty(0, 3), "f": torch.tensor([1.0])}
    assert sums(opened(state), themselves) == {"f": [1]}
    del state["f"]
    assert sums(opened(state), themselves) == {} and total({}) == []


def test_tied_entries_are_summed_once() -> None:
    tensor = torch.ones(3)
    assert total(sums(opened({"x": tensor, "y": tensor}), themselves)) == [3]


def test_sums_are_in_float64() -> None:
    state = {"a": torch.tensor([2.0**25, 1, 1]), "b": torch.tensor([-(2.0**25)])}
    assert total(sums(opened(state), themselves)) == [2]
    ones = {"a": torch.ones(300, dtype=torch.bfloat16)}
    assert total(sums(opened(ones), themselves)) == [300]


def test_positive_values_are_summed_in_short_rows() -> None:
    state = {"a": noise(300_001).abs(), "b": noise(70, torch.float64).abs(), "c": torch.ones(130)}
    (found,) = total(sums(opened(state), themselves, positive=True))
    expected = sum(float(tensor.double().sum()) for tensor in state.values())
    assert found == pytest.approx(expected, rel=1e-8)
    assert sums(opened(state, whole=True), themselves, positive=True)["c"] == [130]


@pytest.mark.parametrize("in_threads", [False, True])
def test_totals_are_rounded_once_whatever_the_order(in_threads: bool) -> None:
    numbers = [1e16, 1.0, -1e16, 1.0, 1e-9, 3e15]
    found = set()
    for order in (numbers, numbers[::-1], sorted(numbers)):
        state = {f"k{i}": torch.tensor(n, dtype=torch.float64) for i, n in enumerate(order)}
        found |= set(total(sums(opened(state, in_threads=in_threads), themselves)))
    assert found == {3e15 + 2}


def test_sums_do_not_depend_on_how_entries_are_cut() -> None:
    state = {"a": noise(300_000, torch.float64), "b": noise(70_001)}
    expected = sums(opened(state), themselves)
    assert sums(opened(state, whole=True), themselves) == expected


def test_sums_do_not_depend_on_threads() -> None:
    state = {"a": noise(300_000, torch.float64), "b": noise(70_001)}
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [sums(opened(state, in_threads=t), themselves) for t in (False, True)]
    finally:
        torch.set_num_threads(before)
    assert all(result == found[0] for result in found)


# --- extremes


def test_extremes_by_hand() -> None:
    a = {"w": torch.tensor([[1.0, 2], [3, -4]]), "b": torch.tensor(5.5), "e": torch.empty(0)}
    b = {"w": torch.full((2, 2), -2.0), "b": torch.tensor(-1.0), "e": torch.empty(0)}
    assert extremes(opened(a, b), themselves) == [(-4, 5.5), (-2, -1)]


def test_there_are_no_extremes_of_nothing() -> None:
    assert extremes(opened({"i": torch.tensor([1])}), themselves) == []


def test_extremes_show_nan_wherever_it_is() -> None:
    for order in ("ab", "ba"):
        state = dict(zip(order, (torch.tensor([torch.nan]), torch.ones(1)), strict=True))
        assert all(np.isnan(end) for end in extremes(opened(state), themselves)[0])


@given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.integers(0, 99))
@quick
def test_extremes_do_not_depend_on_cuts_or_threads(
    piece: int, size: int, in_threads: bool, seed: int
) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    state = {"b": values[: size // 2], "a": values[size // 2 :].double()}
    expected = [(float(values.min()), float(values.max()))]
    for whole in (False, True):
        inputs = opened(state, piece=piece, in_threads=in_threads, whole=whole)
        assert extremes(inputs, themselves) == expected


# --- the majority


def signs(*piece: *Piece) -> Tensor:
    return piece[2][0].sign()


@pytest.mark.parametrize("counted", [0, 1, 2, 3])
def test_the_majority_is_of_all_pieces_whoever_counts_them(counted: int) -> None:
    state = {"a": torch.tensor([1.0, 1, -1, -1, -1]), "b": torch.tensor([0.0, 0, float("nan")])}
    inputs = opened(state, piece=3)
    majority = Majority(inputs, signs)
    pieces = [("a", 0, 3), ("a", 3, 5), ("b", 0, 3)]
    for key, start, stop in [*pieces[:counted], *pieces[:counted], ("a", 1, 3)]:
        majority.add(key, start, signs(key, start, *inputs.read(key, start, stop)))
    if counted < 3:
        with pytest.raises(NotYet) as missing:
            majority()
        missing.value.find()
    assert majority() == -1  # NaN has no sign
    assert inputs.surveys == (counted < 3)


# --- once


def test_it_is_computed_once_and_not_before() -> None:
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 7

    get = once(compute)
    assert not calls
    assert get() == get() == 7 and len(calls) == 1


def test_other_threads_wait_for_it() -> None:
    inside, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        inside.set()
        assert go_on.wait(10)
        return 7

    get = once(compute)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert inside.wait(10) and not found
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [7] * 4 and len(calls) == 1


def test_a_failure_is_not_kept() -> None:
    outcomes = iter([ValueError("first"), 5])

    def compute() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    get = once(compute)
    with pytest.raises(ValueError, match="first"):
        get()
    assert get() == 5
