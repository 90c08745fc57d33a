"""Samples on which a merged model does worse, or better, than the task's own model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.losses import best_merged, task_losses
from fusion_bench.report.schema import Contender, Report
from fusion_bench.report.scores import Scores
from fusion_bench.results import Example, Metric, SampleScores

#: How many samples of a task are shown in each direction.
_SHOWN = 10


@dataclass(frozen=True)
class Change:
    """A sample, and what both models made of it.

    Attributes:
        sample: its number in the dataset.
        example: the sample.
        own: the answer of the task's own model.
        merged: that of the merged model.
        own_value: the main metric of the own model on this sample alone.
        merged_value: likewise.
    """

    sample: int
    example: Example
    own: str
    merged: str
    own_value: float
    merged_value: float


@dataclass(frozen=True)
class TaskChanges:
    """The samples of a task that changed.

    Attributes:
        task: its name.
        num_worse: on how many samples the merged model is worse.
        num_better: on how many it is better.
        worse: some of these, the most changed first.
        better: likewise.
    """

    task: str
    num_worse: int
    num_better: int
    worse: list[Change]
    better: list[Change]


def changed_samples(report: Report, scores: Scores) -> dict[str, list[int]]:
    """Return the numbers of the samples that a page would show, by task."""
    found = {}
    for task, (own, merged) in _compared(report, scores).items():
        rows = np.concatenate([rows[:_SHOWN] for rows in _rows(scores.main(task), own, merged)])
        found[task] = merged.samples[rows].tolist()
    return found


def task_changes(report: Report, scores: Scores) -> list[TaskChanges]:
    """Return what changed on the tasks whose samples are known as texts; the worst task first."""
    found = []
    for task, (own, merged) in _compared(report, scores).items():
        examples = scores.examples.get(task)
        if not examples:
            continue
        metric = scores.main(task)
        worse, better = _rows(metric, own, merged)
        values = _values(metric, own), _values(metric, merged)

        def change(
            row: int,
            examples: Mapping[int, Example] = examples,
            own: SampleScores = own,
            merged: SampleScores = merged,
            values: tuple[NDArray[np.float64], NDArray[np.float64]] = values,
        ) -> Change:
            sample = int(merged.samples[row])
            example = examples[sample]
            return Change(
                sample,
                example,
                example.answer(own, row),
                example.answer(merged, row),
                float(values[0][row]),
                float(values[1][row]),
            )

        shown = ([change(row) for row in rows[:_SHOWN].tolist()] for rows in (worse, better))
        found.append(TaskChanges(task, len(worse), len(better), *shown))
    return found


def _compared(report: Report, scores: Scores) -> dict[str, tuple[SampleScores, SampleScores]]:
    """Return the scores of the own and of the merged model, of tasks that have both."""
    merged: Contender | None = best_merged(report)
    if merged is None:
        return {}
    own = report.own_models()
    found = {}
    for loss in task_losses(report, merged):
        models = scores.tasks.get(loss.task, {})
        pair = own[loss.task], merged.models[loss.task]
        metric = next(iter(scores.metrics.get(loss.task, ())), None)
        if set(pair) <= set(models) and metric is not None and metric.value is not None:
            found[loss.task] = models[pair[0]], models[pair[1]]
    return found


def _values(metric: Metric, scores: SampleScores) -> NDArray[np.float64]:
    assert metric.value is not None
    return metric.value(scores.statistics[metric.name])


def _rows(
    metric: Metric, own: SampleScores, merged: SampleScores
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows where the merged model is worse, and better; the most changed first."""
    gain = _values(metric, merged) - _values(metric, own)
    if not metric.higher_is_better:
        gain = -gain
    order = np.argsort(gain, kind="stable")
    back = order[::-1]
    return order[gain[order] < 0], back[gain[back] > 0]
