"""The losses of a merged model: tasks, classes and confusions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.schema import Contender, Difference, MetricInfo, Report
from fusion_bench.results import SampleScores


@dataclass(frozen=True)
class TaskLoss:
    """A task's value of its own model and of the merged model.

    Attributes:
        task: its name.
        metric: its main metric.
        own: the value of the task's own model.
        merged: that of the merged model.
        kept: the merged model's normalised value.
        interval: the interval of their difference, if they were compared.
    """

    task: str
    metric: MetricInfo
    own: float
    merged: float
    kept: float | None
    interval: Difference | None

    @property
    def change(self) -> float:
        """The merged model's value minus the own one's."""
        return self.merged - self.own

    @property
    def gain(self) -> float:
        """The same, greater for a better model: of shares where there are any."""
        if self.kept is not None:
            return self.kept - 1
        return self.change if self.metric.higher_is_better else -self.change


@dataclass(frozen=True)
class ClassLoss:
    """A class's number of samples, and the correct predictions of each model.

    ``individual`` is ``None`` where the task has no model of its own.
    """

    name: str
    samples: int
    individual: int | None
    merged: int

    @property
    def lost(self) -> int:
        """The number of lost correct predictions; without an individual model, of errors."""
        return (self.samples if self.individual is None else self.individual) - self.merged


@dataclass(frozen=True)
class Confusion:
    """The number of samples of the class ``truth`` predicted as ``answer``."""

    truth: str
    answer: str
    count: int
    samples: int


def best_merged(report: Report) -> Contender | None:
    """Return the merged model that pages show in detail: the best one on average."""
    evaluated = [c for c in report.contenders() if c.role == "merged" and c.models]
    return max(evaluated, key=lambda c: _merit(report, c), default=None)


def _merit(report: Report, contender: Contender) -> float:
    """Return a contender's average, greater for a better model."""
    average, common = report.average(contender), report.main_metric
    assert average is not None
    if common is None or average.main is None:
        return average.normalized or 0.0
    value = average.main.value
    return value if common.higher_is_better else -value


def task_losses(report: Report, merged: Contender) -> list[TaskLoss]:
    """Return the tasks with an own model, the greatest loss first."""
    found = []
    results = report.results(merged)
    for task, own in report.own_models().items():
        if task in merged.models:
            value = results[task].main
            found.append(
                TaskLoss(
                    task,
                    report.tasks[task].main_metric,
                    report.models[own].tasks[task].main.value,
                    value.value,
                    value.normalized,
                    _interval(report, merged, task, own),
                )
            )
    if all(loss.metric == found[0].metric for loss in found):
        return sorted(found, key=lambda loss: loss.change * (2 * loss.metric.higher_is_better - 1))
    return sorted(found, key=lambda loss: loss.gain)


def per_class_accuracy(scores: SampleScores, num_classes: int) -> list[float | None]:
    """Return each class's accuracy; ``None`` for one without samples."""
    labels, predictions = _whole(scores, "labels"), _whole(scores, "predictions")
    right = _counts(labels[predictions == labels], num_classes)
    there = _counts(labels, num_classes)
    return [int(r) / int(n) if n else None for r, n in zip(right, there, strict=True)]


def class_losses(
    names: Sequence[str], merged: SampleScores, own: SampleScores | None
) -> list[ClassLoss]:
    """Return the classes that lost correct predictions, the greatest loss first.

    Args:
        names: the classes, in the order of their labels.
        merged: the scores of the merged model.
        own: those of the task's own model, if there is one.
    """
    labels = _whole(merged, "labels")
    samples = _counts(labels, len(names))
    right, owns = (
        None
        if scores is None
        else _counts(labels[_whole(scores, "predictions") == labels], len(names))
        for scores in (merged, own)
    )
    assert right is not None
    losses = [
        ClassLoss(name, int(samples[i]), None if owns is None else int(owns[i]), int(right[i]))
        for i, name in enumerate(names)
    ]
    return sorted((loss for loss in losses if loss.lost > 0), key=lambda loss: -loss.lost)


def confusion_matrix(scores: SampleScores, num_classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix: true classes (rows), predicted classes (columns)."""
    pairs = _whole(scores, "labels") * num_classes + _whole(scores, "predictions")
    return _counts(pairs, num_classes**2).reshape(num_classes, num_classes)


def confusions(names: Sequence[str], matrix: NDArray[np.int64]) -> list[Confusion]:
    """Return the confusions, the most frequent first."""
    samples = matrix.sum(axis=1)
    found = [
        Confusion(names[truth], names[answer], int(matrix[truth, answer]), int(samples[truth]))
        for truth, answer in np.argwhere(matrix)
        if truth != answer
    ]
    return sorted(found, key=lambda confusion: -confusion.count)


def _counts(values: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    return np.bincount(values, minlength=size).astype(np.int64)


def _whole(scores: SampleScores, name: str) -> NDArray[np.int64]:
    return scores.details[name].astype(np.int64)


def _interval(report: Report, merged: Contender, task: str, own: str) -> Difference | None:
    """Return the difference to the contender with the individual model."""
    individuals = {c.name for c in report.contenders() if c.models.get(task) == own}
    for comparison in report.comparisons:
        if comparison.of == merged.name and comparison.beside in individuals:
            return comparison.on(task)
    return None
