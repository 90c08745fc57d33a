"""Races drop candidates by a test whose error is checked here by simulation."""

from itertools import permutations, product
from math import inf, log, prod

import numpy as np
import pytest

from fusion_bench.results.race import Race, evidence, least

BETS = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]


def wealths(differences, sizes, weights, start=0):
    """Return the mean wealth after each step, by the formula, in plain numbers."""
    wealth, found = [1.0] * len(BETS), [1.0]
    for step in range(max(map(len, differences))):
        tasks = [k for k, size in enumerate(sizes) if step < size]
        seen = sum(
            w / n * sum(d[:step]) for d, n, w in zip(differences, sizes, weights, strict=True)
        )
        unseen = {k: weights[k] * (sizes[k] - step) / sizes[k] for k in tasks}
        if step >= start:
            largest = 1 / (max(unseen.values()) - seen / len(tasks))
            for i, bet in enumerate(BETS):
                wealth[i] *= prod(
                    1 + bet * largest * (unseen[k] * differences[k][step] + seen / len(tasks))
                    for k in tasks
                )
        found.append(sum(wealth) / len(BETS))
    return found


def test_the_evidence_is_the_log_of_the_largest_wealth() -> None:
    random = np.random.default_rng(3)
    sizes, weights = [30, 4, 60], [0.5, 0.2, 0.7]
    for start in (0, 3):
        own = [random.choice([-1.0, 0.0, 0.0, 1.0, 0.5], min(12, size)) for size in sizes]
        expected = max(wealths([d.tolist() for d in own], sizes, weights, start)[start:])
        assert evidence(own, sizes, weights, start) == pytest.approx(log(expected), abs=1e-12)


def test_the_wealth_of_equals_is_expected_to_stay() -> None:
    """All orders of two small tasks whose differences cancel out, by hand and exactly."""
    one, two = [1.0, 0.0, -1.0], [0.5, -0.5]
    orders = list(product(permutations(one), permutations(two)))
    for steps in (1, 2):
        found = [
            wealths([list(a[:steps]), list(b[:steps])], [3, 2], [0.6, 0.4])[-1] for a, b in orders
        ]
        assert sum(found) / len(orders) <= 1 + 1e-12


def test_what_is_certain_needs_no_bet() -> None:
    assert evidence([np.array([1.0, 1.0])], [3], [1.0]) == inf  # 2/3 whatever the last one is
    assert evidence([np.array([1.0, -1.0])], [2], [1.0]) < inf  # equal
    assert evidence([np.array([-1.0, -1.0])], [3], [1.0]) == 0
    assert evidence([np.array([1.0, 0.0])], [2], [1.0], start=2) == inf
    assert evidence([np.array([1.0, 1.0])], [9], [1.0], start=2) == 0  # seen, but not bet on


@pytest.mark.parametrize("start", [0, 5])
def test_an_equal_candidate_looks_worse_as_rarely_as_stated(start: int) -> None:
    """At the edge of the hypothesis, with tasks of different sizes, weights and differences."""
    random = np.random.default_rng(0)
    alpha, runs = 0.1, 2000
    a = np.repeat([1.0, 0.0, -1.0], [12, 40, 8])  # mean 1/15
    b = np.repeat([1.0, 0.0, -1.0], [2, 10, 6])  # mean -2/9
    weights = [2 / 9, 1 / 15]  # the weighted sum is 0
    wrong = 0
    for _ in range(runs):
        own = [random.permutation(a), random.permutation(b)]
        # Every time is a look; only the very last sample would make the differences certain.
        wrong += evidence([d[:59] for d in own], [60, 18], weights, start) >= log(1 / alpha)
    assert wrong / runs <= alpha
    assert wrong > 0  # so that the test is not empty


def population(random, chances, sizes):
    """Return right answers of candidates that mostly agree on what is difficult."""
    found = {}
    for task, size in sizes.items():
        hard = random.random(size)
        own = np.where(random.random((len(chances), size)) < 0.7, hard, random.random(size))
        found[task] = (own < np.array(chances)[:, None]).astype(float)
    return found


SIZES = {"a": 80, "b": 25, "c": 50}
WEIGHTS = {"a": 0.3, "b": 0.4, "c": 0.35}


def race(values, count, seed=0, alpha=0.05):
    asked: list[tuple[int, dict]] = []

    def evaluate(number, samples):
        asked.append((number, samples))
        return {task: values[task][number][own] for task, own in samples.items()}

    own = Race(SIZES, WEIGHTS, evaluate, alpha, seed)
    for _ in range(count):
        own.add()
    return own, asked


def score(values, number):
    return sum(weight * values[task][number].mean() for task, weight in WEIGHTS.items())


def test_the_best_one_of_all_samples_is_dropped_as_rarely_as_stated() -> None:
    random = np.random.default_rng(1)
    alpha, runs, wrong, dropped = 0.2, 150, 0, 0
    for seed in range(runs):
        values = population(random, [0.6, 0.62, 0.58, 0.4, 0.2], SIZES)
        scores = [score(values, number) for number in range(5)]
        own, _ = race(values, 5, seed, alpha)
        own.settle()
        dropped += sum(racer.left == "worse" for racer in own.racers)
        wrong += own.racers[int(np.argmax(scores))].left == "worse"
    assert wrong / runs <= alpha
    assert dropped > 2 * runs


def test_without_a_limit_the_winner_is_that_of_all_samples() -> None:
    values = population(np.random.default_rng(2), [0.5, 0.55, 0.6, 0.6, 0.3], SIZES)
    own, _ = race(values, 5)
    winner = own.settle()
    scores = [score(values, number) for number in range(5)]
    assert winner == int(np.argmax(scores))
    assert own.spent < 5 * 155
    for number, racer in enumerate(own.racers):
        if number != winner:
            assert racer.left == "worse" and racer.by is not None and racer.behind > 0


def test_of_equals_the_first_one_wins_with_all_samples() -> None:
    values = population(np.random.default_rng(2), [0.5], SIZES)
    own, _ = race({task: np.repeat(v, 3, axis=0) for task, v in values.items()}, 3)
    assert own.settle() == 0 and own.spent == 3 * 155
    assert [racer.left for racer in own.racers] == [None] * 3


def test_a_limit_halves_the_field_and_is_kept() -> None:
    values = population(np.random.default_rng(4), [0.5 + 0.01 * i for i in range(10)], SIZES)
    most = 10 * 155 // 5
    own, asked = race(values, 10)
    winner = own.settle(most)
    taken = sorted(own.taken(number) for number in range(10))
    assert own.spent == sum(taken) <= most and own.spent > 0.9 * most
    assert own.taken(winner) == taken[-1]
    assert len(set(taken)) == 4  # after rounds of 10, 5, 3 and 2
    ends = [racer.left for racer in own.racers]
    assert ends.count("behind") + ends.count("worse") == 8 and own.racers[winner].left is None
    again, same = race(values, 10)
    assert again.settle(most) == winner
    assert [n for n, _ in same] == [n for n, _ in asked]


def test_candidates_share_samples_and_no_sample_is_asked_twice() -> None:
    values = population(np.random.default_rng(5), [0.5, 0.52, 0.54, 0.56], SIZES)
    own, asked = race(values, 4, seed=7)
    own.settle()
    seen: dict[int, dict[str, set[int]]] = {}
    for number, samples in asked:
        for task, new in samples.items():
            assert (np.diff(new) > 0).all()
            before = seen.setdefault(number, {}).setdefault(task, set())
            assert not before & set(new)
            before |= set(new)
    for number, tasks in seen.items():
        for task, own_samples in tasks.items():
            steps = own.racers[number].steps
            assert own_samples == set(own.order[task][:steps])


def test_the_least_budget_is_enough() -> None:
    values = population(np.random.default_rng(6), [0.5] * 7, SIZES)
    own, _ = race(values, 7)
    own.settle(least(SIZES, 7))
    assert all(racer.steps > 0 for racer in own.racers)


def test_what_was_seen_before_the_race_is_not_bet_on() -> None:
    values = population(np.random.default_rng(8), [0.1, 0.9, 0.5, 0.5], SIZES)
    own, _ = race(values, 4)
    own.advance(range(4), 20)
    winner = own.settle(own.spent + 60)
    assert winner == 1
    assert [racer.left for racer in own.racers].count("behind") == 2  # the worse half, at once
    assert min(racer.steps for racer in own.racers) == 20
