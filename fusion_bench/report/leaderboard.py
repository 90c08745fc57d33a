"""Ranks the jobs of a sweep."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fusion_bench.report.answers import Answers
from fusion_bench.report.schema import (
    Average,
    Contender,
    Difference,
    Report,
    Role,
    TaskResult,
)
from fusion_bench.report.statistics import Right, compare, individual_answers, right

Score = Literal["normalized_accuracy", "accuracy"]


#: So many standard errors apart, no resampling would find two models alike.
_APART = 6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Job:
    """A job of a sweep that has a report.

    Attributes:
        directory: its path, relative to the sweep.
        overrides: its own settings, as ``key=value``.
        report: its result.
        answers: the predictions of its models.
    """

    directory: str
    overrides: Sequence[str]
    report: Report
    answers: Answers

    @property
    def name(self) -> str:
        """What people read."""
        return " ".join(self.overrides) or self.directory


class Line(_Strict):
    """A row of a leaderboard: a merged model, or a baseline without a rank.

    Accuracies are fractions. ``stderr`` is the standard error of what the table is ranked by;
    ``difference`` is that from the best of the same rank; for this one itself from the best of the
    rank before.
    """

    rank: int | None = None
    name: str
    role: Role
    directory: str
    overrides: list[str]
    accuracy: float
    accuracy_stderr: float
    normalized_accuracy: float | None
    tasks: dict[str, float]
    task_stderrs: dict[str, float]
    stderr: float
    difference: Difference | None = None


class Standings(_Strict):
    """A table of comparable models: evaluated on the same samples in the same way.

    Attributes:
        facts: the differences to other tables, if there are several.
        ranked_by: the accuracy itself where a model has no normalised one, or where the individual
            models differ from job to job.
        tasks: what the models were evaluated on.
        lines: the ranked models, then the others.
    """

    facts: dict[str, str]
    ranked_by: Score
    tasks: list[str]
    lines: list[Line]

    def score(self, line: Line) -> float:
        """Return the score that a line is ranked by."""
        return _value(line, self.ranked_by)

    def sentence(self) -> str:
        """Say what the ranks mean."""
        by = "average accuracy"
        if self.ranked_by == "normalized_accuracy":
            by = "average normalised accuracy (of the individual models')"
        return (
            f"Ranked by {by}. Models with the same rank are not distinguishable from the best of "
            f"them on {'these test sets' if len(self.tasks) > 1 else 'this test set'} (paired "
            "bootstrap, 95 % interval)."
        )


class Failure(_Strict):
    """A job without a result."""

    name: str
    directory: str
    message: str


class Leaderboard(_Strict):
    """The whole result of a sweep, as in ``leaderboard.json``."""

    schema_version: Literal[1] = 1
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
            groups.setdefault(tuple(_facts(entry).items()), []).append(entry)
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

    @cached_property
    def right(self) -> Right:
        return right(self.contender, self.job.answers)

    @cached_property
    def individual(self) -> Right:
        """The predictions of each task's own model, if there is one."""
        found = individual_answers(self.job.report, self.job.answers)
        return {task: found[task] for task in self.contender.models if task in found}

    def line(self, ranked_by: Score) -> Line:
        average = Average.over(self.results.values())
        errors = [_stderr(result, ranked_by) for result in self.results.values()]
        return Line(
            name=self.name,
            role=self.contender.role,
            directory=self.job.directory,
            overrides=list(self.job.overrides),
            accuracy=average.accuracy,
            accuracy_stderr=average.accuracy_stderr,
            normalized_accuracy=average.normalized_accuracy,
            tasks={task: result.accuracy for task, result in self.results.items()},
            task_stderrs={task: r.accuracy_stderr for task, r in self.results.items()},
            stderr=math.hypot(*errors) / len(errors),
        )


def _entries(job: Job) -> Iterator[_Entry]:
    merged = [c for c in job.report.contenders() if c.role == "merged" and c.models]
    for contender in merged:
        yield _Entry(job, contender, several=len(merged) > 1)


def _facts(entry: _Entry) -> dict[str, str]:
    """Return the properties that comparable models share, with names for a table's header."""
    infos = {task: entry.job.report.tasks[task] for task in sorted(entry.contender.models)}
    answers = [entry.job.answers.tasks[task] for task in infos]
    return {
        "tasks": ", ".join(infos),
        "samples": ", ".join(str(info.num_samples) for info in infos.values()),
        "precision": entry.job.report.run.precision,
        "datasets": _hash(info.fingerprint for info in infos.values()),
        "selection of samples": _hash(
            part.tobytes() for found in answers for part in (found.samples, found.labels)
        ),
        "classifiers": _hash(str(info.head_sha256) for info in infos.values()),
        "image preprocessing": _hash(str(info.images_sha256) for info in infos.values()),
    }


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _stderr(result: TaskResult, ranked_by: Score) -> float:
    """Return the standard error of a score; that of the individual model is not counted in."""
    if ranked_by == "accuracy" or result.accuracy == 0:
        return result.accuracy_stderr
    assert result.normalized_accuracy is not None
    return result.accuracy_stderr * result.normalized_accuracy / result.accuracy


def _standings(entries: Sequence[_Entry], facts: Mapping[str, str]) -> Standings:
    ranked_by = _score(entries)
    lines = {id(entry): entry.line(ranked_by) for entry in entries}
    waiting = sorted(entries, key=lambda e: (-_value(lines[id(e)], ranked_by), lines[id(e)].name))
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
    return Standings(
        facts=dict(facts),
        ranked_by=ranked_by,
        tasks=list(entries[0].contender.models),
        lines=[*ranked, *_references(entries, ranked_by)],
    )


def _score(entries: Sequence[_Entry]) -> Score:
    results = [result for entry in entries for result in entry.results.values()]
    normal = all(result.normalized_accuracy is not None for result in results)
    own = {
        _hash(part for task in sorted(own) for part in (task, own[task].tobytes()))
        for own in (entry.individual for entry in entries)
    }
    return "normalized_accuracy" if normal and len(own) == 1 else "accuracy"


def _value(line: Line, ranked_by: Score) -> float:
    if ranked_by == "accuracy":
        return line.accuracy
    assert line.normalized_accuracy is not None
    return line.normalized_accuracy


def _difference(one: _Entry, other: _Entry, ranked_by: Score) -> Difference:
    individual = one.individual if ranked_by == "normalized_accuracy" else {}
    found = compare(one.name, one.right, other.name, other.right, individual)
    if ranked_by == "normalized_accuracy" and found.normalized_accuracy is not None:
        return found.normalized_accuracy
    return found.accuracy


def _clearly_differ(one: _Entry, other: _Entry, ranked_by: Score) -> bool:
    """Return whether two models clearly differ, without resampling."""
    total, variance = 0.0, 0.0
    for task, answers in one.right.items():
        change = answers.astype(float) - other.right[task]
        if ranked_by == "normalized_accuracy":
            change /= one.individual[task].mean()
        total += change.mean()
        variance += change.var() / len(change)
    return abs(total) > _APART * math.sqrt(variance)


def _references(entries: Sequence[_Entry], ranked_by: Score) -> list[Line]:
    """Return the pretrained and individual models, each different one once."""
    tasks = set(entries[0].contender.models)
    found: dict[str, Line] = {}
    for job in {id(entry.job): entry.job for entry in entries}.values():
        for contender in job.report.contenders():
            if contender.role == "merged" or set(contender.models) != tasks:
                continue
            line = _Entry(job, contender, several=True).line(ranked_by="accuracy")
            line.name, line.overrides = contender.name, []
            own = f"{contender.name} {sorted(line.tasks.items())}"
            if own not in found and any(other.name == line.name for other in found.values()):
                line.name = f"{contender.name} of {job.name}"
            found.setdefault(own, line)
    return list(found.values())
