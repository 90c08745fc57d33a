import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion_bench.weights import draws
from fusion_bench.weights.draws import Uniform, bernoulli, drop, uniform

quick = settings(deadline=None, max_examples=examples(80))


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
        patch.setattr(draws, "_BLOCK", 8 * words)
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


# --- pieces that share blocks


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 4), st.integers(1, 12))
@quick
def test_pieces_that_share_blocks_get_the_same(size: int, step: int, kept: int, words: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_BLOCK", 8 * words)
        draw = Uniform(kept)
        starts = range(0, size, step)
        parts = [draw(start, min(step, size - start), size, (0, "m", "k")) for start in starts]
        assert np.concatenate(parts).tolist() == uniform(size, (0, "m", "k")).tolist()


def test_a_block_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    block = draws._uniform_block

    def counted(seed: Sequence[object], *place: int) -> NDArray[np.float32]:
        made.append((*seed, *place))
        return block(seed, *place)

    monkeypatch.setattr(draws, "_BLOCK", 64)
    monkeypatch.setattr(draws, "_uniform_block", counted)
    draw = Uniform(4)
    for start in range(0, 200, 50):
        for model in ("a", "b"):
            draw(start, 50, 200, (model,))
    expected = [(m, n, 64 if n < 3 else 8) for n in range(4) for m in "ab"]
    assert sorted(made, key=repr) == sorted(expected, key=repr)


def test_numbers_are_those_of_numpy() -> None:
    expected = draws._generator(0, "m", "k", 0).random(1001, dtype=np.float32)
    assert uniform(1001, (0, "m", "k")).tolist() == expected.tolist()
