"""Ranks the jobs of a sweep."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fusion_bench.report.comparing import ByTask, compare, contender_scores, own_scores
from fusion_bench.report.figures import LOWER, PERCENT, legend
from fusion_bench.report.schema import (
    NORMALIZED,
    Contender,
    Difference,
    MetricInfo,
    Report,
    Role,
    Strict,
    TaskResult,
    Value,
    same_metric,
)
from fusion_bench.report.scores import Scores
from fusion_bench.results import SampleScores
from fusion_bench.results.statistics import is_proportion

#: What a table is ranked by whose values have no common scale.
UNRANKED = ""
#: So many standard errors apart, no resampling would find two models alike.
_APART = 6


@dataclass(frozen=True)
class Job:
    """A job of a sweep that has a report.

    Attributes:
        directory: its path, relative to the sweep.
        overrides: its own settings, as ``key=value``.
        report: its result.
        scores: those of its models on single samples.
    """

    directory: str
    overrides: Sequence[str]
    report: Report
    scores: Scores

    @property
    def name(self) -> str:
        """What people read."""
        return " ".join(self.overrides) or self.directory


class Line(Strict):
    """A row of a leaderboard: a merged model, or a baseline without a rank.

    ``average`` is that of the main metric, if all tasks have the same; ``normalized`` the average
    share of the own models' values. ``stderr`` is the standard error of what the table is ranked
    by; ``difference`` is that from the best of the same rank; for this one itself from the best of
    the rank before.
    """

    rank: int | None = None
    name: str
    role: Role
    directory: str
    overrides: list[str]
    average: Value | None
    normalized: float | None
    tasks: dict[str, Value]
    stderr: float | None
    difference: Difference | None = None


class Standings(Strict):
    """A table of comparable models: evaluated on the same samples in the same way.

    Attributes:
        facts: the differences to other tables, if there are several.
        ranked_by: the main metric itself where a model has no normalised value, or where the own
            models differ from job to job; otherwise ``normalized``; empty where neither can be.
        metrics: what the models were evaluated on, and each task's main metric.
        held_out: the tasks that no fused model was trained for.
        lines: the ranked models, then the others.
    """

    facts: dict[str, str]
    ranked_by: str
    metrics: dict[str, MetricInfo]
    held_out: list[str]
    lines: list[Line]

    @property
    def tasks(self) -> list[str]:
        """What the models were evaluated on."""
        return list(self.metrics)

    @property
    def common(self) -> MetricInfo | None:
        """The main metric of all tasks; ``None`` where they differ."""
        mains = {(metric.name, metric.unit): metric for metric in self.metrics.values()}
        return next(iter(mains.values())) if len(mains) == 1 else None

    @property
    def unit(self) -> str:
        """The unit of what the table is ranked by."""
        by_value = self.ranked_by != NORMALIZED and self.common is not None
        return self.common.unit if by_value and self.common else PERCENT

    @property
    def label(self) -> str:
        """What the table is ranked by, in words."""
        name = self.common.label if self.common is not None else "value"
        if self.ranked_by == NORMALIZED:
            return f"average normalised {name}"
        return f"average {name}"

    def score(self, line: Line) -> float:
        """Return the value that a line is ranked by."""
        if self.ranked_by == NORMALIZED or line.average is None:
            return math.nan if line.normalized is None else line.normalized
        return line.average.value

    def merit(self, line: Line) -> float:
        """Return the same, greater for a better model."""
        value = self.score(line)
        if math.isnan(value):
            return -math.inf
        lower = self.ranked_by != NORMALIZED and self.common and not self.common.higher_is_better
        return -value if lower else value

    def sentence(self) -> str:
        """Say what the ranks mean."""
        arrow = f" {LOWER[0].upper()}{LOWER[1:]}." if legend(self.metrics.values()) else ""
        if self.ranked_by == UNRANKED:
            return (
                "Not ranked: the tasks have different metrics, and not all values can be "
                f"normalised.{arrow}"
            )
        by = self.label
        if self.ranked_by == NORMALIZED:
            by += " (share of the own models' values)"
        elif self.common is not None and not self.common.higher_is_better:
            by += ", the lowest first"
        return (
            f"Ranked by {by}. Models with the same rank are not distinguishable from the best of "
            f"them on {'these test sets' if len(self.tasks) > 1 else 'this test set'} (paired "
            f"bootstrap, 95 % interval).{arrow}"
        )


class Failure(Strict):
    """A job without a result."""

    name: str
    directory: str
    message: str


class Leaderboard(Strict):
    """The whole result of a sweep, as in ``leaderboard.json``."""

    schema_version: Literal[2] = 2
    name: str
    tables: list[Standings]
    failures: list[Failure]


def leaderboard(name: str, jobs: Iterable[Job], failures: Iterable[Failure] = ()) -> Leaderboard:
    """Rank the merged models of ``jobs``.

    The best model leads a rank, and all that are not distinguishable from it share that; the best
    of the others leads the next rank, which is counted by those before it: 1, 1, 3. What cannot be
    compared goes into tables of its own.
    """
    groups: dict[tuple[tuple[str, str], ...], list[_Entry]] = {}
    for job in jobs:
        for entry in _entries(job):
            found = facts_of(job.report, entry.contender, entry.scores)
            groups.setdefault(tuple(found.items()), []).append(entry)
    varying = {fact for fact, *others in zip(*groups, strict=True) if set(others) - {fact}}
    keys = {key for key, _ in varying}
    return Leaderboard(
        name=name,
        tables=[
            _standings(entries, {key: value for key, value in facts if key in keys})
            for facts, entries in groups.items()
        ],
        failures=list(failures),
    )


@dataclass(frozen=True)
class _Entry:
    """A merged model of a job, with the data for its comparison."""

    job: Job
    contender: Contender
    several: bool

    @property
    def name(self) -> str:
        return f"{self.job.name} {self.contender.name}" if self.several else self.job.name

    @property
    def results(self) -> dict[str, TaskResult]:
        return self.job.report.results(self.contender)

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        return {task: self.job.report.tasks[task].main_metric for task in self.contender.models}

    @cached_property
    def scores(self) -> ByTask:
        return contender_scores(self.contender, self.job.scores)

    @cached_property
    def references(self) -> ByTask:
        """The scores of each task's own model, if there is one."""
        found = own_scores(self.job.report, self.job.scores)
        return {task: found[task] for task in self.contender.models if task in found}

    def line(self, ranked_by: str) -> Line:
        average = self.job.report.average(self.contender)
        assert average is not None
        values = {task: result.main for task, result in self.results.items()}
        return Line(
            name=self.name,
            role=self.contender.role,
            directory=self.job.directory,
            overrides=list(self.job.overrides),
            average=average.main,
            normalized=average.normalized,
            tasks=values,
            stderr=score_stderr(values.values(), ranked_by),
        )


def _entries(job: Job) -> Iterator[_Entry]:
    merged = [c for c in job.report.contenders() if c.role == "merged" and c.models]
    for contender in merged:
        yield _Entry(job, contender, several=len(merged) > 1)


def facts_of(report: Report, contender: Contender, scores: ByTask) -> dict[str, str]:
    """Return the properties that comparable models share, with names for a table's header.

    Without scores, the selection of samples is not among what is compared.
    """
    infos = {task: report.tasks[task] for task in sorted(contender.models)}
    parts = [part for found in map(scores.get, infos) if found for part in _selected(found)]
    depends = dict.fromkeys(what for info in infos.values() for what in info.identity)
    return {
        "tasks": ", ".join(infos),
        "samples": ", ".join(str(info.num_samples) for info in infos.values()),
        "precision": report.run.precision,
        "metrics": ", ".join(f"{info.main} {info.main_metric.unit}" for info in infos.values()),
        "selection of samples": _hash(parts),
        **{
            what: _hash(str(info.identity.get(what)) for info in infos.values()) for what in depends
        },
    }


def _selected(scores: SampleScores) -> Iterator[bytes]:
    """Yield what is the same for all models on a task: the samples, and their true labels."""
    yield scores.samples.tobytes()
    yield scores.details.get("labels", np.empty(0)).tobytes()


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def score_stderr(values: Iterable[Value], ranked_by: str) -> float | None:
    """Return the standard error of a model's score, the average of its values on the tasks.

    Those of the own models are not counted in.
    """
    errors = [_stderr(value, ranked_by) for value in values]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def _stderr(value: Value, ranked_by: str) -> float | None:
    if ranked_by != NORMALIZED or value.value == 0 or value.stderr is None:
        return value.stderr
    assert value.normalized is not None
    return value.stderr * abs(value.normalized / value.value)


def _standings(entries: Sequence[_Entry], facts: Mapping[str, str]) -> Standings:
    first = entries[0]
    table = Standings(
        facts=dict(facts),
        ranked_by=_ranked_by(entries),
        metrics=first.metrics,
        held_out=[task for task, r in first.results.items() if r.relation == "held_out"],
        lines=[],
    )
    ranked_by = table.ranked_by
    lines = {id(entry): entry.line(ranked_by) for entry in entries}
    if ranked_by == UNRANKED:
        table.lines = [*lines.values(), *_references(entries)]
        return table
    waiting = sorted(entries, key=lambda e: (-table.merit(lines[id(e)]), lines[id(e)].name))
    ranked: list[Line] = []
    best: _Entry | None = None
    while waiting:
        before, best, rank = best, waiting[0], len(ranked) + 1
        others = []
        for entry in waiting:
            line, other = lines[id(entry)], before if entry is best else best
            if other is not None and (entry is best or not _clearly_differ(entry, best, ranked_by)):
                line.difference = _difference(entry, other, ranked_by)
            within = line.difference
            if entry is best or (within is not None and within.low <= 0 <= within.high):
                line.rank = rank
                ranked.append(line)
            else:
                others.append(entry)
        waiting = others
    table.lines = [*ranked, *_references(entries)]
    return table


def _ranked_by(entries: Sequence[_Entry]) -> str:
    results = [result for entry in entries for result in entry.results.values()]
    normal = all(result.main.normalized is not None for result in results)
    own = {
        _hash(part for task in sorted(own) for part in (task, _content(own[task])))
        for own in (entry.references for entry in entries)
    }
    common = same_metric(entries[0].job.report.tasks[t] for t in entries[0].contender.models)
    if normal and (len(own) == 1 or common is None):
        return NORMALIZED
    return UNRANKED if common is None else common.name


def _content(scores: SampleScores) -> bytes:
    return b"".join(
        array.tobytes() for kept in (scores.statistics, scores.details) for array in kept.values()
    )


def _difference(one: _Entry, other: _Entry, ranked_by: str) -> Difference | None:
    references = one.references if ranked_by == NORMALIZED else {}
    metrics = {task: one.job.scores.main(task) for task in one.scores}
    found = compare(one.name, one.scores, other.name, other.scores, references, metrics)
    return found.normalized if ranked_by == NORMALIZED and found.normalized else found.average


def _clearly_differ(one: _Entry, other: _Entry, ranked_by: str) -> bool:
    """Return whether two models' shares of right samples clearly differ, without resampling.

    Of other metrics only resampling tells.
    """
    total, variance = 0.0, 0.0
    for task, scores in one.scores.items():
        metric = one.job.scores.main(task)
        if not is_proportion(metric, scores) or not is_proportion(metric, other.scores[task]):
            return False
        mine, theirs = (s.statistics[metric.name][:, 0] for s in (scores, other.scores[task]))
        change = mine - theirs
        if ranked_by == NORMALIZED:
            change = change / one.references[task].value(metric)
        total += change.mean()
        variance += change.var() / len(change)
    return abs(total) > _APART * math.sqrt(variance)


def _references(entries: Sequence[_Entry]) -> list[Line]:
    """Return the pretrained and individual models, each different one once."""
    tasks = set(entries[0].contender.models)
    found: dict[str, Line] = {}
    for job in {id(entry.job): entry.job for entry in entries}.values():
        for contender in job.report.contenders():
            if contender.role == "merged" or set(contender.models) != tasks:
                continue
            line = _Entry(job, contender, several=True).line(ranked_by="")
            line.name, line.overrides = contender.name, []
            values = sorted((task, value.value) for task, value in line.tasks.items())
            own = f"{contender.name} {values}"
            if own not in found and any(other.name == line.name for other in found.values()):
                line.name = f"{contender.name} of {job.name}"
            found.setdefault(own, line)
    return list(found.values())
