"""A metric of your own: balanced accuracy, the mean of the accuracies on each class.

fusion_bench --allow own_metric '+taskpool.metrics=[own_metric.balanced_accuracy,accuracy,loss]'
"""

import numpy as np

from fusion_bench.results import Metric
from fusion_bench.results.metrics import ratio


def measure(details):
    """Return a row per sample: for each class, whether it is right, then whether it is there."""
    labels = details["labels"]
    there = np.eye(labels.max() + 1)[labels]
    right = there * (details["predictions"] == labels)[:, np.newaxis]
    return np.concatenate([right, there], axis=1)


def value(totals):
    """Return the mean of the ratios, for sums of such rows: many at once, on the last axis."""
    right, there = np.split(totals, 2, axis=-1)
    return np.nanmean(ratio(right, there), axis=-1)


def balanced_accuracy():
    """Return the metric."""
    return Metric("balanced_accuracy", "%", higher_is_better=True, value=value, measure=measure)
