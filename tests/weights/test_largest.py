from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_weights import Cut, noise, opened, themselves
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fusion_bench.weights import largest as search
from fusion_bench.weights.largest import Cutoff, largest

State = dict[str, Tensor]
quick = settings(deadline=None, max_examples=examples(40))


def kept(state: State, cutoff: Cutoff, piece: int = 2**18) -> NDArray[Any]:
    """Return what is left of a model, in the order of its keys."""
    parts = [
        cutoff.keep(key, start, part)
        for key in sorted(state)
        for start, part in zip(
            range(0, max(state[key].numel(), 1), piece), wide(state[key]).split(piece), strict=True
        )
    ]
    return np.concatenate([part.double().numpy() for part in parts])


def wide(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float()


def in_order(state: Mapping[str, Tensor]) -> NDArray[Any]:
    return np.concatenate([wide(state[key]).double().numpy() for key in sorted(state)])


def reference(values: NDArray[Any], count: int, ties: bool) -> NDArray[Any]:
    """Return the ``count`` elements of largest magnitude, by sorting, and 0 elsewhere."""
    order = np.argsort(-np.abs(values), kind="stable")
    mask = np.zeros(len(values), bool)
    mask[order[:count]] = True
    if ties and count:
        mask = np.abs(values) >= np.abs(values)[order[count - 1]]
    return np.where(mask, values, 0)


def check(*models: State, counts: Sequence[int], piece: int = 2**18, **options: Any) -> Cut:
    """Compare the largest elements with those that sorting finds."""
    for ties in (False, True):
        inputs = opened(*models, piece=piece, **options)
        cutoffs = largest(inputs, themselves, counts, ties=ties)
        assert len(cutoffs) == len(models)
        for state, count, cutoff in zip(models, counts, cutoffs, strict=True):
            expected = reference(in_order(state), count, ties)
            for size in (piece, 3, 2**18):
                np.testing.assert_array_equal(kept(state, cutoff, size), expected)
    return inputs


# --- the largest elements


def test_largest_by_hand() -> None:
    state = {"w": torch.tensor([[1.0, -4], [3, 2]]), "b": torch.tensor(-2.0)}
    assert largest(opened(state), themselves, [2]) == [Cutoff(3)]
    assert largest(opened(state), themselves, [3]) == [Cutoff(2, ("b", 0))]
    assert largest(opened(state), themselves, [3], ties=True) == [Cutoff(2)]
    assert largest(opened(state), themselves, [4]) == [Cutoff(2)]


def test_each_quantity_has_a_count_of_its_own() -> None:
    a, b = noise(100), -noise(101)[:100]
    check({"w": a}, {"w": b}, {"w": a}, {"w": b}, counts=[0, 1, 37, 100])


def test_none_all_and_more_than_all() -> None:
    state = {"a": torch.tensor([1.0, -2, 0]), "b": torch.tensor([2.0])}
    for ties in (False, True):
        none, every, more = largest(opened(state, state, state), themselves, [0, 4, 9], ties=ties)
        assert not kept(state, none).any()
        assert kept(state, every).tolist() == kept(state, more).tolist() == [1, -2, 0, 2]


def test_nothing_at_all_has_no_largest() -> None:
    assert len(largest(opened({"i": torch.tensor([1])}), themselves, [1])) == 1


numbers = st.one_of(
    st.integers(-3, 3).map(float),  # mostly ties
    st.floats(-1024, 1024, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 60000.0]),
)


@st.composite
def states(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> State:
    keys = draw(st.permutations(["b", "a.1", "a", "ä"]))[: draw(st.integers(1, 4))]
    return {
        key: torch.tensor(draw(st.lists(numbers, max_size=12)), dtype=torch.float64).to(
            draw(st.sampled_from(dtypes))
        )
        for key in keys
    }


@given(st.data(), st.integers(1, 13), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=examples(80))
def test_largest_against_sorting(data: st.DataObject, piece: int, widest: torch.dtype) -> None:
    state = data.draw(states([widest]))
    size = sum(tensor.numel() for tensor in state.values())
    count = data.draw(st.integers(0, size))
    whole, in_threads = data.draw(st.booleans()), data.draw(st.booleans())
    check(state, counts=[count], piece=piece, whole=whole, in_threads=in_threads)


@given(st.data())
@quick
def test_bfloat16_has_many_ties(data: st.DataObject) -> None:
    state = data.draw(states([torch.float32, torch.bfloat16, torch.float16]))
    size = sum(tensor.numel() for tensor in state.values())
    check(state, counts=[data.draw(st.integers(0, size))], piece=5)


@pytest.mark.parametrize("value", [1.0, -0.25, 0.0, 1e-45])
def test_where_all_are_equal_the_first_keys_are_kept(value: float) -> None:
    state = {key: torch.full((7,), value) for key in ("z", "a", "m")}
    for count in (1, 6, 7, 8, 20, 21):
        check(state, counts=[count], piece=3)
    (cutoff,) = largest(opened(state), themselves, [9])
    assert np.flatnonzero(kept(state, cutoff)).tolist() == (list(range(9)) if value else [])


def test_float64_is_told_apart_beyond_float32() -> None:
    close = 1 + torch.arange(50, dtype=torch.float64) * 2.0**-52
    for count in (1, 20, 49):
        check({"a": close.flip(0)}, counts=[count])


def test_float32_beside_float64() -> None:
    finer = torch.tensor([1 + 2.0**-40, 1 - 2.0**-40, 1.0], dtype=torch.float64)
    state = {"a": finer, "b": torch.tensor([1.0, 1 + 2.0**-23, 1 - 2.0**-24])}
    for count in range(7):
        check(state, counts=[count])


def test_neither_the_file_s_order_nor_cuts_nor_threads_matter() -> None:
    values = (noise(300) * 4).round()
    forwards = {f"k{i:02}": part for i, part in enumerate(values.split(25))}
    backwards = dict(reversed(forwards.items()))
    expected = largest(opened(forwards), themselves, [123])
    assert expected[0].last is not None
    for piece in (1, 17, 2**18):
        for state in (forwards, backwards):
            for options in ({}, {"in_threads": True}, {"whole": True}):
                inputs = opened(state, piece=piece, **options)
                assert largest(inputs, themselves, [123]) == expected


def test_tied_entries_are_counted_once() -> None:
    tensor = torch.tensor([3.0, 1, 2])
    assert largest(opened({"x": tensor, "y": tensor}), themselves, [2]) == [Cutoff(2)]


def test_infinity_is_the_largest() -> None:
    check({"a": torch.tensor([1.0, -torch.inf, 2, torch.inf])}, counts=[3])


# --- the start from a sample


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make small models large enough for a sample."""
    monkeypatch.setattr(search, "_FEW", 1000)
    monkeypatch.setattr(search, "_SAMPLED", 5)
    return monkeypatch


def spread(size: int = 10_000) -> State:
    values = torch.randn(size, generator=torch.Generator().manual_seed(3))
    return {"b": values[: size // 3], "a": values[size // 3 :]}


def test_a_good_estimate_saves_a_look(samples: pytest.MonkeyPatch) -> None:
    state = spread()
    for count in (1, 2000, 4000, 5000, 9999):
        assert check(state, counts=[count]).surveys == 1
    assert check(state, state, counts=[2000, 5000], piece=999).surveys == 1


def test_few_elements_are_remembered() -> None:
    for count in (1, 2000, 9999):
        assert check(spread(), counts=[count]).surveys == 1


def test_models_that_are_computed_are_not_sampled(samples: pytest.MonkeyPatch) -> None:
    samples.setattr(search, "_REMEMBERED", 1000)
    assert check(spread(), counts=[2000], whole=True).surveys == 2


def test_an_estimate_that_fails_costs_a_look_and_nothing_else(samples: pytest.MonkeyPatch) -> None:
    samples.setattr(search, "_DEVIATIONS", 0)
    looks = set()
    for seed in range(8):
        values = torch.randn(10_000, generator=torch.Generator().manual_seed(seed))
        looks.add(check({"a": values}, counts=[2000]).surveys)
    assert max(looks) > 1


@pytest.mark.parametrize("seen", ["largest", "smallest", "zeros"])
def test_samples_that_mislead(samples: pytest.MonkeyPatch, seen: str) -> None:
    values = spread()["a"].abs() + 1
    values[::5].mul_({"largest": 1e6, "smallest": 1e-6, "zeros": 0}[seen])
    for count in (1500, 2500, 5000):
        assert check({"a": values}, counts=[count]).surveys > 1
    for count in (1, 100, len(values) - 1):
        check({"a": values}, counts=[count])


@pytest.mark.parametrize("remembered", [10, 300, 2**24])
def test_equal_elements_beyond_what_is_remembered(
    samples: pytest.MonkeyPatch, remembered: int
) -> None:
    samples.setattr(search, "_REMEMBERED", remembered)
    state = {key: value.round(decimals=1) for key, value in spread(4000).items()}
    for count in (1, 1000, 3000, 3999):
        check(state, counts=[count])


@given(
    st.integers(0, 99),
    st.sampled_from([16, 2**9]),
    st.sampled_from([3, 61]),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([2**8, 2**16]),
    st.sampled_from([0, 40, 2**24]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 1),
    st.sampled_from([0, 1, 4]),
)
@settings(deadline=None, max_examples=examples(30))
def test_whatever_the_sample_the_result_is_exact(
    seed: int,
    coarse: int,
    sampled: int,
    deviations: int,
    fine: int,
    remembered: int,
    dtype: torch.dtype,
    share: float,
    digits: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1500, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    values = values.round(decimals=digits)
    parts = dict(zip("dacb", values.split([1, 299, 900, 300]), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_FEW", 1000)
        patch.setattr(search, "_SAMPLED", sampled)
        patch.setattr(search, "_COARSE", coarse)
        patch.setattr(search, "_FINE", fine)
        patch.setattr(search, "_DEVIATIONS", deviations)
        patch.setattr(search, "_REMEMBERED", remembered)
        check(parts, parts, counts=[int(share * 1500), 1500 - int(share * 1500)])
