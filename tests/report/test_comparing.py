"""The paired bootstrap against scipy's, on synthetic predictions, and against sums by hand."""

from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
from fixtures_report import model, report
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import bootstrap

from fusion_bench.report.comparing import compare, verdict
from fusion_bench.report.figures import comparison_sentence
from fusion_bench.report.schema import Comparison, Difference
from fusion_bench.results import ACCURACY, SampleScores, with_ones

Answers = dict[str, NDArray[np.bool_]]


def scores(answers: Answers) -> dict[str, SampleScores]:
    return {
        task: SampleScores(np.arange(len(right)), {"accuracy": with_ones(right)})
        for task, right in answers.items()
    }


def draw(seed: int, **rates: tuple[int, float]) -> Answers:
    random = np.random.default_rng(seed)
    return {task: random.random(size) < rate for task, (size, rate) in rates.items()}


def on(found: Comparison, task: str) -> Difference:
    of_task = found.on(task)
    assert of_task is not None
    return of_task


def average(found: Comparison) -> Difference:
    assert found.average is not None
    return found.average


def difference(one: Answers, other: Answers, individual: Answers | None = None) -> Comparison:
    metrics = dict.fromkeys([*one, *other], ACCURACY)
    own = scores(individual or {})
    return compare("one", scores(one), "other", scores(other), own, metrics)


def test_the_estimate_is_the_difference_of_the_accuracies() -> None:
    one = {"a": np.array([1, 1, 1, 0], bool), "b": np.array([1, 0], bool)}
    other = {"a": np.array([1, 0, 0, 0], bool), "b": np.array([1, 1], bool)}
    own = {"a": np.array([1, 1, 1, 1], bool), "b": np.array([1, 0], bool)}
    found = difference(one, other, own)
    assert on(found, "a").difference == 0.5 and on(found, "b").difference == -0.5
    assert average(found).difference == 0
    assert found.normalized is not None
    assert found.normalized.difference == pytest.approx(fmean([0.5 / 1, -0.5 / 0.5]))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_scipys(seed: int) -> None:
    one, other = draw(seed, a=(400, 0.8)), draw(seed + 10, a=(400, 0.7))
    found = on(difference(one, other), "a")
    reference = bootstrap(
        (one["a"].astype(float), other["a"].astype(float)),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=width / 20)
    assert found.high == pytest.approx(reference.high, abs=width / 20)


def test_the_normalised_interval_is_scipys() -> None:
    one, other, own = (draw(s, a=(300, r)) for s, r in enumerate((0.7, 0.6, 0.9)))
    found = difference(one, other, own).normalized
    reference = bootstrap(
        tuple(model["a"].astype(float) for model in (one, other, own)),
        lambda x, y, z, axis: (x.mean(axis=axis) - y.mean(axis=axis)) / z.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = reference.high - reference.low
    assert found is not None
    assert found.low == pytest.approx(reference.low, abs=width / 20)
    assert found.high == pytest.approx(reference.high, abs=width / 20)


def test_tasks_weigh_the_same_and_are_resampled_apart() -> None:
    one = draw(0, a=(100, 0.9), b=(2000, 0.5))
    other = draw(1, a=(100, 0.5), b=(2000, 0.5))
    found = difference(one, other)
    spread = [(d.high - d.low) / 2 for d in map(found.on, found.tasks)]
    assert average(found).difference == pytest.approx(
        fmean(d.difference for d in map(found.on, found.tasks))
    )
    assert (average(found).high - average(found).low) / 2 == pytest.approx(
        np.hypot(*spread) / 2, rel=0.1
    )


def test_pairing_tells_more_than_two_samples_would() -> None:
    one = draw(0, a=(1000, 0.8))
    other = {"a": one["a"].copy()}
    other["a"][np.flatnonzero(one["a"])[:15]] = False
    found = difference(one, other)
    assert found.verdict == "better" and average(found).low > 0
    apart = difference(one, draw(5, a=(1000, other["a"].mean())))
    assert on(apart, "a").high - on(apart, "a").low > 3 * (on(found, "a").high - on(found, "a").low)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_other_way_round_is_the_opposite(pairs: list[tuple[bool, bool]]) -> None:
    one, other = ({"a": np.array(column)} for column in zip(*pairs, strict=True))
    forth, back = difference(one, other), difference(other, one)
    assert average(forth).difference == -average(back).difference
    for found in (forth, back):
        ends = (average(found).low, average(found).difference, average(found).high)
        assert all(-1 <= end <= 1 for end in ends)
        if found.verdict == "not distinguishable":
            assert average(found).low <= 0 <= average(found).high
    assert average(difference(one, one)) == Difference(difference=0, interval=(0, 0))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered, truth = [], _truth()
    for seed in range(300):
        random = np.random.default_rng(seed)
        level = random.random(200)
        one, other = ({"a": level + 0.3 * random.random(200) < rate} for rate in (0.75, 0.65))
        found = average(difference(one, other))
        covered.append(found.low <= truth <= found.high)
    assert 0.9 <= fmean(covered) <= 0.99


def _truth() -> float:
    random = np.random.default_rng(12345)
    level = random.random(2_000_000)
    one, other = (level + 0.3 * random.random(len(level)) < rate for rate in (0.75, 0.65))
    return float(one.mean() - other.mean())


def test_the_same_seed_gives_the_same_interval() -> None:
    one, other = draw(0, a=(200, 0.8)), draw(1, a=(200, 0.8))
    assert difference(one, other) == difference(one, other)
    assert compare(
        "one", scores(one), "other", scores(other), {}, {"a": ACCURACY}, seed=1
    ) != difference(one, other)


def test_only_tasks_that_both_have_are_compared() -> None:
    one, other = draw(0, a=(50, 0.9), b=(50, 0.9)), draw(1, b=(50, 0.9))
    assert list(difference(one, other).tasks) == ["b"]


def test_without_an_individual_model_there_is_no_normalised_difference() -> None:
    one, other = draw(0, a=(50, 0.9)), draw(1, a=(50, 0.9))
    assert difference(one, other).normalized is None
    never = {"a": np.zeros(50, bool)}
    assert difference(one, other, never).normalized is None


def test_verdicts_and_sentences() -> None:
    ends = [(0.01, 0.1), (-0.1, -0.01), (-0.1, 0.1), (0.0, 0.1)]
    found = [Difference(difference=sum(e) / 2, interval=e) for e in ends]
    assert [verdict(d, True) for d in found] == [
        *("better", "worse", "not distinguishable", "not distinguishable")
    ]
    assert [verdict(d, False) for d in found] == [
        *("worse", "better", "not distinguishable", "not distinguishable")
    ]
    shown = report({"merged": model("merged", a=60)})
    texts = [
        comparison_sentence(
            shown,
            Comparison(
                of="merged",
                beside="pretrained",
                tasks={"a": {"accuracy": one}},
                metrics={"accuracy": one},
                verdict=verdict(one, True),
            ),
        )
        for one in found
    ]
    assert texts[0] == (
        "merged is better than pretrained on this test set: +5.5 points of accuracy "
        "(95 % interval +1.0 to +10.0)."
    )
    assert texts[1].startswith("merged is worse than pretrained on this test set: -5.5")
    assert texts[2].startswith("merged and pretrained are not distinguishable on this test set")
    assert all(one != other for one, other in pairwise(texts))
