r"""Paired bootstrap intervals for models that were evaluated on the same samples.

The samples of a task are resampled with replacement: the paired bootstrap (Efron and Tibshirani, An
introduction to the bootstrap, 1993). Only the counts of each pattern of correct and wrong
predictions matter, so a resample is one draw from a multinomial distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.answers import Answers
from fusion_bench.report.schema import Comparison, Contender, Difference, Report, Verdict

#: Which samples were answered rightly, by task; the samples of a task are those of the other model.
Right = Mapping[str, NDArray[np.bool_]]

CONFIDENCE = 0.95
#: With so many resamples the ends of an interval move by a twentieth of its width at most.
RESAMPLES = 10_000


def compare(
    model: str, one: Right, other_name: str, other: Right, individual: Right, seed: int = 0
) -> Comparison:
    """Return the difference in accuracy between ``one`` and ``other`` on their common tasks.

    Tasks are resampled independently and have equal weight in the average. The normalised
    difference divides by the individual models' accuracies on the same resample. It is empty if a
    task has no individual model, or one with accuracy 0.

    Args:
        model: the first model's name.
        one: its answers.
        other_name: the second model's name.
        other: its answers, on the same samples.
        individual: those of each task's own model.
        seed: of the resamples; the same for the same result.
    """
    tasks = [task for task in one if task in other]
    normal = all(task in individual and individual[task].any() for task in tasks)
    random = np.random.default_rng(seed)
    found: dict[str, _Resampled] = {}
    for task in tasks:
        patterns = [one[task], other[task], *([individual[task]] if normal else [])]
        found[task] = _resample(patterns, random)
    differences = {task: parts.accuracy for task, parts in found.items()}
    average = _mean([parts.plain for parts in found.values()])
    normalized = _mean([parts.normalized for parts in found.values()]) if normal else None
    return Comparison(
        model=model,
        other=other_name,
        tasks=differences,
        accuracy=average,
        normalized_accuracy=normalized,
        verdict=verdict(average),
    )


def compare_contenders(report: Report, answers: Answers) -> list[Comparison]:
    """Compare each merged contender with all earlier ones in the report that have predictions."""
    contenders = [(c, right(c, answers)) for c in report.contenders()]
    individual = individual_answers(report, answers)
    return [
        compare(one.name, mine, other.name, theirs, individual)
        for place, (one, mine) in enumerate(contenders)
        if one.role == "merged"
        for other, theirs in contenders[:place]
        if mine.keys() & theirs.keys()
    ]


def right(contender: Contender, answers: Answers) -> Right:
    """Return which samples a contender classified correctly, by task."""
    there = {task: model for task, model in contender.models.items() if task in answers.tasks}
    return {task: answers.tasks[task].right(model) for task, model in there.items()}


def individual_answers(report: Report, answers: Answers) -> Right:
    """Return which samples each task's own model classified correctly."""
    own = {t: name for t, name in report.own_models().items() if t in answers.tasks}
    return {task: answers.tasks[task].right(name) for task, name in own.items()}


def verdict(difference: Difference) -> Verdict:
    """Return the verdict of an interval: above 0, below 0, or around 0."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not distinguishable"


@dataclass(frozen=True)
class _Resampled:
    """Differences on one task: the observed one first, then that of each resample."""

    plain: NDArray[np.float64]
    normalized: NDArray[np.float64]

    @property
    def accuracy(self) -> Difference:
        return _interval(self.plain)


def _resample(patterns: Sequence[NDArray[np.bool_]], random: np.random.Generator) -> _Resampled:
    """Return the differences between the first two of two or three models."""
    size = len(patterns[0])
    change = patterns[0].astype(np.int64) - patterns[1]  # which of two is right, or neither, alone
    others = [p.astype(np.int64) for p in patterns[2:]]
    kinds = change + 1 + 3 * sum(others)
    observed = np.bincount(np.asarray(kinds), minlength=3 * 2 ** len(others))
    drawn = random.multinomial(size, observed / size, RESAMPLES)
    counts = np.vstack([observed, drawn]).astype(np.float64)
    plain = (counts[:, 2::3] - counts[:, 0::3]).sum(axis=1)
    # A resample in which the individual model is never right says nothing of a ratio.
    ratio = plain / np.maximum(counts[:, 3:].sum(axis=1), 1) if others else plain
    return _Resampled(plain / size, ratio)


def _mean(parts: Sequence[NDArray[np.float64]]) -> Difference:
    return _interval(np.mean(parts, axis=0))


def _interval(values: NDArray[np.float64]) -> Difference:
    """Return the observed difference, which comes first, and the interval of the resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    return Difference(estimate=float(values[0]), low=float(low), high=float(high))
