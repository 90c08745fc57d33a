"""Metrics: the figures that follow from the scores of single samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Details = Mapping[str, NDArray[np.generic]]
#: Of a difference of two nearly equal sums, this share of them may be rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Metric:
    """A figure of a model on a task: a function of sums over the samples.

    Attributes:
        name: as in configs and reports.
        unit: ``%`` for a fraction that is shown in percent; otherwise what follows the figure.
        higher_is_better: whether a greater value is a better one.
        normalise: whether 0 is a natural zero, so that a value may be divided by that of the model
            that was trained for the task.
        value: totals, float64 of shape ``(..., m)``, to values of shape ``(...)``; ``nan`` where
            there is none.
        recompute: for what is no function of sums, such as rank correlations: the samples' details
            and the indices of the counted samples, which may repeat, to the value.
        measure: details, such as ``labels`` and ``predictions``, to each sample's terms of the
            sums, of shape ``(samples, m)``; for a metric that a task does not measure itself.
        source: the name of a user's function that returns the metric.
    """

    name: str
    unit: str
    higher_is_better: bool
    normalise: bool = True
    value: Callable[[Numbers], Numbers] | None = None
    recompute: Callable[[Details, NDArray[np.int64]], float] | None = None
    measure: Callable[[Details], Numbers] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.recompute is None):
            raise ValueError(f"'{self.name}' needs either 'value' or 'recompute'")


def normalized(
    value: Numbers | float, reference: Numbers | float, higher_is_better: bool
) -> Numbers:
    """Return values as shares of a reference: 1 is as good as this, and greater is better.

    ``nan`` where there is none, such as for a reference of 0.
    """
    above, below = (value, reference) if higher_is_better else (reference, value)
    valid = (np.asarray(reference) > 0) & (np.asarray(below) > 0)
    return ratio(above, np.where(valid, below, 0.0))


def ratio(above: Numbers | float, below: Numbers | float) -> Numbers:
    """Divide; ``nan`` where the divisor is 0."""
    below = np.asarray(below, dtype=np.float64)
    return np.asarray(above) / np.where(below == 0, np.nan, below)


def mean(totals: Numbers) -> Numbers:
    """Return the first total divided by the second."""
    return ratio(totals[..., 0], totals[..., 1])


def _perplexity(totals: Numbers) -> Numbers:
    with np.errstate(over="ignore"):  # a model that knows nothing has an infinite perplexity
        return np.exp(mean(totals))


def _bits(totals: Numbers) -> Numbers:
    return mean(totals) / np.log(2)


def _root_mean(totals: Numbers) -> Numbers:
    return np.sqrt(mean(totals))


def _f1(totals: Numbers) -> Numbers:
    right, false_alarms, missed = (totals[..., i] for i in range(3))
    total = 2 * right + false_alarms + missed
    return np.where(total == 0, 0.0, ratio(2 * right, total))


def _matthews(totals: Numbers) -> Numbers:
    tp, fp, fn, tn = (totals[..., i] for i in range(4))
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(below == 0, 0.0, ratio(tp * tn - fp * fn, below))


def _mean_iou(totals: Numbers) -> Numbers:
    classes = totals.shape[-1] // 2
    ratios = ratio(totals[..., :classes], totals[..., classes:])
    there = np.isfinite(ratios)
    return ratio(np.where(there, ratios, 0.0).sum(axis=-1), there.sum(axis=-1))


def _pearson(totals: Numbers) -> Numbers:
    n, x, y, xx, yy, xy = (totals[..., i] for i in range(6))
    spread = [n * own - total * total for total, own in ((x, xx), (y, yy))]
    # what is left of constant values is rounding
    some = [
        np.where(s > _ROUNDING * n * own, s, 0) for s, own in zip(spread, (xx, yy), strict=True)
    ]
    return ratio(n * xy - x * y, np.sqrt(some[0]) * np.sqrt(some[1]))


def _spearman(details: Details, indices: NDArray[np.int64]) -> float:
    from scipy.stats import rankdata

    ranks = [rankdata(details[name][indices]) for name in ("predictions", "labels")]
    spread = [np.std(own) for own in ranks]
    if 0 in spread:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _auc(details: Details, indices: NDArray[np.int64]) -> float:
    from scipy.stats import rankdata

    positive = details["labels"][indices] == 1
    count, others = int(positive.sum()), int((~positive).sum())
    two = np.isin(details["labels"], (0, 1)).all()
    if not count or not others or not two:
        return float("nan")
    ranks = rankdata(details["predictions"][indices])
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


#: Statistics of a sample: whether it is right, and 1.
ACCURACY = Metric("accuracy", "%", True, value=mean)
#: The same of an answer that must be the expected text.
EXACT_MATCH = Metric("exact_match", "%", True, value=mean)
#: The same of the choice whose log-likelihood by byte is the greatest.
ACCURACY_PER_BYTE = Metric("accuracy_per_byte", "%", True, value=mean)
#: Cross entropy in nats, and 1.
LOSS = Metric("loss", "nats", False, value=mean)
#: Nats, and the number of tokens or words.
PERPLEXITY = Metric("perplexity", "", False, normalise=False, value=_perplexity)
#: Nats, and the number of bytes.
BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", False, value=_bits)
#: The sum of squared errors, and their number.
RMSE = Metric("rmse", "", False, value=_root_mean)
#: The sum of absolute errors divided by the true values, and their number.
ABSOLUTE_RELATIVE_ERROR = Metric("absolute_relative_error", "%", False, value=mean)
#: The sum of the angles between predicted and true directions, in degrees, and their number.
MEAN_ANGLE = Metric("mean_angle", "degrees", False, value=mean)
#: The number of directions that are off by less than 11.25 degrees, and of all.
WITHIN_11_25 = Metric("within_11.25", "%", True, value=mean)
#: True positives, false positives, false negatives. Without any of them it is 0.
F1 = Metric("f1", "%", True, value=_f1)
#: True positives, false positives, false negatives, true negatives (Matthews, 1975).
MATTHEWS = Metric("matthews", "", True, value=_matthews)
#: The number of right pixels, and of all.
PIXEL_ACCURACY = Metric("pixel_accuracy", "%", True, value=mean)
#: Each class's intersection in pixels, then each class's union. A class that is neither in the
#: truth nor predicted does not count.
MEAN_IOU = Metric("mean_iou", "%", True, value=_mean_iou)
#: 1, x, y, x², y² and xy.
PEARSON = Metric("pearson", "", True, value=_pearson)
#: Details: ``predictions`` and ``labels``.
SPEARMAN = Metric("spearman", "", True, recompute=_spearman)
#: The area under the ROC curve. Details: ``predictions``, greater for class 1, and ``labels``, 0 or
#: 1; ``nan`` for others.
AUC = Metric("auc", "%", True, recompute=_auc)

#: The metrics of this package, by name.
METRICS = {metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)}
