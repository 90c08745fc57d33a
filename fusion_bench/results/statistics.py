r"""Standard errors, and paired bootstrap intervals of models evaluated on the same samples.

The samples of a task are resampled with replacement, the same ones for all compared models: the
paired bootstrap (Efron and Tibshirani, An introduction to the bootstrap, 1993). A metric is a
function of sums over samples, so a resample is a row of counts, and all sums are one product of
matrices. Samples with equal scores are counted together, and one draw from a multinomial
distribution tells how often each kind of sample occurs. Where several samples come from one
document, documents are resampled (the cluster bootstrap).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion_bench.results.metrics import Metric, Numbers, mean, normalized
from fusion_bench.results.scores import SampleScores

CONFIDENCE = 0.95
#: With so many resamples the ends of an interval move by a twentieth of its width at most.
RESAMPLES = 10_000
#: Where each resample computes the metric anew: the ends move by about a tenth of the width.
RECOMPUTED = 1_000
#: So many times fewer kinds of samples than samples make the multinomial draw the faster one.
_REPEATED = 8
#: Up to here float32 holds every whole number.
_EXACT = 2**24
#: Bytes of counts that are drawn at once.
_CHUNK = 32_000_000


class Interval(NamedTuple):
    """An observed value, and the ends of its interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Differences:
    """Differences of two models on one task: the observed one first, then each resample's.

    ``normalized`` is empty where there is no reference.
    """

    plain: Numbers
    normalized: Numbers | None


def stderr(metric: Metric, scores: SampleScores) -> float:
    """Return the standard error of a value: the jackknife's, or that of a binomial proportion.

    ``nan`` where there is none, such as for one sample alone, or for an infinite value.
    """
    scores = clustered(metric, scores)
    n = scores.num_samples
    if is_proportion(metric, scores):
        share = scores.value(metric)
        return float(np.sqrt(share * (1 - share) / n))
    if metric.value is None:
        drawn = _recomputed(metric, [scores], np.random.default_rng(0))[0, 1:]
        return float(np.nanstd(drawn)) if np.isfinite(drawn).any() else float("nan")
    rows = scores.statistics[metric.name]
    without = metric.value(rows.sum(axis=0) - rows) if n > 1 else np.full(1, np.nan)
    without = without[np.isfinite(without)]
    if not without.size or not np.isfinite(scores.value(metric)):
        return float("nan")
    spread = np.square(without - without.mean()).mean() * n
    return float((n - 1) / n * np.sqrt(spread))


def differences(
    metric: Metric,
    one: SampleScores,
    other: SampleScores,
    reference: SampleScores | None,
    random: np.random.Generator,
) -> Differences:
    """Return one model's value minus another's, for the samples and for each resample of them.

    Args:
        metric: what is compared.
        one: the first model's scores.
        other: the second model's, on the same samples.
        reference: those of the model that values are normalised by, if there is one.
        random: draws the resamples.
    """
    models = [one, other, *([] if reference is None else [reference])]
    models = [clustered(metric, scores) for scores in models]
    if all(is_proportion(metric, scores) for scores in models):
        return _of_proportions([s.statistics[metric.name][:, 0] for s in models], random)
    values = resampled(metric, models, random)
    if reference is None or not metric.normalise:
        return Differences(values[0] - values[1], None)
    better = metric.higher_is_better
    first, second = (normalized(values[i], values[2], better) for i in (0, 1))
    return Differences(values[0] - values[1], first - second)


def interval(values: Numbers) -> Interval:
    """Return the observed value, which comes first, and the interval of the resamples.

    Resamples without a value do not count.
    """
    tail = (1 - CONFIDENCE) / 2
    drawn = values[1:]
    there = np.isfinite(drawn)
    if not there.any():
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn if there.all() else drawn[there], [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))


def resampled(
    metric: Metric, models: Sequence[SampleScores], random: np.random.Generator
) -> Numbers:
    """Return each model's values: a column for the samples, then one for each resample.

    The models have the same samples, and each resample is the same for all.
    """
    models = [clustered(metric, scores) for scores in models]
    if metric.value is None:
        return _recomputed(metric, models, random)
    rows = np.stack([scores.statistics[metric.name] for scores in models])
    drawn = _sums(rows, random)
    observed = [metric.value(scores.totals(metric)) for scores in models]
    return np.stack([np.append(o, metric.value(d)) for o, d in zip(observed, drawn, strict=True)])


def is_proportion(metric: Metric, scores: SampleScores) -> bool:
    """Return whether a metric's value is the share of samples that are right."""
    if metric.value is not mean or metric.name not in scores.statistics:
        return False
    rows = scores.statistics[metric.name]
    whole = rows.shape[1] == 2 and np.isin(rows[:, 0], (0, 1)).all() and (rows[:, 1] == 1).all()
    return bool(whole) and scores.clusters is None


def clustered(metric: Metric, scores: SampleScores) -> SampleScores:
    """Return scores with a row per document, the sum of its samples' rows."""
    if scores.clusters is None or metric.value is None:
        return scores
    documents, places = np.unique(scores.clusters, return_inverse=True)
    rows = scores.statistics[metric.name]
    sums = np.zeros((len(documents), rows.shape[1]))
    np.add.at(sums, places, rows)
    return SampleScores(documents, {metric.name: sums})


def _of_proportions(rows: Sequence[Numbers], random: np.random.Generator) -> Differences:
    """Return the differences of two of two or three models with right and wrong samples."""
    size = len(rows[0])
    one, two, *others = (own.astype(np.int64) for own in rows)
    change = one - two  # which of two is right, or neither, alone
    kinds = change + 1 + 3 * sum(others)
    observed = np.bincount(np.asarray(kinds), minlength=3 * 2 ** len(others))
    drawn = random.multinomial(size, observed / size, RESAMPLES)
    counts = np.vstack([observed, drawn]).astype(np.float64)
    plain = (counts[:, 2::3] - counts[:, 0::3]).sum(axis=1)
    if not others:
        return Differences(plain / size, None)
    # A resample in which the reference is never right says nothing of a ratio.
    return Differences(plain / size, plain / np.maximum(counts[:, 3:].sum(axis=1), 1))


def _sums(rows: Numbers, random: np.random.Generator) -> Numbers:
    """Return the sums of resampled rows: models × samples × m to models × resamples × m.

    Sums of whole numbers are exact. Where all drawn entries are 0, so is the sum: a metric tells
    from it that there is no such class. Models with the same rows have the same sums.
    """
    models, size, width = rows.shape
    table = np.moveaxis(rows, 0, 1).reshape(size, models * width)
    kinds, times = np.unique(table, axis=0, return_counts=True)
    repeated = len(kinds) * _REPEATED <= size
    if repeated:
        rows = np.moveaxis(kinds.reshape(-1, models, width), 1, 0)
    # Whole numbers whose sums float32 holds are exact in it, at twice the speed.
    whole = size * np.abs(rows).max(initial=0) <= _EXACT and (rows == np.rint(rows)).all()
    dtype: type[np.floating] = np.float32 if whole else np.float64
    rows = np.ascontiguousarray(rows, dtype=dtype)
    sums = np.empty((models, RESAMPLES, width))
    step = max(1, _CHUNK // (8 * rows.shape[1]))
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        counts = (
            random.multinomial(size, times / size, count).astype(dtype)
            if repeated
            else _counts(size, count, random, dtype)
        )
        sums[:, start : start + count] = np.matmul(counts, rows)
    return sums


def _counts(
    size: int, resamples: int, random: np.random.Generator, dtype: type[np.floating]
) -> NDArray[np.floating]:
    """Draw how often each sample is in each resample.

    A random number of 32 bits times the size, of which the upper half is taken, is a place; each is
    as likely as any other but for ``size`` / 2³².
    """
    counts = np.empty((resamples, size), dtype=dtype)
    for row in counts:
        bits = random.integers(0, 2**64, (size + 1) // 2, dtype=np.uint64).view(np.uint32)[:size]
        places = (bits * np.uint64(size)) >> np.uint64(32)
        row[:] = np.bincount(places.view(np.int64), minlength=size)
    return counts


def _recomputed(
    metric: Metric, models: Sequence[SampleScores], random: np.random.Generator
) -> Numbers:
    """Return what ``resampled`` does, of a metric that each resample computes anew."""
    assert metric.recompute is not None
    first = models[0]
    size = first.num_samples
    clusters = np.arange(size) if first.clusters is None else first.clusters
    documents, places = np.unique(clusters, return_inverse=True)
    members = np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1])
    found = np.empty((len(models), RECOMPUTED + 1))
    for column in range(RECOMPUTED + 1):
        drawn = range(len(documents)) if column == 0 else _draw(len(documents), random)
        indices = np.arange(size) if column == 0 else np.concatenate([members[d] for d in drawn])
        found[:, column] = [metric.recompute(scores.details, indices) for scores in models]
    return found


def _draw(size: int, random: np.random.Generator) -> Sequence[int]:
    return [int(place) for place in random.integers(0, size, size)]
