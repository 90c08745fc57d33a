"""Compares runs: their differences in evaluation, and one report for all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.answers import Answers, TaskAnswers
from fusion_bench.report.schema import ModelResult, Report, TaskResult, summarise


@dataclass(frozen=True)
class Evaluated:
    """A run's result: its report and its predictions."""

    report: Report
    answers: Answers


def common_tasks(runs: Mapping[str, Evaluated]) -> list[str]:
    """Return the tasks that all runs have evaluated, in the first run's order."""
    first, *others = runs.values()
    return [t for t in first.report.tasks if all(t in run.report.tasks for run in others)]


def evaluation_differences(runs: Mapping[str, Evaluated]) -> list[str]:
    """Return, in words, the differences in evaluation that make the runs incomparable."""
    (name, first), *others = runs.items()
    found = []
    for other_name, other in others:
        pairs: list[tuple[str, object, object]] = [
            ("precision", first.report.run.precision, other.report.run.precision)
        ]
        for task in common_tasks(runs):
            pairs += _facts(task, first, other)
        found += [
            f"{what}: {one} in '{name}', {two} in '{other_name}'"
            for what, one, two in pairs
            if one != two
        ]
    return found


def _facts(task: str, first: Evaluated, other: Evaluated) -> Iterator[tuple[str, object, object]]:
    """Yield the properties of a task that must be equal in both runs: name and both values."""
    one, two = first.report.tasks[task], other.report.tasks[task]
    yield f"{task}: dataset", one.fingerprint, two.fingerprint
    yield f"{task}: number of samples", one.num_samples, two.num_samples
    mine, theirs = first.answers.tasks[task], other.answers.tasks[task]
    if one.num_samples == two.num_samples and not np.array_equal(mine.samples, theirs.samples):
        yield f"{task}: selection of samples", "one", "another"
    elif one.num_samples == two.num_samples and not np.array_equal(mine.labels, theirs.labels):
        yield f"{task}: labels", "some", "others"
    yield (
        f"{task}: classes, prompts or text tower",
        _short(one.head_sha256),
        _short(two.head_sha256),
    )
    yield f"{task}: image preprocessing", _short(one.images_sha256), _short(two.images_sha256)


def _short(sha256: str | None) -> str:
    return "unknown" if sha256 is None else sha256[:8]


def combined_models(runs: Mapping[str, Evaluated]) -> tuple[dict[str, ModelResult], Answers]:
    """Return all runs' models with results and predictions on the common samples.

    A merged model has its run's name. A baseline with the same results in several runs is included
    once. Only common tasks are used. Without common samples, or with different labels, each run
    keeps its own figures, and there are no predictions.
    """
    tasks = common_tasks(runs)
    models: dict[str, ModelResult] = {}
    answers = Answers()
    chosen = {task: _common_samples(task, runs) for task in tasks}
    for label, run in runs.items():
        evaluated = {
            name: _on(name, model, tasks, run.answers, chosen)
            for name, model in run.report.models.items()
        }
        summarise(evaluated, run.report.own_models())
        for name, own in evaluated.items():
            model = run.report.models[name]
            shown = name if model.role != "merged" else _labelled(label, name)
            if shown in models:
                if _same(models[shown], own):
                    continue
                shown = f"{name} ({label})"
            models[shown] = own
            for task in own.tasks:
                found = run.answers.tasks[task]
                keep = np.isin(found.samples, chosen[task])
                if keep.any():
                    predictions = {shown: found.predictions[name][keep]}
                    part = TaskAnswers(found.samples[keep], found.labels[keep], predictions)
                    answers.add(task, shown, part)
    return models, answers


def _same(one: ModelResult, other: ModelResult) -> bool:
    """Return whether a model has the same results in two runs, apart from losses."""
    counts = [{task: r.accuracy for task, r in model.tasks.items()} for model in (one, other)]
    return one.weights_sha256 == other.weights_sha256 and counts[0] == counts[1]


def _labelled(label: str, name: str) -> str:
    """Return the name of a run's merged model in the comparison."""
    family, slash, own = name.partition("/")
    return f"{label}{slash}{own}" if family == "merged" else f"{label} {name}"


def _common_samples(task: str, runs: Mapping[str, Evaluated]) -> NDArray[np.int32]:
    """Return the samples that all runs evaluated; none where they have other labels somewhere."""
    found = [run.answers.tasks[task] for run in runs.values()]
    samples = reduce(np.intersect1d, (answers.samples for answers in found))
    labels = [answers.labels[np.isin(answers.samples, samples)] for answers in found]
    same = all(np.array_equal(labels[0], other) for other in labels[1:])
    return samples if same else samples[:0]


def _on(
    name: str,
    model: ModelResult,
    tasks: list[str],
    answers: Answers,
    chosen: Mapping[str, NDArray[np.int32]],
) -> ModelResult:
    """Return a model's results on some tasks, and of these on the chosen samples."""
    results = {}
    for task in (task for task in model.tasks if task in tasks):
        found, result = answers.tasks[task], model.tasks[task]
        keep = np.isin(found.samples, chosen[task])
        if keep.any() and not keep.all():
            right, size = int(found.right(name)[keep].sum()), int(keep.sum())
            result = TaskResult.from_counts(right, result.loss * size, size)
        results[task] = result.model_copy()
    return model.model_copy(update={"tasks": results, "average": None})
