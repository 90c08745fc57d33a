"""Comparisons of models that were evaluated on the same samples."""

from collections.abc import Mapping

import numpy as np

from fusion_bench.report.schema import Comparison, Contender, Difference, Report, Verdict
from fusion_bench.report.scores import Scores
from fusion_bench.results import Metric, SampleScores
from fusion_bench.results.statistics import differences, interval

#: A contender's scores by task.
ByTask = Mapping[str, SampleScores]


def compare(
    of: str,
    one: ByTask,
    beside: str,
    other: ByTask,
    references: ByTask,
    metrics: Mapping[str, Metric],
    seed: int = 0,
) -> Comparison:
    """Return the difference between ``one`` and ``other`` on their common tasks.

    Tasks are resampled independently and have equal weight in the average. The normalised
    difference divides by the values of the tasks' own models on the same resample. It is empty if a
    task has no such model, or one with the value 0. Tasks with different metrics have no other
    average.

    Args:
        of: the first model's name.
        one: its scores.
        beside: the second model's name.
        other: its scores, on the same samples.
        references: those of each task's own model.
        metrics: each task's main metric.
        seed: of the resamples; the same for the same result.
    """
    tasks = [task for task in one if task in other]
    normal = all(
        task in references and metrics[task].normalise and references[task].value(metrics[task]) > 0
        for task in tasks
    )
    random = np.random.default_rng(seed)
    found = {
        task: differences(
            metrics[task], one[task], other[task], references[task] if normal else None, random
        )
        for task in tasks
    }
    plain = {task: Difference.of(interval(parts.plain)) for task, parts in found.items()}
    mains = {(metrics[task].name, metrics[task].unit): metrics[task] for task in tasks}
    average = None
    if len(mains) == 1:
        average = Difference.of(
            interval(np.mean([parts.plain for parts in found.values()], axis=0))
        )
    shares = [parts.normalized for parts in found.values() if parts.normalized is not None]
    normalized = None
    if len(shares) == len(found):
        normalized = Difference.of(interval(np.mean(shares, axis=0)))
    main = metrics[tasks[0]]
    return Comparison(
        of=of,
        beside=beside,
        tasks={task: {metrics[task].name: difference} for task, difference in plain.items()},
        metrics={} if average is None else {main.name: average},
        normalized=normalized,
        verdict=_verdict(average, normalized, main.higher_is_better),
    )


def compare_contenders(report: Report, scores: Scores) -> list[Comparison]:
    """Compare each merged contender with all earlier ones in the report that have scores."""
    contenders = [(c, contender_scores(c, scores)) for c in report.contenders()]
    references = own_scores(report, scores)
    metrics = {task: scores.main(task) for task in scores.tasks}
    return [
        compare(one.name, mine, other.name, theirs, references, metrics)
        for place, (one, mine) in enumerate(contenders)
        if one.role == "merged"
        for other, theirs in contenders[:place]
        if mine.keys() & theirs.keys()
    ]


def contender_scores(contender: Contender, scores: Scores) -> dict[str, SampleScores]:
    """Return a contender's scores by task, as far as there are any."""
    return {
        task: scores.tasks[task][model]
        for task, model in contender.models.items()
        if task in scores.tasks
    }


def own_scores(report: Report, scores: Scores) -> dict[str, SampleScores]:
    """Return the scores of each task's own model."""
    return {
        task: scores.tasks[task][name]
        for task, name in report.own_models().items()
        if task in scores.tasks
    }


def _verdict(
    average: Difference | None, normalized: Difference | None, higher_is_better: bool
) -> Verdict | None:
    """Return the verdict by the average, or else by the normalised one."""
    if average is not None:
        return verdict(average, higher_is_better)
    return None if normalized is None else verdict(normalized, True)


def verdict(difference: Difference, higher_is_better: bool) -> Verdict | None:
    """Return the verdict of an interval: above 0, below 0, or around 0; none without numbers."""
    if not np.isfinite([difference.difference, *difference.interval]).all():
        return None
    if not (difference.low > 0 or difference.high < 0):
        return "not distinguishable"
    return "better" if (difference.low > 0) == higher_is_better else "worse"
