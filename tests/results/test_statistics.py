"""Each figure beside a plain bootstrap, one resample after the other, in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from fusion_bench.results import ACCURACY, LOSS, METRICS, Metric, SampleScores, stderr, with_ones
from fusion_bench.results import statistics as ours
from fusion_bench.results.statistics import differences, interval, resampled

PERPLEXITY, RMSE = METRICS["perplexity"], METRICS["rmse"]
#: Enough for a comparison resample by resample.
FEW = 60


# -- metrics as a textbook has them, of the rows of the drawn samples


def _ratio(rows: np.ndarray) -> float:
    below = math.fsum(rows[:, 1])
    return math.fsum(rows[:, 0]) / below if below else math.nan


def _f1(rows: np.ndarray) -> float:
    tp, fp, fn, _ = (math.fsum(column) for column in rows.T)
    if not tp:
        return 0.0
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def _matthews(rows: np.ndarray) -> float:
    tp, fp, fn, tn = (int(math.fsum(column)) for column in rows.T)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def _mean_iou(rows: np.ndarray) -> float:
    classes = rows.shape[1] // 2
    sums = [math.fsum(column) for column in rows.T]
    pairs = zip(sums[:classes], sums[classes:], strict=True)
    found = [above / below for above, below in pairs if below]
    return sum(found) / len(found) if found else math.nan


def _pearson(rows: np.ndarray) -> float:
    if len(rows) < 2:
        return math.nan
    x, y = rows[:, 1], rows[:, 2]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


PLAIN: dict[str, Callable[[np.ndarray], float]] = {
    "loss": _ratio,
    "accuracy": _ratio,
    "pixel_accuracy": _ratio,
    "perplexity": lambda rows: math.exp(_ratio(rows)),
    "rmse": lambda rows: math.sqrt(_ratio(rows)),
    "f1": _f1,
    "matthews": _matthews,
    "mean_iou": _mean_iou,
    "pearson": _pearson,
}


def drawn(name: str, size: int, random: np.random.Generator) -> np.ndarray:
    """Return the rows of a model's samples."""
    if name == "accuracy":
        return with_ones(random.integers(0, 2, size))
    if name == "pixel_accuracy":
        return np.stack([random.integers(0, 9, size), np.full(size, 9.0)], axis=1)
    if name in ("perplexity", "rmse"):
        return np.stack([random.gamma(2, 2, size), random.integers(1, 9, size)], axis=1)
    if name in ("f1", "matthews"):
        return np.eye(4)[random.integers(0, 4, size)]
    if name == "mean_iou":
        union = random.integers(0, 50, (size, 3)) * random.integers(0, 2, (size, 3))
        return np.concatenate([random.integers(0, union + 1), union], axis=1).astype(np.float64)
    if name == "pearson":
        x, y = random.normal(3, 1, (2, size))
        return np.stack([np.ones(size), x, x + y, x * x, (x + y) ** 2, x * (x + y)], axis=1)
    return with_ones(random.gamma(2, 0.5, size))


def scores(metric: Metric, rows: np.ndarray, clusters: np.ndarray | None = None) -> SampleScores:
    return SampleScores(np.arange(len(rows)), {metric.name: rows}, clusters=clusters)


def resamples(size: int, seed: int, count: int) -> list[np.ndarray]:
    """Return how often each sample is in each resample, drawn as the code draws them."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        bits = random.integers(0, 2**64, (size + 1) // 2, dtype=np.uint64).view(np.uint32)[:size]
        places = (bits.astype(object) * size) // 2**32
        found.append(np.bincount(places.astype(np.int64), minlength=size))
    return found


def by_hand(
    name: str, models: list[np.ndarray], seed: int, count: int, repeated: bool
) -> np.ndarray:
    """Return each model's values: of the samples, then of each resample."""
    size = len(models[0])
    if repeated:  # each kind of sample, and how often it is drawn
        both, times = np.unique(np.concatenate(models, axis=1), axis=0, return_counts=True)
        models = np.split(both, len(models), axis=1)
        chance = times / size
        counts = [times, *np.random.default_rng(seed).multinomial(size, chance, count)]
    else:
        counts = [np.ones(size, dtype=int), *resamples(size, seed, count)]
    return np.array([[PLAIN[name](np.repeat(rows, c, axis=0)) for c in counts] for rows in models])


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare values: the same are missing, and the others differ by a small part of the spread."""
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    there = np.isfinite(expected)
    if there.any():
        allowed = 1e-5 * np.std(expected[there]) + 1e-9 * np.abs(expected[there]).max() + 1e-9
        assert np.abs(found[there] - expected[there]).max() <= allowed


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Take few resamples where each is compared; tests of intervals take all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "RESAMPLES", FEW)
        yield


@pytest.fixture
def all_resamples(monkeypatch):
    monkeypatch.setattr(ours, "RESAMPLES", 10_000)


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_each_resample(name, size, kinds, repeated, seed):
    random = np.random.default_rng(seed)
    metric = METRICS[name]
    if repeated:
        size = 8 * 2 * kinds + size
    models = [drawn(name, kinds if repeated else size, random) for _ in range(2)]
    if repeated:
        which = random.integers(0, kinds, size)
        models = [rows[which] for rows in models]
    kinds = len(np.unique(np.concatenate(models, axis=1), axis=0))
    expected = by_hand(name, models, seed, FEW, repeated=kinds * ours._REPEATED <= size)
    found = resampled(metric, [scores(metric, r) for r in models], np.random.default_rng(seed))
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    if name != "accuracy":  # whose differences have a way of their own
        given = [scores(metric, rows) for rows in models]
        parts = differences(metric, *given, None, np.random.default_rng(seed))
        close(parts.plain, expected[0] - expected[1])
        assert parts.normalized is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_differences_of_proportions(size, seed, reference):
    """The observed difference is exact, and each resample is one that can be drawn."""
    random = np.random.default_rng(seed)
    models = [random.integers(0, 2, size) for _ in range(3)]
    given = [scores(ACCURACY, with_ones(right)) for right in models]
    own = given[2] if reference and models[2].any() else None
    parts = differences(ACCURACY, given[0], given[1], own, random)
    change = models[0] - models[1]
    assert parts.plain[0] == change.sum() / size
    assert np.isin(np.round(parts.plain * size, 9), np.arange(-size, size + 1)).all()
    if own is not None:
        assert parts.normalized[0] == pytest.approx(change.sum() / models[2].sum())
        assert len(parts.normalized) == FEW + 1


class TestIntervals:
    """Beside those of scipy."""

    @pytest.mark.parametrize("metric", [RMSE, PERPLEXITY], ids=lambda metric: metric.name)
    def test_a_pair(self, metric, all_resamples):
        random = np.random.default_rng(1)
        counts = random.integers(1, 9, 150)
        shared = random.gamma(2, 1, 150)
        models = [(shared + random.gamma(1, 1, 150)) * counts for _ in range(2)]
        value = np.sqrt if metric is RMSE else np.exp

        def statistic(one, other, number, axis):
            below = number.sum(axis=axis)
            return value(one.sum(axis=axis) / below) - value(other.sum(axis=axis) / below)

        expected = bootstrap(
            (*models, counts), statistic, paired=True, method="percentile", rng=random
        ).confidence_interval
        given = [scores(metric, np.stack([above, counts], axis=1)) for above in models]
        found = interval(differences(metric, *given, None, random).plain)
        assert found.low < found.estimate < found.high
        allowed = (expected.high - expected.low) / 20
        assert found.low == pytest.approx(expected.low, abs=allowed)
        assert found.high == pytest.approx(expected.high, abs=allowed)

    @pytest.mark.parametrize("name", ["spearman", "auc"])
    def test_recomputed(self, name):
        random = np.random.default_rng(2)
        labels = random.integers(0, 2, 60) if name == "auc" else random.normal(size=60)
        models = [labels + random.normal(size=60) for _ in range(2)]

        def auc(labels, own):
            right, wrong = own[labels == 1][:, None], own[labels == 0]
            return ((right > wrong) + (right == wrong) / 2).mean()

        def spearman(labels, own):
            return np.corrcoef(rankdata(labels), rankdata(own))[0, 1]

        def statistic(which, value=auc if name == "auc" else spearman):
            which = which.astype(int)
            one, other = (value(labels[which], own[which]) for own in models)
            return one - other

        def theirs(labels, own):  # which takes longer
            return roc_auc_score(labels, own) if name == "auc" else spearmanr(labels, own).statistic

        expected = bootstrap(
            (np.arange(60),),
            statistic,
            vectorized=False,
            n_resamples=500,
            method="percentile",
            rng=random,
        )
        given = [
            SampleScores(np.arange(60), {}, {"labels": labels, "predictions": own})
            for own in models
        ]
        drawn = differences(METRICS[name], *given, None, random).plain
        assert len(drawn) == ours.RECOMPUTED + 1
        found = interval(drawn)
        low, high = expected.confidence_interval
        allowed = (high - low) / 6  # of 500 and of 1,000 resamples
        assert found.estimate == pytest.approx(statistic(np.arange(60)))
        assert found.estimate == pytest.approx(statistic(np.arange(60), theirs))
        assert found.low == pytest.approx(low, abs=allowed)
        assert found.high == pytest.approx(high, abs=allowed)
        error = stderr(METRICS[name], given[0])
        assert error == pytest.approx(np.std(drawn_alone(METRICS[name], given[0])), rel=0.1)

    @pytest.mark.parametrize("apart", [1e-6, 1e-9])
    def test_models_that_are_nearly_the_same(self, apart):
        """Sums in float32 would be off by more than the models differ."""
        random = np.random.default_rng(3)
        counts = random.integers(1, 200, 2000)
        nats = random.gamma(2, 1.5, 2000) * counts
        other = nats * (1 + apart * random.normal(0.3, 1, 2000))
        rows = [np.stack([own, counts], axis=1) for own in (other, nats)]
        given = [scores(PERPLEXITY, own) for own in rows]
        found = differences(PERPLEXITY, *given, None, np.random.default_rng(0)).plain
        draws = np.stack([np.ones(2000), *resamples(2000, 0, FEW)])
        exact = np.exp((draws @ other) / (draws @ counts))
        exact -= np.exp((draws @ nats) / (draws @ counts))
        width = np.ptp(exact)
        assert width < 100 * apart
        assert np.abs(found - exact).max() < (1e-4 if apart > 1e-8 else 1e-3) * width

    def test_resamples_without_a_value_do_not_count(self):
        drawn = np.linspace(0, 1, 101)
        with_gaps = np.concatenate([[0.4], drawn, np.full(50, np.nan), [np.inf]])
        found = interval(with_gaps)
        assert found == interval(np.append(0.4, drawn))
        assert found == pytest.approx((0.4, 0.025, 0.975))
        none = interval(np.array([0.4, np.nan]))
        assert none.estimate == 0.4
        assert math.isnan(none.low)
        assert math.isnan(none.high)


def drawn_alone(metric: Metric, own: SampleScores) -> np.ndarray:
    return resampled(metric, [own], np.random.default_rng(9))[0, 1:]


class TestClusters:
    def test_documents_are_resampled(self):
        random = np.random.default_rng(4)
        documents = random.integers(0, 30, 200)
        rows = drawn("perplexity", 200, random)
        found = resampled(
            PERPLEXITY, [scores(PERPLEXITY, rows, documents)], np.random.default_rng(5)
        )[0]
        names = np.unique(documents)
        members = [np.flatnonzero(documents == name) for name in names]
        expected = [_perplexity(rows)]
        for counts in resamples(len(names), 5, FEW):
            chosen = np.concatenate(
                [np.tile(own, times) for own, times in zip(members, counts, strict=True)]
            )
            expected.append(_perplexity(rows[chosen.astype(int)]))
        close(found, np.array(expected))

    def test_recomputed_metrics(self):
        """Samples of one document are drawn together: with one document, all are the same."""
        random = np.random.default_rng(4)
        details = {"labels": random.normal(size=20), "predictions": random.normal(size=20)}
        one = SampleScores(np.arange(20), {}, details, np.zeros(20, dtype=np.int64))
        found = resampled(METRICS["spearman"], [one], random)[0]
        assert np.ptp(found) == 0
        assert found[0] == pytest.approx(spearmanr(*details.values()).statistic)

    @pytest.mark.parametrize("metric", [ACCURACY, PERPLEXITY], ids=lambda metric: metric.name)
    def test_they_widen_an_interval(self, metric, all_resamples):
        random = np.random.default_rng(6)
        names = np.repeat(np.arange(40), 10)
        rows = drawn(metric.name, 40, random)[names]
        other = drawn(metric.name, 40, random)[names]
        widths, errors = [], []
        for clusters in (None, names):
            given = [scores(metric, own, clusters) for own in (rows, other)]
            found = interval(differences(metric, *given, None, random).plain)
            widths.append(found.high - found.low)
            errors.append(stderr(metric, given[0]))
        # the root of 10, as if there were 40 samples
        assert widths[1] / widths[0] == pytest.approx(10**0.5, rel=0.15)
        assert errors[1] / errors[0] == pytest.approx(10**0.5, rel=0.1)

    @pytest.mark.parametrize("name", ["perplexity", "rmse", "f1", "mean_iou", "loss"])
    def test_one_sample_per_document(self, name):
        metric, random = METRICS[name], np.random.default_rng(7)
        rows = [drawn(name, 80, random) for _ in range(2)]
        plain, single = (
            differences(
                metric, *(scores(metric, r, own) for r in rows), None, np.random.default_rng(8)
            ).plain
            for own in (None, np.arange(80))
        )
        assert np.array_equal(plain, single)

    def test_accuracy_of_single_documents(self, all_resamples):
        """Counted and summed, which differ only by the draw."""
        random = np.random.default_rng(7)
        rows = [drawn("accuracy", 300, random) for _ in range(2)]
        intervals = []
        for clusters in (None, np.arange(300)):
            given = [scores(ACCURACY, own, clusters) for own in rows]
            intervals.append(interval(differences(ACCURACY, *given, None, random).plain))
        width = intervals[0].high - intervals[0].low
        assert intervals[1] == pytest.approx(intervals[0], abs=width / 20)


def _perplexity(rows: np.ndarray) -> float:
    return PLAIN["perplexity"](rows)


class TestStandardErrors:
    @pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 3), (7, 10), (333, 1000), (50, 50)])
    def test_a_proportion(self, right, n):
        share = right / n
        found = stderr(ACCURACY, scores(ACCURACY, with_ones(np.arange(n) < right)))
        assert found == math.sqrt(share * (1 - share) / n)

    def test_a_mean(self):
        values = np.random.default_rng(1).normal(size=50)
        found = stderr(LOSS, scores(LOSS, with_ones(values)))
        assert found == pytest.approx(np.std(values) / math.sqrt(50), rel=1e-10)

    @pytest.mark.parametrize(
        "name", ["loss", "perplexity", "rmse", "f1", "matthews", "mean_iou", "pearson"]
    )
    def test_close_to_the_bootstrap(self, name, monkeypatch):
        monkeypatch.setattr(ours, "RESAMPLES", 2000)
        metric = METRICS[name]
        own = scores(metric, drawn(name, 300, np.random.default_rng(2)))
        assert stderr(metric, own) == pytest.approx(drawn_alone(metric, own).std(), rel=0.1)

    def test_an_infinite_value_has_none(self):
        rows = np.array([[1e6, 1], [1, 1], [2, 1]])
        assert math.isnan(stderr(PERPLEXITY, scores(PERPLEXITY, rows)))

    def test_one_sample_has_none(self):
        assert math.isnan(stderr(LOSS, scores(LOSS, with_ones(np.array([0.3])))))


class TestDirections:
    def test_lower_is_better(self):
        """Plain differences keep their sign; normalised ones are greater for a better model."""
        random = np.random.default_rng(3)
        own = random.gamma(2, 1, 60)
        one, other, reference = (
            scores(RMSE, with_ones(own * factor)) for factor in (2.25, 4.0, 1.0)
        )
        parts = differences(RMSE, one, other, reference, random)
        plain, normal = interval(parts.plain), interval(parts.normalized)
        assert plain.high < 0  # less of an error
        assert normal.estimate == pytest.approx(1 / 1.5 - 1 / 2)
        # the same ratio in each resample, as far as all are resampled alike
        assert np.allclose(parts.normalized, 1 / 1.5 - 1 / 2)

    def test_higher_is_better(self):
        random = np.random.default_rng(3)
        rows = [drawn("f1", 60, random) for _ in range(3)]
        metric = METRICS["f1"]
        parts = differences(metric, *(scores(metric, r) for r in rows), np.random.default_rng(1))
        values = [PLAIN["f1"](own) for own in rows]
        assert parts.plain[0] == pytest.approx(values[0] - values[1])
        assert parts.normalized[0] == pytest.approx((values[0] - values[1]) / values[2])

    def test_what_cannot_be_divided(self):
        own = scores(PERPLEXITY, drawn("perplexity", 20, np.random.default_rng(1)))
        assert differences(PERPLEXITY, own, own, own, np.random.default_rng(1)).normalized is None

    @pytest.mark.parametrize("name", PLAIN)
    def test_a_model_and_itself(self, name):
        own = scores(METRICS[name], drawn(name, 50, np.random.default_rng(1)))
        found = interval(differences(METRICS[name], own, own, None, np.random.default_rng(1)).plain)
        assert found == (0, 0, 0)


class TestRareSamples:
    """Totals that are 0 in a resample are exactly 0, or ratios of rounding errors would count."""

    @pytest.mark.parametrize("name", ["f1", "matthews"])
    def test_rare_positives(self, name):
        random = np.random.default_rng(1)
        kind = np.where(random.random(300) < 0.01, 0, 3)
        rows = np.eye(4)[kind]
        found = resampled(METRICS[name], [scores(METRICS[name], rows)], random)[0]
        assert np.isin(found, (0, 1)).all()

    def test_a_rare_class(self):
        random = np.random.default_rng(1)
        union = random.integers(50, 60, (100, 3)) * 1000.0
        union[2:, 2] = 0
        rows = np.concatenate([union * [0.5, 0.5, 1], union], axis=1)
        metric = METRICS["mean_iou"]
        found = resampled(metric, [scores(metric, rows)], np.random.default_rng(1))[0]
        there = np.array([True, *(counts[:2].any() for counts in resamples(100, 1, FEW))])
        assert 0 < there.sum() < FEW
        assert found == pytest.approx(np.where(there, 2 / 3, 1 / 2))

    def test_rare_errors(self):
        rows = with_ones(np.array([*np.zeros(99), 0.3]))
        found = resampled(RMSE, [scores(RMSE, rows)], np.random.default_rng(1))[0]
        assert np.isfinite(found).all()


def test_the_seed_decides():
    rows = [drawn("rmse", 50, np.random.default_rng(i)) for i in range(2)]
    given = [scores(RMSE, own) for own in rows]
    one, same, other = (
        differences(RMSE, *given, None, np.random.default_rng(seed)).plain for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_many_draws_are_like_one(monkeypatch):
    """Counts are drawn in pieces that fit the memory."""
    given = [scores(RMSE, drawn("rmse", 50, np.random.default_rng(1)))]
    whole = resampled(RMSE, given, np.random.default_rng(1))
    monkeypatch.setattr(ours, "_CHUNK", 7 * 4 * 50)
    assert np.allclose(resampled(RMSE, given, np.random.default_rng(1)), whole, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_each_place_is_drawn_as_often(size: int) -> None:
    counts = ours._counts(size, 400, np.random.default_rng(0), np.float64)
    assert (counts.sum(axis=1) == size).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(size), abs=0.3)
    assert counts.var() == pytest.approx(1 - 1 / size, rel=0.05)


@pytest.mark.parametrize("largest", [2**24 // 100, 2**24 // 100 + 1, 2**40])
def test_sums_of_whole_numbers_are_exact(largest: int) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, largest, (1, 100, 3), endpoint=True).astype(np.float64)
    rows[0, 0] = largest
    sums = ours._sums(rows, np.random.default_rng(1))
    counts = np.stack(resamples(100, 1, ours.RESAMPLES))
    assert (sums[0] == counts.astype(np.int64) @ rows[0].astype(np.int64)).all()
