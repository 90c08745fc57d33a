"""Published figures compared with reproduced figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_bench.problems import FusionBenchError
from fusion_bench.report.page import render
from fusion_bench.report.reference import AVERAGE, BASELINES, Reference
from fusion_bench.report.schema import Report, read_model
from fusion_bench.shown import visible
from fusion_bench.storage import write_text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Strict):
    """A published figure and the reproduced one; in percent and percentage points."""

    row: str
    column: str
    published: float
    found: float
    tolerance: float

    @property
    def difference(self) -> float:
        """The reproduced minus the published figure."""
        return round(self.found - self.published, 6)

    @property
    def passed(self) -> bool:
        """Whether it is within its tolerance."""
        return abs(self.difference) <= self.tolerance

    def sentence(self) -> str:
        """Return it in words."""
        return (
            f"{self.row} on {self.column}: published {self.published:.1f}, found {self.found:.1f} "
            f"({_signed(self.difference)}, tolerance {self.tolerance:g})"
        )


class Reproduction(_Strict):
    """The result of checking a reference, as in ``reproduce.json``.

    ``reports`` is each row's report, relative to the file.
    """

    schema_version: Literal[1] = 1
    name: str
    version: str
    created_at: str
    reference: Reference
    figures: list[Figure]
    reports: dict[str, str]

    @property
    def failed(self) -> list[Figure]:
        """The figures that are off by more than their tolerance."""
        return [figure for figure in self.figures if not figure.passed]

    @property
    def rows(self) -> dict[str, dict[str, Figure]]:
        """The figures by row and column."""
        rows: dict[str, dict[str, Figure]] = {}
        for figure in self.figures:
            rows.setdefault(figure.row, {})[figure.column] = figure
        return rows

    @property
    def columns(self) -> list[str]:
        """The tasks, and the average."""
        return [*self.reference.tasks, AVERAGE]

    def sentence(self) -> str:
        """Summarise the result."""
        passed = len(self.figures) - len(self.failed)
        return f"{passed} of {len(self.figures)} figures are within their tolerance"

    def save(self, directory: Path) -> None:
        """Write ``reproduce.html``, ``.md`` and ``.json``."""
        values = {"result": self, "source": self.reference}
        write_text(directory / "reproduce.html", render("reproduce.html.j2", values))
        write_text(directory / "reproduce.md", self.markdown())
        write_text(directory / "reproduce.json", self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Reproduction":
        """Read one.

        Raises:
            ConfigError: there is none, or it is none of this version.
        """
        return read_model(cls, path, "reproduction")

    def print(self, console: Console) -> None:
        """Print the reproduced figures with the differences."""
        table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
        for index, name in enumerate(["found, % (difference)", *self.columns]):
            table.add_column(Text(name), justify="right" if index else "left", no_wrap=True)
        for row, figures in self.rows.items():
            cells = [figures.get(column) for column in self.columns]
            table.add_row(
                Text(row),
                *(Text(_cell(c), "" if c is None or c.passed else "bold red") for c in cells),
            )
        console.print(table)

    def markdown(self) -> str:
        """Return it as a Markdown page."""
        head = ["found, % (difference)", *self.columns]
        body = [
            [row, *(_cell(figures.get(column)) for column in self.columns)]
            for row, figures in self.rows.items()
        ]
        lines = [
            f"# Reproduction of {self.name}",
            "",
            f"- source: {self.reference.source}"
            + (f", <{self.reference.link}>" if self.reference.link else ""),
            f"- checkpoints: {self.reference.checkpoints}",
            f"- {self.sentence()}",
            f"- fusion_bench {self.version}, {self.created_at}",
            "",
        ]
        escape = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;"})
        table = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
        lines += [
            "| " + " | ".join(visible(cell).translate(escape) for cell in row) + " |"
            for row in table
        ]
        lines += ["", "An exclamation mark: the difference exceeds the tolerance."]
        return "\n".join(lines) + "\n"


def check(reference: Reference, rows: Sequence[str], reports: Mapping[str, Report]) -> list[Figure]:
    """Compare the published figures of ``rows`` with those of their reports.

    The baselines are in any of the reports.

    Raises:
        FusionBenchError: a row that made no one model, or a task that was not evaluated.
    """
    figures = []
    for row in rows:
        report = next(iter(reports.values())) if row in BASELINES else reports[row]
        found = _accuracies(row, report)
        for column, published, tolerance in reference.figures(row):
            value = fmean(found[task] for task in reference.tasks)
            if column != AVERAGE:
                value = found[column]
            figures.append(
                Figure(
                    row=row,
                    column=column,
                    published=published,
                    found=round(100 * value, 4),
                    tolerance=tolerance,
                )
            )
    return figures


def _accuracies(row: str, report: Report) -> dict[str, float]:
    role = row if row in BASELINES else "merged"
    contenders = [contender for contender in report.contenders() if contender.role == role]
    if len(contenders) != 1:
        raise FusionBenchError(
            f"rows.{row}: the run has {len(contenders)} {role} models instead of one.",
            place=("reference",),
        )
    results = report.results(contenders[0])
    return {task: result.main.value for task, result in results.items()}


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # no −0.0


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.found:.1f} ({_signed(figure.difference)}){'' if figure.passed else ' !'}"
