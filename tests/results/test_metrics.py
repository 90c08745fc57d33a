import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, jaccard_score, matthews_corrcoef, roc_auc_score

from fusion_bench.results import METRICS, Metric, normalized
from fusion_bench.results.metrics import mean, ratio


def value(name: str, *rows: list[float]) -> float:
    """Return a metric's value, of the statistics of samples."""
    return float(METRICS[name].value(np.array(rows, dtype=np.float64).sum(axis=0)))


def recomputed(name: str, predictions: list[float], labels: list[float]) -> float:
    metric = METRICS[name]
    details = {"predictions": np.array(predictions), "labels": np.array(labels)}
    return metric.recompute(details, np.arange(len(labels)))


BY_HAND = {
    "accuracy": ([[1, 1], [0, 1], [1, 1], [1, 1]], 3 / 4),
    "accuracy_per_byte": ([[1, 1], [0, 1], [0, 1], [0, 1]], 1 / 4),
    "exact_match": ([[1, 1], [0, 1]], 1 / 2),
    "loss": ([[0.5, 1], [1.5, 1]], 1.0),
    "perplexity": ([[np.log(8), 2], [np.log(2), 2]], 2.0),  # 16 to the power of 1/4
    "bits_per_byte": ([[3 * np.log(2), 2], [np.log(2), 2]], 1.0),
    "rmse": ([[9, 1], [16, 1], [11, 2]], 3.0),
    "absolute_relative_error": ([[0.1, 1], [0.3, 1]], 0.2),
    "mean_angle": ([[30, 2], [60, 4]], 15.0),
    "within_11.25": ([[1, 2], [2, 4]], 1 / 2),
    "f1": ([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2 / 3),
    # (2·2 − 1·1) / √(3·3·3·3)
    "matthews": (
        [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]],
        1 / 3,
    ),
    "pixel_accuracy": ([[6, 8], [2, 8]], 1 / 2),
    "mean_iou": ([[3, 0, 4, 1], [1, 1, 4, 1]], 1 / 2),  # 4/8 and 1/2
    "pearson": (
        [[1, x, y, x * x, y * y, x * y] for x, y in ((0, 0), (1, 0), (1, 1), (2, 1))],
        0.5**0.5,
    ),
}
RECOMPUTED = {
    "spearman": ([1.0, 2.0, 5.0, 9.0], [10.0, 30.0, 20.0, 40.0], 0.8),
    "auc": ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 3 / 4),
}
#: The direction, whether values may be divided, and the unit.
READ = {
    "accuracy": (True, True, "%"),
    "accuracy_per_byte": (True, True, "%"),
    "exact_match": (True, True, "%"),
    "loss": (False, True, "nats"),
    "perplexity": (False, False, ""),
    "bits_per_byte": (False, True, "bits per byte"),
    "rmse": (False, True, ""),
    "absolute_relative_error": (False, True, "%"),
    "mean_angle": (False, True, "degrees"),
    "within_11.25": (True, True, "%"),
    "f1": (True, True, "%"),
    "matthews": (True, True, ""),
    "pixel_accuracy": (True, True, "%"),
    "mean_iou": (True, True, "%"),
    "pearson": (True, True, ""),
    "spearman": (True, True, ""),
    "auc": (True, True, "%"),
}


@pytest.mark.parametrize("name", METRICS)
def test_values_by_hand(name):
    if name in RECOMPUTED:
        *arrays, expected = RECOMPUTED[name]
        assert recomputed(name, *arrays) == pytest.approx(expected, rel=1e-14)
    else:
        rows, expected = BY_HAND[name]
        assert value(name, *rows) == pytest.approx(expected, rel=1e-14)


def test_how_each_is_read():
    found = {n: (m.higher_is_better, m.normalise, m.unit) for n, m in METRICS.items()}
    assert found == READ


@pytest.mark.parametrize("name", BY_HAND)
def test_many_totals_at_once(name):
    rows = np.array(BY_HAND[name][0], dtype=np.float64)
    totals = rows.sum(axis=0)
    many = METRICS[name].value(np.broadcast_to(totals, (2, 3, len(totals))))
    assert many.shape == (2, 3)
    assert (many == METRICS[name].value(totals)).all()


@pytest.mark.parametrize("seed", range(5))
class TestAgainstOthers:
    """Independent programs, in float64."""

    def test_two_classes(self, seed):
        random = np.random.default_rng(seed)
        truth, found = random.integers(0, 2, (2, 200))
        found = np.where(random.random(200) < 0.5, truth, found)
        kinds = [(found == a) & (truth == b) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
        rows = np.stack(kinds, axis=1).astype(np.float64)
        assert value("f1", *rows) == pytest.approx(f1_score(truth, found), rel=1e-13)
        expected = matthews_corrcoef(truth, found)
        assert value("matthews", *rows) == pytest.approx(expected, rel=1e-12)

    def test_segmentation(self, seed):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 5, (6, 40))
        found = np.where(
            random.random(truth.shape) < 0.6, truth, random.integers(0, 5, truth.shape)
        )
        rows = [
            [((t == c) & (f == c)).sum() for c in range(5)]
            + [((t == c) | (f == c)).sum() for c in range(5)]
            for t, f in zip(truth, found, strict=True)
        ]
        expected = jaccard_score(truth.ravel(), found.ravel(), average="macro")
        assert value("mean_iou", *rows) == pytest.approx(expected, rel=1e-13)

    def test_correlations(self, seed):
        random = np.random.default_rng(seed)
        x = random.normal(size=150)
        y = x + random.normal(size=150)
        rows = np.stack([np.ones(150), x, y, x * x, y * y, x * y], axis=1)
        assert value("pearson", *rows) == pytest.approx(pearsonr(x, y).statistic, rel=1e-12)
        for decimals in (0, 5):  # with ties, and without
            ranked = x.round(decimals)
            expected = spearmanr(ranked, y).statistic
            assert recomputed("spearman", ranked, y) == pytest.approx(expected, rel=1e-12)

    def test_area_under_the_curve(self, seed):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 2, 150)
        for decimals in (0, 5):
            score = (truth + random.normal(size=150)).round(decimals)
            expected = roc_auc_score(truth, score)
            assert recomputed("auc", score, truth) == pytest.approx(expected, rel=1e-12)

    def test_means(self, seed):
        random = np.random.default_rng(seed)
        values, counts = random.random(100), random.integers(1, 9, 100)
        rows = np.stack([values, counts], axis=1)
        weighted = np.average(values / counts, weights=counts)
        expected = {
            "loss": weighted,
            "perplexity": np.exp(weighted),
            "bits_per_byte": weighted / np.log(2),
            "rmse": np.sqrt(weighted),
            "absolute_relative_error": weighted,
            "mean_angle": weighted,
        }
        for name, wanted in expected.items():
            assert value(name, *rows) == pytest.approx(wanted, rel=1e-13)


class TestEdges:
    def test_no_sample(self):
        for name in ("accuracy", "loss", "perplexity", "rmse"):
            assert np.isnan(value(name, [0, 0]))

    def test_no_positives(self):
        assert value("f1", [0, 0, 0, 1]) == f1_score([0], [0], zero_division=0) == 0
        assert value("matthews", [0, 0, 0, 5]) == 0

    def test_all_positive(self):
        assert value("f1", [5, 0, 0, 0]) == 1
        assert value("matthews", [5, 0, 0, 0]) == 0

    def test_large_counts_of_pixels(self):
        """The product of four counts is far from what an int64 holds."""
        counts = [4e9, 1e9, 2e9, 3e9]
        assert value("matthews", counts) == pytest.approx(value("matthews", [4, 1, 2, 3]))

    def test_absent_classes_do_not_count(self):
        assert value("mean_iou", [2, 0, 0, 4, 0, 3]) == 1 / 4  # the second class is nowhere
        assert np.isnan(value("mean_iou", [0, 0, 0, 0]))

    def test_one_sample(self):
        assert np.isnan(value("pearson", [1, 2, 3, 4, 9, 6]))
        assert np.isnan(recomputed("spearman", [1.0], [2.0]))
        assert np.isnan(recomputed("auc", [1.0], [1]))

    def test_constant_input(self):
        rows = [[1, 3, y, 9, y * y, 3 * y] for y in range(5)]
        assert np.isnan(value("pearson", *rows))
        assert np.isnan(recomputed("spearman", [3.0] * 5, [1.0, 2, 3, 4, 5]))
        assert recomputed("auc", [3.0] * 4, [0, 1, 0, 1]) == 1 / 2

    def test_one_class_alone(self):
        assert np.isnan(recomputed("auc", [0.1, 0.2], [1, 1]))
        assert np.isnan(recomputed("auc", [0.1, 0.2], [0, 0]))

    def test_infinite_perplexity(self):
        with np.errstate(all="raise"):
            assert value("perplexity", [1e6, 1]) == np.inf

    def test_some_samples_of_details(self):
        details = {"predictions": np.array([0.0, 9, 1, 5]), "labels": np.array([0.0, 1, 2, 3])}
        chosen = np.array([0, 2, 2, 3])
        predictions, labels = (details[name][chosen] for name in ("predictions", "labels"))
        expected = spearmanr(predictions, labels).statistic
        assert METRICS["spearman"].recompute(details, chosen) == pytest.approx(expected)


class TestNormalized:
    def test_higher_is_better(self):
        assert normalized(0.6, 0.8, True) == pytest.approx(0.75)

    def test_lower_is_better(self):
        assert normalized(2.0, 1.0, False) == 0.5
        assert normalized(0.5, 1.0, False) == 2.0

    def test_greater_is_better_in_both_directions(self):
        worse_and_better = np.array([1.0, 2.0])
        for higher in (True, False):
            one, two = normalized(worse_and_better, 1.5, higher)
            assert (one < two) == higher

    def test_no_reference(self):
        assert np.isnan(normalized(0.5, 0.0, True))
        assert np.isnan(normalized(0.5, -0.1, True))
        assert np.isnan(normalized(0.0, 0.5, False))
        assert np.isnan(normalized(0.5, 0.0, False))

    def test_arrays(self):
        found = normalized(np.array([0.2, 0.4]), np.array([0.4, 0.0]), True)
        assert found[0] == 0.5
        assert np.isnan(found[1])


def test_ratio():
    found = ratio(np.array([1.0, 0.0, 5.0]), np.array([4.0, 0.0, 0.0]))
    assert found[0] == 0.25
    assert np.isnan(found[1:]).all()
    assert ratio(1, 3) == 1 / 3


@pytest.mark.parametrize(
    "given", [{}, {"value": mean, "recompute": lambda details, indices: 0.0}], ids=["none", "both"]
)
def test_a_metric_has_one_way_to_its_value(given):
    with pytest.raises(ValueError, match="'mine' needs either 'value' or 'recompute'"):
        Metric("mine", "", True, **given)
