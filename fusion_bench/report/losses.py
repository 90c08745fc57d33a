"""The losses of a merged model: tasks, classes and confusions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.answers import TaskAnswers
from fusion_bench.report.schema import Contender, Difference, Report


@dataclass(frozen=True)
class TaskLoss:
    """The accuracies of a task's individual model and the merged model; fractions.

    Attributes:
        task: its name.
        individual: the accuracy of the task's own model.
        merged: that of the merged model.
        interval: the interval of their difference, if they were compared.
    """

    task: str
    individual: float
    merged: float
    interval: Difference | None

    @property
    def change(self) -> float:
        """The merged model's accuracy minus the individual one's."""
        return self.merged - self.individual

    @property
    def kept(self) -> float | None:
        """The normalised accuracy."""
        return self.merged / self.individual if self.individual else None


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


def task_losses(report: Report, merged: Contender) -> list[TaskLoss]:
    """Return the tasks with an individual model, the greatest loss first."""
    found = []
    for task, own in report.own_models().items():
        if task in merged.models:
            individual = report.models[own].tasks[task].accuracy
            accuracy = report.results(merged)[task].accuracy
            found.append(TaskLoss(task, individual, accuracy, _interval(report, merged, task, own)))
    return sorted(found, key=lambda loss: loss.change)


def class_losses(
    names: Sequence[str], found: TaskAnswers, merged: str, individual: str | None
) -> list[ClassLoss]:
    """Return the classes that lost correct predictions, the greatest loss first.

    Args:
        names: the classes, in the order of their labels.
        found: the task's answers.
        merged: the model that was evaluated.
        individual: the task's own model, if there is one.
    """
    samples = _counts(found.labels, len(names))
    right = _counts(found.labels[found.right(merged)], len(names))
    own = _counts(found.labels[found.right(individual)], len(names)) if individual else None
    losses = [
        ClassLoss(name, int(samples[i]), None if own is None else int(own[i]), int(right[i]))
        for i, name in enumerate(names)
    ]
    return sorted((loss for loss in losses if loss.lost > 0), key=lambda loss: -loss.lost)


def confusion_matrix(found: TaskAnswers, model: str, num_classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix: true classes (rows), predicted classes (columns)."""
    pairs = found.labels.astype(np.int64) * num_classes + found.predictions[model]
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


def _interval(report: Report, merged: Contender, task: str, own: str) -> Difference | None:
    """Return the difference to the contender with the individual model."""
    individuals = {c.name for c in report.contenders() if c.models.get(task) == own}
    for comparison in report.comparisons:
        if comparison.model == merged.name and comparison.other in individuals:
            return comparison.tasks.get(task)
    return None
