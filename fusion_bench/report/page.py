"""The HTML page of a report."""

import hashlib
import math
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fusion_bench.forms import plain_yaml
from fusion_bench.report.changes import task_changes
from fusion_bench.report.figures import (
    PERCENT,
    comparison_sentence,
    legend,
    metric_label,
    search_metric,
    search_sentence,
    sentence_case,
    shown,
    shown_error,
    signed,
)
from fusion_bench.report.losses import (
    ClassLoss,
    Confusion,
    best_merged,
    class_losses,
    confusion_matrix,
    confusions,
    task_losses,
)
from fusion_bench.report.racing import leaving, race_picture
from fusion_bench.report.schema import (
    Comparison,
    Contender,
    MetricInfo,
    Report,
    Similarity,
    Value,
    same_metric,
)
from fusion_bench.report.scores import Scores
from fusion_bench.report.table import compared_runs, method_name, sources

#: So many classes have a confusion matrix that can be read.
_MATRIX = 12
#: How many classes, and confusions, a list shows.
_LISTED = 10
#: More rows than that nobody reads; a page with them would be too large.
_DIFFERENCES = 1500
#: How many letters of a prompt are shown before it is unfolded.
_EXCERPT = 80
#: More pairs of models than that are shown as each model beside all others.
_PAIRS = 28


def page(report: Report, scores: Scores) -> str:
    """Return a report as a self-contained HTML file.

    Args:
        report: the result; the page leaves out missing parts.
        scores: those of single samples, for classes and confusions.
    """
    merged = best_merged(report)
    models, lines = _models(report), _lines(report)
    values = {
        "report": report,
        "method": method_name(report),
        "runs": compared_runs(report),
        "options": method_options(report),
        "models": models,
        "fused": [model for model in models if model.role == "individual"],
        "lines": lines,
        "marks_own": any(cell.own for line in lines for cell in line.cells),
        "merged": merged,
        "rivals": [c for c in report.contenders() if c.role == "merged" and c != merged],
        "differences": _differences(report),
        "pictured": _pictured_tasks(report, merged),
        "losses": task_losses(report, merged) if merged else [],
        "changes": task_changes(report, scores),
        "classes": _classes(report, scores, merged),
        "matrices": _matrices(report.similarity),
        "extremes": _extremes(report.similarity),
        "command": shlex.join(report.run.command),
        "common": report.main_metric,
        "legend": legend(info.main_metric for info in report.tasks.values()),
        "every_metric": _every_metric(report),
        "held_out": _held_out(report),
        "has_classes": any(info.num_classes is not None for info in report.tasks.values()),
        "config": plain_yaml(report.model_dump(mode="json")["run"]["config"]),
    }
    return render("report.html.j2", values)


def fragment(report: Report) -> str:
    """Return a report's most important figures as a piece of HTML for notebooks.

    It loads nothing from elsewhere, and all text in it is escaped.
    """
    values = {
        "report": report,
        "method": method_name(report),
        "lines": _lines(report),
        "common": report.main_metric,
        "pictured": _pictured_tasks(report, best_merged(report)),
        "matrices": _matrices(report.similarity)[:1],
    }
    return render("notebook.html.j2", values)


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a page from a template under ``templates/``; all text in it is escaped.

    Templates extend ``base.html.j2``. The filters ``figure`` and ``signed`` show values and
    differences, by default fractions in percent and points.

    Args:
        template: the file's name.
        values: what the template names; a name that is missing is an error.
    """
    return _environment().get_template(template).render(values)


@lru_cache
def _environment() -> Any:
    """Return the template environment, with a cache of compiled templates."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("fusion_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "excerpt": _excerpt,
        "figure": shown,
        "signed": _signed,
        "label": metric_label,
        "sentence_case": sentence_case,
        "error_of": shown_error,
        "number": _number,
        "file": lambda name: Markup(_text(environment, name)),
        # The page's policy lets scripts of these hashes run and no other.
        "sha256": lambda text: b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    environment.globals |= {
        "comparison_sentence": comparison_sentence,
        "leaving": leaving,
        "race_picture": lambda search: Markup(race_picture(search)),
        "same_metric": same_metric,
        "search_metric": search_metric,
        "search_sentence": search_sentence,
    }
    return environment


def _signed(difference: float | None, unit: str = PERCENT) -> str:
    return signed(difference, unit).replace("-", "−")


def _number(value: float | None) -> str:
    """Return a value as scripts read it; empty where there is none."""
    if value is None or math.isnan(value):
        return ""
    return str(value).replace("inf", "Infinity")


def _excerpt(text: str) -> str:
    """Return the end of a text, which tells more of a prompt than its beginning, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else f"…{line[-_EXCERPT:]}"


def _text(environment: Any, name: str) -> str:
    text, _, _ = environment.loader.get_source(environment, name)
    return str(text)


@dataclass
class _Cell:
    """A value, its standard error and unit, and whether no other merged model has a better one.

    ``own``: the model was trained for the task.
    """

    value: float | None = None
    error: float | None = None
    unit: str = PERCENT
    best: bool = False
    own: bool = False

    @classmethod
    def of(cls, value: Value, unit: str, *, own: bool = False) -> "_Cell":
        return cls(value.value, value.stderr, unit, own=own)


@dataclass(frozen=True)
class _Line:
    name: str
    role: str
    cells: list[_Cell]


@dataclass(frozen=True)
class _Model:
    """A model: its role, its source, and the hash of its weights."""

    name: str
    role: str
    source: str
    num_parameters: int | None
    identity: str | None


@dataclass(frozen=True)
class _PicturedTasks:
    """Some models' values, normalised where they can be, a list over the tasks each."""

    title: str
    normal: bool
    unit: str
    tasks: list[str]
    series: dict[str, list[float | None]]
    picture: Any


@dataclass(frozen=True)
class _MetricRow:
    """A metric of a task, and its value of each contender."""

    task: str
    metric: MetricInfo
    values: list[Value | None]


@dataclass(frozen=True)
class _Classes:
    """The losses of a task's classes.

    ``matrix`` is the confusion matrix; it is empty for too many classes, and ``confusions`` lists
    the most frequent ones.
    """

    task: str
    names: list[str]
    individual: bool
    losses: list[ClassLoss]
    matrix: list[list[int]]
    confusions: list[Confusion]


@dataclass(frozen=True)
class _Matrix:
    """Figures with their plot."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    picture: Any


def method_options(report: Report) -> dict[str, str]:
    """Return the method's options, each as YAML on one line."""
    search = report.run.search
    node = report.run.config.get("method") if search is None else search.method
    options = node if isinstance(node, Mapping) else {}
    return {key: _plain(value) for key, value in options.items() if key != "_target_"}


def _plain(value: Any) -> str:
    """Return a config value as YAML on one line."""
    if isinstance(value, str):
        return value
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return line.removesuffix("\n").removesuffix("\n...")


def _models(report: Report) -> list[_Model]:
    origins = sources(report)
    found = []
    for name in dict.fromkeys([*origins, *report.models]):
        model = report.models.get(name)
        role = model.role if model else ("pretrained" if name == "_pretrained_" else "individual")
        made = model is not None and model.role == "merged"
        source = _plain(origins[name]) if name in origins else "–"
        if made:
            source = "the run of that name" if compared_runs(report) else "made by this run"
        parameters = model.num_parameters if model else None
        identity = model.identity if model else report.run.inputs.get(name)
        found.append(_Model(name, role, source, parameters, identity))
    return found


def _lines(report: Report) -> list[_Line]:
    """Return the comparison: a cell for each task, the average and the normalised average."""
    lines = [_Line(c.name, c.role, _cells(report, c)) for c in report.contenders()]
    merged = [line.cells for line in lines if line.role == "merged"]
    common = report.main_metric
    metrics = [info.main_metric for info in report.tasks.values()]
    better = [metric.higher_is_better for metric in metrics]
    better += [True] if common is None else [common.higher_is_better, True]
    if len(merged) > 1:
        for column, higher in zip(zip(*merged, strict=True), better, strict=True):
            values = [cell.value for cell in column if cell.value is not None]
            best = (max if higher else min)(values, default=None)
            for cell in column:
                cell.best = cell.value is not None and cell.value == best
    return lines


def _cells(report: Report, contender: Contender) -> list[_Cell]:
    results = report.results(contender)
    full = contender.role == "individual" and len(set(contender.models.values())) == 1
    cells = []
    for task, info in report.tasks.items():
        unit, found = info.main_metric.unit, results.get(task)
        own = full and found is not None and found.relation == "own"
        cells.append(_Cell() if found is None else _Cell.of(found.main, unit, own=own))
    average, common = report.average(contender), report.main_metric
    if common is not None:
        main = None if average is None else average.main
        cells.append(_Cell() if main is None else _Cell.of(main, common.unit))
    return [*cells, _Cell(average.normalized if average else None)]


def _held_out(report: Report) -> set[str]:
    """Return the tasks that no model of the pool was trained for, unless that holds for all."""
    found = {task for task, info in report.tasks.items() if info.owner not in report.models}
    return set() if len(found) == len(report.tasks) else found


def _every_metric(report: Report) -> list[_MetricRow]:
    """Return a row for each metric of each task, if some task has several."""
    if all(len(info.metrics) == 1 for info in report.tasks.values()):
        return []
    results = [report.results(contender) for contender in report.contenders()]
    return [
        _MetricRow(
            task,
            metric,
            [found[task].metrics.get(metric.name) if task in found else None for found in results],
        )
        for task, info in report.tasks.items()
        for metric in info.metrics
    ]


def _differences(report: Report) -> list[Comparison]:
    """Return the comparisons whose differences are shown task by task."""
    rows = sum(len(comparison.tasks) for comparison in report.comparisons)
    return report.comparisons if rows <= _DIFFERENCES else report.main_comparisons()


def _pictured_tasks(report: Report, merged: Contender | None) -> _PicturedTasks | None:
    """Return the values of the merged and the pretrained model for each task.

    There is no picture of values with different units.
    """
    if merged is None:
        return None
    from markupsafe import Markup

    from fusion_bench.report.pictures import accuracies

    tasks = list(merged.models)
    models = [merged, *(c for c in report.contenders() if c.role == "pretrained")]
    results = {c.name: report.results(c) for c in models}
    normal = all(r.main.normalized is not None for r in results[merged.name].values())
    metric = same_metric(report.tasks[task] for task in tasks)
    if not normal and metric is None:
        return None
    series = {
        name: [
            (found[task].main.normalized if normal else found[task].main.value)
            if task in found
            else None
            for task in tasks
        ]
        for name, found in results.items()
    }
    label = "value" if metric is None else metric.label
    title = f"Normalised {label}" if normal else sentence_case(label)
    unit = PERCENT if normal or metric is None else metric.unit
    whole = "individual model" if normal else None
    picture = accuracies(tasks, series, title, whole, unit)
    return _PicturedTasks(title, normal, unit, tasks, series, Markup(picture))


def _classes(report: Report, scores: Scores, merged: Contender | None) -> list[_Classes]:
    """Return the losses of each task's classes, the worst task first, if classes are named."""
    if merged is None:
        return []
    order = [loss.task for loss in task_losses(report, merged)]
    own = report.own_models()
    classes = []
    for task in dict.fromkeys([*order, *merged.models]):
        names, found = report.tasks[task].classes, scores.tasks.get(task)
        if names is None or found is None:
            continue
        mine = found[merged.models[task]]
        theirs = found[own[task]] if task in own else None
        matrix = confusion_matrix(mine, len(names))
        small = len(names) <= _MATRIX
        classes.append(
            _Classes(
                task,
                names,
                task in own,
                class_losses(names, mine, theirs)[:_LISTED],
                matrix.tolist() if small else [],
                [] if small else confusions(names, matrix)[:_LISTED],
            )
        )
    return classes


def _extremes(similarity: Similarity | None) -> list[tuple[str, str, float]]:
    """Return the least and the most similar pair of models, with their cosines."""
    if similarity is None or len(similarity.models) < 3:
        return []
    pairs = [
        (similarity.models[i], similarity.models[j], similarity.cosines[0][i][j])
        for i, j in combinations(range(len(similarity.models)), 2)
    ]
    return [min(pairs, key=lambda pair: pair[2]), max(pairs, key=lambda pair: pair[2])]


def _matrices(similarity: Similarity | None) -> list[_Matrix]:
    """Return the cosines of the task vectors, and cosines and norms for each part."""
    return [] if similarity is None else _pictured(similarity.model_dump_json())


@lru_cache(maxsize=8)  # the jobs of a sweep have the same task vectors
def _pictured(content: str) -> list[_Matrix]:
    similarity = Similarity.model_validate_json(content)
    names, parts = similarity.models, similarity.parts[1:]
    cosines, norms = np.array(similarity.cosines), np.array(similarity.norms).T
    pairs = list(combinations(range(len(names)), 2))
    found = []
    if pairs:
        between = np.array([cosines[:, i, j] for i, j in pairs])
        limit = max(0.1, float(np.abs(between).max()))
        same = np.eye(len(names), dtype=bool)
        whole = np.where(same, np.nan, cosines[0])
        found.append(_matrix("Cosines of the task vectors", names, names, cosines[0], whole, limit))
        if len(parts) > 1 and len(pairs) <= _PAIRS:
            rows = [f"{names[i]} – {names[j]}" for i, j in pairs]
            values = between[:, 1:]
            found.append(_matrix("Cosines in each part", rows, parts, values, values, limit))
        elif len(parts) > 1:
            others = np.where(same, 0, cosines[1:]).sum(axis=2).T / (len(names) - 1)
            title = "Mean cosine with all other task vectors, in each part"
            found.append(_matrix(title, names, parts, others, others, limit))
    title = "Norms of the task vectors, in each part"
    found.append(_matrix(title, names, ["whole network", *parts], norms, norms[:, 1:], None))
    return found


def _matrix(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: NDArray[np.float64],
    pictured: NDArray[np.float64],
    limit: float | None,
) -> _Matrix:
    """Return figures with a plot of the last ``pictured.shape[1]`` columns."""
    from markupsafe import Markup

    from fusion_bench.report.pictures import heat_map

    seen = pictured[np.isfinite(pictured)]
    words = f"From {seen.min():.2g} to {seen.max():.2g}; the table below has each figure."
    shown = columns[len(columns) - pictured.shape[1] :]
    picture = Markup(heat_map(rows, shown, pictured, title, words, limit))
    return _Matrix(title, list(rows), list(columns), values.tolist(), picture)
