"""All results below a folder, in one table.

The files may be anybody's: each is read with limits, and one that cannot be read is listed with
the reason.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fusion_bench.problems import FusionBenchError
from fusion_bench.report.figures import search_sentence, with_stderr
from fusion_bench.report.leaderboard import (
    UNRANKED,
    Leaderboard,
    Line,
    Standings,
    facts_of,
    score_stderr,
)
from fusion_bench.report.losses import best_merged
from fusion_bench.report.page import method_options
from fusion_bench.report.reproduction import Reproduction
from fusion_bench.report.scaling import Study
from fusion_bench.report.schema import (
    NORMALIZED,
    Average,
    Contender,
    MetricInfo,
    Report,
    Role,
    Value,
    read_model,
)
from fusion_bench.report.table import compared_runs, method_name

Kind = Literal["comparison", "reproduction", "scaling study", "sweep"]
#: No result is so large, in bytes; each takes milliseconds to read.
_LONGEST = 16 * 2**20
#: So many files are read, the newest ones; a page with more is slow.
MOST = 2000
#: Half of a 95 % interval, in standard errors.
Z = 1.96
#: So many different baselines of one name are told apart.
_BASELINES = 5


@dataclass(frozen=True)
class Model:
    """A model's result: its value of each task's main metric, and their average."""

    name: str
    role: Role
    values: Mapping[str, Value]
    average: Average

    @classmethod
    def of(cls, report: Report, contender: Contender) -> "Model | None":
        """Return a contender's result; none without tasks."""
        average = report.average(contender)
        values = {task: found.main for task, found in report.results(contender).items()}
        return None if average is None else cls(contender.name, contender.role, values, average)


@dataclass(frozen=True)
class IndexedRun:
    """What the page shows of a run.

    Attributes:
        directory: of its report.
        best: its best merged model, if it was evaluated.
        baselines: the pretrained model and the individual ones, evaluated on the same tasks.
        metrics: each task's main metric.
        held_out: the tasks that no fused model was trained for.
        facts: what comparable runs share.
        owners: the weights of each task's own model, which normalised values refer to.
        remarks: what a reader must know before comparing figures.
    """

    directory: Path
    method: str
    options: Mapping[str, str]
    created_at: str
    seconds: float
    device: str
    seed: int | None
    version: str
    best: Model | None
    baselines: Sequence[Model]
    metrics: Mapping[str, MetricInfo]
    held_out: Sequence[str]
    facts: Mapping[str, str]
    owners: tuple[tuple[str, str], ...]
    remarks: Sequence[str]

    @property
    def common(self) -> MetricInfo | None:
        """The main metric of all tasks; ``None`` where they differ."""
        mains = {(metric.name, metric.unit): metric for metric in self.metrics.values()}
        return next(iter(mains.values())) if len(mains) == 1 else None

    @classmethod
    def of(cls, directory: Path, report: Report) -> "IndexedRun":
        """Return what is shown of a report."""
        contender = best_merged(report)
        best = None if contender is None else Model.of(report, contender)
        tasks = list(contender.models) if contender else []
        own = report.own_models()
        baselines = [
            Model.of(report, c)
            for c in report.contenders()
            if c.name in ("pretrained", "individual") and set(c.models) == set(tasks)
        ]
        results = report.results(contender) if contender else {}
        return cls(
            directory,
            method_name(report),
            method_options(report),
            report.run.created_at,
            report.run.seconds.total,
            report.run.device,
            report.run.seed,
            report.run.version,
            best,
            [model for model in baselines if model is not None],
            {task: report.tasks[task].main_metric for task in tasks},
            [task for task, found in results.items() if found.relation == "held_out"],
            facts_of(report, contender, {}) if contender else {},
            tuple(sorted((t, report.models[own[t]].identity) for t in tasks if t in own)),
            list(_remarks(report)),
        )


@dataclass(frozen=True)
class Collection:
    """A result that is made of several runs, in a sentence.

    ``page`` is its own page, and ``number`` that of what it is made of.
    """

    kind: Kind
    page: Path
    number: int
    content: str
    outcome: str
    created_at: str


@dataclass(frozen=True)
class Unreadable:
    """A file that is not a result, and why."""

    path: Path
    reason: str


@dataclass
class Index:
    """All results below a folder.

    Attributes:
        folder: the folder.
        runs: the newest first.
        collections: sweeps, studies, comparisons and reproductions.
        unreadable: files that could not be read.
        left_out: how many older files were not read.
    """

    folder: Path
    runs: list[IndexedRun] = field(default_factory=list)
    collections: list[Collection] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    left_out: int = 0

    def tables(self) -> list[tuple[Standings, list[IndexedRun], dict[str, str]]]:
        """Return the ranks of comparable runs, with these runs in the same order and their facts.

        The table with the most runs is the first. Baselines follow the runs, without a rank.
        """
        groups: dict[tuple[tuple[str, str], ...], list[IndexedRun]] = {}
        for run in self.runs:
            if run.best is not None:
                groups.setdefault(tuple(run.facts.items()), []).append(run)
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        return [(*_standings(runs), dict(facts)) for facts, runs in ordered]


def index(folder: Path, most: int = MOST) -> Index:
    """Read the results below a folder; links to folders and hidden folders are not followed.

    Args:
        folder: the folder.
        most: so many files are read, the newest ones.
    """
    found = Index(folder)
    files = sorted(_files(folder), key=lambda file: (-file[0], file[1]))
    found.left_out = max(0, len(files) - most)
    for _, path in files[:most]:
        try:
            _refuse_long(path)
            _READERS[path.name](found, path)
        except FusionBenchError as error:
            found.unreadable.append(Unreadable(path, _reason(error, path)))
        except OSError as error:
            found.unreadable.append(Unreadable(path, str(error.strerror or error)))
        except Exception as error:  # figures that make no sense, which no schema can tell
            reason = f"its figures make no sense ({type(error).__name__}: {error})"
            found.unreadable.append(Unreadable(path, reason))
    found.runs.sort(key=lambda run: run.created_at, reverse=True)
    return found


def _files(folder: Path) -> Iterator[tuple[float, Path]]:
    """Yield the files that may be results, with the time of their last change."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in _READERS.keys() & set(names):
            path = Path(place, name)
            try:
                yield path.stat().st_mtime, path
            except OSError:  # a link to nowhere
                yield 0.0, path


def _refuse_long(path: Path) -> None:
    size = path.stat().st_size
    if size > _LONGEST:
        most = _LONGEST // 2**20
        raise FusionBenchError(f"it has {size / 2**20:.0f} MiB; no more than {most} MiB are read")


def _reason(error: FusionBenchError, path: Path) -> str:
    """Return a message without the file's name, which stands beside it."""
    return error.problems[0].reason.replace(f"'{path}'", "it").rstrip(".")


def _add_report(found: Index, path: Path) -> None:
    report = Report.load(path)
    if runs := compared_runs(report):
        merged = best_merged(report)
        outcome = "" if merged is None else f"best: {merged.name} {_average(report, merged)}"
        found.collections.append(
            Collection(
                "comparison",
                path.with_suffix(".html"),
                len(runs),
                ", ".join(runs),
                outcome,
                report.run.created_at,
            )
        )
        return
    found.runs.append(IndexedRun.of(path.parent, report))


def _add_study(found: Index, path: Path) -> None:
    study = Study.load(path)
    methods = dict.fromkeys(merge.method for merge in study.merges)
    content = f"{', '.join(methods)} on {', '.join(study.bases)}"
    plain = study.common if study.held_in == "none" else None
    sign = -1 if plain is not None and not plain.higher_is_better else 1  # a share is never lower
    points = (point for point in study.points if point.side == "held_in")
    best = max(points, key=lambda point: sign * point.mean, default=None)
    outcome = ""
    if best is not None:
        unit = study.unit("held_in")
        outcome = (
            f"best held-in: {best.method}, {best.count} experts of {best.base}, "
            f"{_with_unit(best.mean, None, unit)}"
        )
    found.collections.append(
        Collection(
            "scaling study",
            path.with_suffix(".html"),
            len(study.merges),
            content,
            outcome,
            study.run.created_at,
        )
    )


def _add_board(found: Index, path: Path) -> None:
    board = read_model(Leaderboard, path, "leaderboard")
    ranked = [line for table in board.tables for line in table.lines if line.rank is not None]
    merged = [line for table in board.tables for line in table.lines if line.role == "merged"]
    first = [
        f"{table.lines[0].name} ({table.label} "
        f"{_with_unit(table.score(table.lines[0]), None, table.unit)})"
        for table in board.tables
        if table.lines and table.lines[0].rank is not None
    ]
    outcome = f"best: {'; '.join(first)}" if ranked else ""
    if board.failures:
        outcome = "; ".join(filter(None, [outcome, f"{len(board.failures)} failed"]))
    number = len(merged) + len(board.failures)
    page = path.with_suffix(".html")
    found.collections.append(Collection("sweep", page, number, board.name, outcome, ""))


def _add_reproduction(found: Index, path: Path) -> None:
    made = read_model(Reproduction, path, "reproduction")
    found.collections.append(
        Collection(
            "reproduction",
            path.with_suffix(".html"),
            len(made.rows),
            made.name,
            made.sentence(),
            made.created_at,
        )
    )


#: The files that are read, and what reads them.
_READERS: Mapping[str, Callable[[Index, Path], None]] = {
    "report.json": _add_report,
    "study.json": _add_study,
    "leaderboard.json": _add_board,
    "reproduce.json": _add_reproduction,
}


def _average(report: Report, contender: Contender) -> str:
    average, common = report.average(contender), report.main_metric
    if average is None:
        return ""
    if common is None or average.main is None:
        return _with_unit(average.normalized, None, "%")
    return _with_unit(average.main.value, average.main.stderr, common.unit)


def _with_unit(value: float | None, stderr: float | None, unit: str) -> str:
    return f"{with_stderr(value, stderr, unit)} {unit}".rstrip()


def _remarks(report: Report) -> Iterator[str]:
    run = report.run
    if not report.tasks:
        yield "nothing was evaluated"
    elif run.config.get("fast_dev_run"):
        yield "a trial run: only the first batch of each task"
    if run.tuning is not None:
        yield run.tuning.sentence()
    if run.search is not None:
        yield search_sentence(run.search)
    yield from run.notes


def _standings(runs: Sequence[IndexedRun]) -> tuple[Standings, list[IndexedRun]]:
    """Return comparable runs as a table, and the runs in its order."""
    first = runs[0]
    ranked_by = _ranked_by(runs)
    table = Standings(
        facts={},
        ranked_by=ranked_by,
        metrics=dict(first.metrics),
        held_out=list(first.held_out),
        lines=[],
    )
    pairs = [(_line(run.best, run.directory, ranked_by), run) for run in runs if run.best]
    pairs.sort(key=lambda pair: -table.merit(pair[0]))
    if ranked_by != UNRANKED:
        _rank(table, [line for line, _ in pairs])
    baselines: dict[str, Line] = {}
    for run in runs:
        for model in run.baselines:
            line = _line(model, run.directory, ranked_by)
            baselines.setdefault(f"{model.name} {sorted(model.values)} {line.average}", line)
    table.lines = [*(line for line, _ in pairs), *list(baselines.values())[:_BASELINES]]
    return table, [run for _, run in pairs]


def _ranked_by(runs: Sequence[IndexedRun]) -> str:
    """Return what runs are ranked by: normalised values, if they refer to the same models."""
    common = runs[0].common
    normal = all(
        value.normalized is not None for r in runs if r.best for value in r.best.values.values()
    )
    if normal and (common is None or len({run.owners for run in runs}) == 1):
        return NORMALIZED
    return UNRANKED if common is None else common.name


def _line(model: Model, directory: Path, ranked_by: str) -> Line:
    return Line(
        name=model.name,
        role=model.role,
        directory=str(directory),
        overrides=[],
        average=model.average.main,
        normalized=model.average.normalized,
        tasks=dict(model.values),
        stderr=None if ranked_by == UNRANKED else _stderr(model, ranked_by),
    )


def _stderr(model: Model, ranked_by: str) -> float | None:
    if ranked_by == NORMALIZED and model.average.normalized is None:
        return None
    return score_stderr(model.values.values(), ranked_by)


def _rank(table: Standings, lines: Sequence[Line]) -> None:
    """Rank lines, the best first, by their scores and standard errors alone.

    As in a sweep, those that are not distinguishable from the best share its rank. The errors are
    taken as independent: that of a difference is overestimated for models with the same samples.
    """
    waiting = [line for line in lines if not math.isnan(table.score(line))]
    count = 0
    while waiting:
        best, rank, others = waiting[0], count + 1, []
        for line in waiting:
            apart = abs(table.score(line) - table.score(best))
            if line is best or apart <= Z * math.hypot(line.stderr or 0, best.stderr or 0):
                line.rank, count = rank, count + 1
            else:
                others.append(line)
        waiting = others
