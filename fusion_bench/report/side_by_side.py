"""Compares runs: their differences in evaluation, and one report for all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from fusion_bench.report.figures import metric_label
from fusion_bench.report.schema import ModelResult, Report, TaskInfo, TaskResult, summarise
from fusion_bench.report.scores import Scores
from fusion_bench.results import Metric, SampleScores


@dataclass(frozen=True)
class Evaluated:
    """A run's result: its report and its scores."""

    report: Report
    scores: Scores


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
    yield f"{task}: main metric", metric_label(one.main_metric), metric_label(two.main_metric)
    yield f"{task}: number of samples", one.num_samples, two.num_samples
    mine, theirs = _any(first.scores, task), _any(other.scores, task)
    if one.num_samples == two.num_samples and not np.array_equal(mine.samples, theirs.samples):
        yield f"{task}: selection of samples", "one", "another"
    elif one.num_samples == two.num_samples and not np.array_equal(_labels(mine), _labels(theirs)):
        yield f"{task}: labels", "some", "others"
    for what in dict.fromkeys([*one.identity, *two.identity]):
        yield f"{task}: {what}", _short(one.identity.get(what)), _short(two.identity.get(what))


def _any(scores: Scores, task: str) -> SampleScores:
    """Return the scores of a model on a task; all have the same samples."""
    return next(iter(scores.tasks[task].values()))


def _labels(scores: SampleScores) -> NDArray[np.generic]:
    """Return the true labels of samples, where the task has such."""
    return scores.details.get("labels", np.empty(0))


def _short(sha256: str | None) -> str:
    return "unknown" if sha256 is None else sha256[:8]


def combined_models(
    runs: Mapping[str, Evaluated],
) -> tuple[dict[str, TaskInfo], dict[str, ModelResult], Scores]:
    """Return the common tasks, and all runs' models with results and scores on common samples.

    A merged model has its run's name. A baseline with the same results in several runs is included
    once. Only common tasks are used. Without common samples, or with different labels, each run
    keeps its own figures, and there are no scores.
    """
    tasks: dict[str, TaskInfo] = {}
    models: dict[str, ModelResult] = {}
    scores = Scores()
    for task in common_tasks(runs):
        if (info := _common_metrics(task, runs)) is not None:
            tasks[task] = info
            known = {m.name: m for m in next(iter(runs.values())).scores.metrics[task]}
            scores.metrics[task] = [known[metric.name] for metric in info.metrics]
    chosen = {task: _common_samples(task, runs) for task in tasks}
    for label, run in runs.items():
        evaluated = {
            name: _on(name, model, scores.metrics, run.scores, chosen)
            for name, model in run.report.models.items()
        }
        owners = {task: run.report.tasks[task].owner for task in tasks}
        summarise(
            evaluated, {t: i.model_copy(update={"owner": owners[t]}) for t, i in tasks.items()}
        )
        for name, own in evaluated.items():
            model = run.report.models[name]
            shown = name if model.role != "merged" else _labelled(label, name)
            if shown in models:
                if _same(models[shown], own):
                    continue
                shown = f"{name} ({label})"
            models[shown] = own
            for task in own.tasks:
                found = run.scores.tasks[task][name]
                keep = np.isin(found.samples, chosen[task])
                if keep.any():
                    scores.add(task, shown, found.at(keep))
    sizes = {task: r.num_samples for model in models.values() for task, r in model.tasks.items()}
    tasks = {
        task: info.model_copy(update={"num_samples": sizes[task]}) for task, info in tasks.items()
    }
    return tasks, models, scores


def _common_metrics(task: str, runs: Mapping[str, Evaluated]) -> TaskInfo | None:
    """Return the first run's description of a task, with the metrics of all runs alone."""
    first, *others = (run.report.tasks[task] for run in runs.values())
    common = [
        metric
        for metric in first.metrics
        if all(metric.name in [m.name for m in info.metrics] for info in others)
    ]
    if not common:
        return None
    return first.model_copy(update={"metrics": common, "main": common[0].name})


def _same(one: ModelResult, other: ModelResult) -> bool:
    """Return whether a model has the same results in two runs, by the main metrics."""
    found = [{task: r.main.value for task, r in model.tasks.items()} for model in (one, other)]
    return one.identity == other.identity and found[0] == found[1]


def _labelled(label: str, name: str) -> str:
    """Return the name of a run's merged model in the comparison."""
    family, slash, own = name.partition("/")
    return f"{label}{slash}{own}" if family == "merged" else f"{label} {name}"


def _common_samples(task: str, runs: Mapping[str, Evaluated]) -> NDArray[np.int64]:
    """Return the samples that all runs evaluated; none where they have other labels somewhere."""
    found = [_any(run.scores, task) for run in runs.values()]
    samples = reduce(np.intersect1d, (scores.samples for scores in found))
    labels = [_labels(scores.at(np.isin(scores.samples, samples))) for scores in found]
    same = all(np.array_equal(labels[0], other) for other in labels[1:])
    return samples if same else samples[:0]


def _on(
    name: str,
    model: ModelResult,
    metrics: Mapping[str, list[Metric]],
    scores: Scores,
    chosen: Mapping[str, NDArray[np.int64]],
) -> ModelResult:
    """Return a model's results in some metrics, and of these on the chosen samples."""
    results = {}
    for task in (task for task in model.tasks if task in metrics):
        found, result = scores.tasks[task][name], model.tasks[task]
        keep = np.isin(found.samples, chosen[task])
        if keep.any() and not keep.all():
            result = TaskResult.of(found.at(keep), metrics[task])
        values = {m.name: result.metrics[m.name] for m in metrics[task] if m.name in result.metrics}
        results[task] = result.model_copy(update={"metrics": values}).model_copy(deep=True)
    return model.model_copy(update={"tasks": results, "average": None})
