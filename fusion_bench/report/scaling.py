"""The result of a scaling study, with curves.

The measures are those of "What Matters for Model Merging at Scale?", https://arxiv.org/abs/2410.03617.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_bench.report.figures import PERCENT, with_stderr
from fusion_bench.report.page import render
from fusion_bench.report.schema import MetricInfo, Run, Strict, TaskResult, read_model
from fusion_bench.report.schema_1 import lifted_study
from fusion_bench.report.scores import metric_info
from fusion_bench.report.table import markdown_table
from fusion_bench.results import ACCURACY, normalized
from fusion_bench.storage import write_text
from fusion_bench.tasks import canonical_name

if TYPE_CHECKING:
    from fusion_bench.report.pictures import Line

Normalizer = Literal["expert", "base", "none"]
Side = Literal["held_in", "held_out"]
SIDES: tuple[Side, Side] = ("held_in", "held_out")


class Merge(Strict):
    """One merged model: its inputs, and its result on each task.

    ``subset`` numbers the random choices of ``count`` experts.
    """

    base: str
    method: str
    count: int
    subset: int
    models: list[str]
    tasks: dict[str, TaskResult]

    def on(self, side: Side) -> list[str]:
        """Return the tasks of the merged experts, ``held_in``, or the others."""
        own = {canonical_name(model) for model in self.models}
        return [task for task in self.tasks if (canonical_name(task) in own) == (side == "held_in")]


class Base(Strict):
    """A pretrained model and its experts: each task's result by either."""

    num_parameters: int
    pretrained: dict[str, TaskResult]
    experts: dict[str, TaskResult]


class Point(Strict):
    """The mean over the subsets of a score, and its standard deviation.

    A score is the mean over the tasks of a category, and then over the categories.
    """

    base: str
    method: str
    side: Side
    count: int
    mean: float
    spread: float
    subsets: int

    def shown(self, unit: str) -> str:
        """Return it with its unit; without a standard deviation for one subset."""
        return with_stderr(self.mean, None if self.subsets == 1 else self.spread, unit)


class Study(Strict):
    """The result of a scaling study, as in ``study.json``.

    ``held_in`` and ``held_out`` are what the merged model's values are shares of; ``metrics`` is
    each task's main metric.
    """

    schema_version: Literal[2] = 2
    run: Run
    held_in: Normalizer
    held_out: Normalizer
    categories: dict[str, list[str]]
    metrics: dict[str, MetricInfo] = Field(default_factory=dict)
    bases: dict[str, Base]
    merges: list[Merge]
    points: list[Point] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, content: Any) -> Any:
        return lifted_study(content)

    def score(self, merge: Merge, side: Side) -> float | None:
        """Return a merged model's score; ``None`` without tasks or a share, or for mixed metrics.

        A share of a lower-is-better value is the reference divided by it: greater is better.
        """
        values: dict[str, float] = {}
        normalizer = self.held_in if side == "held_in" else self.held_out
        base = self.bases[merge.base]
        references = {"expert": base.experts, "base": base.pretrained, "none": {}}[normalizer]
        for task in merge.on(side):
            value = merge.tasks[task].main.value
            if normalizer != "none":
                if task not in references:
                    return None
                metric = self._metric(task)
                reference = references[task].main.value
                value = float(normalized(value, reference, metric.higher_is_better))
                if not metric.normalise or not isfinite(value):
                    return None
            elif self.common is None:
                return None
            values[task] = value
        return _by_category(values, self.categories)

    def _metric(self, task: str) -> MetricInfo:
        """Return a task's main metric; earlier versions knew accuracy alone."""
        return self.metrics.get(task) or metric_info(ACCURACY)

    def unit_of(self, task: str) -> str:
        """Return the unit of a task's values."""
        return self._metric(task).unit

    @property
    def common(self) -> MetricInfo | None:
        """The main metric of all tasks; ``None`` where they differ."""
        tasks = dict.fromkeys(task for base in self.bases.values() for task in base.pretrained)
        mains = {(m.name, m.unit): m for m in map(self._metric, tasks)}
        return next(iter(mains.values())) if len(mains) == 1 else None

    def unit(self, side: Side) -> str:
        """Return the unit of a side's figures."""
        normalizer = self.held_in if side == "held_in" else self.held_out
        return PERCENT if normalizer != "none" or self.common is None else self.common.unit

    def summarise(self) -> None:
        """Fill in the points."""
        self.points = [
            Point(
                base=base,
                method=method,
                side=side,
                count=count,
                mean=fmean(scores),
                spread=pstdev(scores),
                subsets=len(scores),
            )
            for side in SIDES
            for base, method, count in dict.fromkeys(
                (merge.base, merge.method, merge.count) for merge in self.merges
            )
            if (scores := list(self._scores(base, method, count, side)))
        ]

    def _scores(self, base: str, method: str, count: int, side: Side) -> Iterator[float]:
        for merge in self.merges:
            if (merge.base, merge.method, merge.count) == (base, method, count):
                score = self.score(merge, side)
                if score is not None:
                    yield score

    def title(self, side: Side) -> str:
        """Return the title of a side's figures."""
        normalizer = self.held_in if side == "held_in" else self.held_out
        of = {"expert": ", of the expert's", "base": ", of the pretrained model's", "none": ""}
        label = "value" if self.common is None else self.common.label
        return f"{side.replace('_', '-').capitalize()} {label}{of[normalizer]}"

    def pictures(self) -> dict[Side, str]:
        """Return each side's curves as SVG: one panel per base, one line per method."""
        from fusion_bench.report.pictures import panels_of_curves

        return {
            side: panels_of_curves(
                {base: self._lines(base, side) for base in self.bases},
                self.title(side),
                "number of merged experts",
                unit=self.unit(side),
                whole=(self.held_in if side == "held_in" else self.held_out) != "none",
            )
            for side in SIDES
            if any(point.side == side for point in self.points)
        }

    def _lines(self, base: str, side: Side) -> "list[Line]":
        from fusion_bench.report.pictures import Line

        methods = dict.fromkeys(merge.method for merge in self.merges)
        lines = []
        for method in methods:
            own = [p for p in self.points if (p.base, p.method, p.side) == (base, method, side)]
            own.sort(key=lambda point: point.count)
            lines.append(
                Line(method, [p.count for p in own], [p.mean for p in own], [p.spread for p in own])
            )
        return lines

    def rows(self) -> list[list[str]]:
        """Return the points as a table, with its header: percent, mean ± standard deviation."""
        counts = sorted({merge.count for merge in self.merges})
        rows = [["base", "method", "tasks", *map(str, counts)]]
        known = {(p.base, p.method, p.side, p.count): p for p in self.points}
        for base in self.bases:
            for method in dict.fromkeys(merge.method for merge in self.merges):
                for side in SIDES:
                    found = [known.get((base, method, side, count)) for count in counts]
                    cells = ["–" if p is None else p.shown(self.unit(side)) for p in found]
                    rows.append([base, method, side.replace("_", "-"), *cells])
        return rows

    def print(self, console: Console) -> None:
        """Print the points."""
        head, *body = self.rows()
        table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
        for index, name in enumerate(head):
            table.add_column(Text(name), justify="right" if index > 2 else "left", no_wrap=True)
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)

    def markdown(self) -> str:
        """Return the study as a Markdown page."""
        head, *body = self.rows()
        lines = [
            "# Scaling study",
            "",
            f"- merges: {len(self.merges)}, seed {self.run.seed}",
            f"- device: {self.run.device}, precision {self.run.precision}",
            f"- fusion_bench {self.run.version}, {self.run.created_at}",
            "",
            f"{self.title('held_in')}; {self.title('held_out').lower()}. Percent, mean over the "
            "random subsets ± standard deviation, by the number of merged experts.",
            "",
        ]
        lines += markdown_table(head, body, left=3)
        return "\n".join(lines) + "\n"

    def save(self, directory: Path) -> None:
        """Write ``study.html``, ``.md`` and ``.json``, and each side's curves as SVG."""
        from markupsafe import Markup

        from fusion_bench.report.pictures import standalone

        pictures = self.pictures()
        values = {"study": self, "pictures": {side: Markup(p) for side, p in pictures.items()}}
        write_text(directory / "study.html", render("study.html.j2", values))
        for side, picture in pictures.items():
            write_text(directory / f"{side}.svg", standalone(picture))
        write_text(directory / "study.md", self.markdown())
        write_text(directory / "study.json", self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read a study.

        Raises:
            ConfigError: there is none, or it is none of this version.
        """
        return read_model(cls, path, "study")


def _by_category(
    values: Mapping[str, float], categories: Mapping[str, Sequence[str]]
) -> float | None:
    """Return the mean of the categories' means; a task of none is a category of its own."""
    known = {task: category for category, tasks in categories.items() for task in tasks}
    groups: dict[tuple[bool, str], list[float]] = {}
    for task, value in values.items():
        groups.setdefault((task in known, known.get(task, task)), []).append(value)
    return fmean(map(fmean, groups.values())) if groups else None
