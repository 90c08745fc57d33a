"""The comparison of models, for the terminal and for Markdown."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fusion_bench.report.figures import (
    PERCENT,
    comparison_sentence,
    legend,
    metric_label,
    search_metric,
    search_sentence,
    sentence_case,
    shown,
    signed,
    task_labels,
    with_stderr,
)
from fusion_bench.report.racing import leaving
from fusion_bench.report.schema import Contender, Difference, Report, Search, Value
from fusion_bench.shown import Stream, visible

_ESCAPE = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", "*": "\\*", "`": "\\`", "[": "\\["})


@dataclass(frozen=True)
class Row:
    """A model's value of each task's main metric; ``None`` where it was not evaluated.

    ``average`` is that of the main metric, if the tasks have a common one; ``normalized`` the
    average share of the own models' values.
    """

    name: str
    cells: list[Value | None]
    average: Value | None
    normalized: float | None


def comparison(report: Report) -> list[Row]:
    """Return a row for each of the report's contenders."""
    return [_row(contender, report) for contender in report.contenders()]


def _row(contender: Contender, report: Report) -> Row:
    results = report.results(contender)
    average = report.average(contender)
    return Row(
        contender.name,
        [results[task].main if task in results else None for task in report.tasks],
        None if average is None else average.main,
        average.normalized if average else None,
    )


def _grid(report: Report, *, errors: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows; with ``errors`` each value has its standard error."""
    units = [info.main_metric.unit for info in report.tasks.values()]
    common = report.main_metric
    header = ["model" if common is None else metric_label(common), *task_labels(report)]
    header += ([] if common is None else ["average"]) + ["normalised"]

    def cell(value: Value | None, unit: str) -> str:
        if value is None:
            return shown(None)
        return with_stderr(value.value, value.stderr if errors else None, unit)

    body = []
    for row in comparison(report):
        cells = [cell(value, unit) for value, unit in zip(row.cells, units, strict=True)]
        if common is not None:
            cells.append(cell(row.average, common.unit))
        body.append([row.name, *cells, shown(row.normalized)])
    return header, body


def print_comparison(report: Report, console: Console) -> None:
    """Print the comparison; tasks become rows if they do not fit as columns."""
    table = rich_table(*_grid(report), bold_last=True)
    if table_width(table, console) > console.width:
        header, body = _grid(report)
        first, *others = zip(header, *body, strict=True)
        table = rich_table(list(first), [list(line) for line in others])
    console.print(table)


def table_width(table: Table, console: Console) -> int:
    """Return the full width of a table in characters."""
    unlimited = console.options.update(max_width=10_000)
    return Measurement.get(console, unlimited, table).maximum


def rich_table(
    header: list[str], body: list[list[str]], *, left: int = 1, bold_last: bool = False
) -> Table:
    """Return a table for the terminal; all columns except the first are right-aligned."""
    table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(
            Text(visible(name)), justify="left" if index < left else "right", no_wrap=True
        )
    for line in body:
        merged = bold_last and line is body[-1]
        table.add_row(*(Text(visible(cell)) for cell in line), style="bold" if merged else None)
    return table


def markdown_table(header: list[str], body: list[list[str]], *, left: int = 1) -> list[str]:
    """Return a table's lines; all columns except the first ones are right-aligned."""
    rows = [header, ["---"] * left + ["---:"] * (len(header) - left), *body]
    return ["| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows]


def markdown_text(text: str) -> str:
    """Return a name escaped for Markdown, on one line."""
    return visible(text).translate(_ESCAPE)


def markdown(report: Report) -> str:
    """Return the report as a Markdown page: the run and the comparison."""
    lines = ["# Fusion report", ""]
    runs = compared_runs(report)
    if runs:
        lines += [f"- runs: {markdown_text(', '.join(runs))}"]
    elif method := method_name(report):
        lines += [f"- method: `{method}`"]
    lines += [
        f"- models: {markdown_text(', '.join(sources(report) or report.models))}",
        f"- device: {report.run.device}, precision {report.run.precision}, "
        f"{report.run.world_size} process(es), seed {report.run.seed}",
        f"- seconds: load {report.run.seconds.load:.1f}, fuse {report.run.seconds.fuse:.1f}, "
        f"evaluate {report.run.seconds.evaluate:.1f}, total {report.run.seconds.total:.1f}",
        f"- fusion_bench {report.run.version}, {report.run.created_at}",
        "",
    ]
    if report.run.tuning is not None:
        lines[-1:] = [f"- {report.run.tuning.sentence()}", ""]
    if report.run.search is not None:
        lines[-1:] = [f"- search: {markdown_text(search_sentence(report.run.search))}", ""]
    if report.run.search is not None:
        lines += [*markdown_table(*settings(report.run.search)), ""]
    lines += [f"{markdown_text(note)}\n" for note in report.run.notes]
    if report.run.config.get("fast_dev_run"):
        lines += ["Only the first batch of each task was evaluated (`fast_dev_run`).", ""]
    if not report.tasks:
        return "\n".join([*lines, "Nothing was evaluated."]) + "\n"
    lines += results(report)
    if runs:
        lines += ["", *markdown_table(*differences(report))]
    return "\n".join(lines) + "\n"


def results(report: Report) -> list[str]:
    """Return the lines of the comparison in Markdown, and what they mean."""
    lines = markdown_table(*_grid(report, errors=True))
    common = report.main_metric
    label = "Value" if common is None else sentence_case(common.label)
    lines += ["", f"{label} ± its standard error. Normalised: the value divided by that of the"]
    lines += ["task's own model, or this by the value where lower is better."]
    if arrow := legend(info.main_metric for info in report.tasks.values()):
        lines += ["", f"{arrow}."]
    return lines + [
        f"\n{markdown_text(comparison_sentence(report, c))}" for c in report.main_comparisons()
    ]


def settings(search: Search) -> tuple[list[str], list[list[str]]]:
    """Return the score of each setting of a search; the winner is marked."""
    unit = f", {search.unit}" if search.unit else ""
    arrow = "" if search.higher_is_better else " ↓"
    header = ["setting", f"{search_metric(search)} on the {search.split} split{unit}{arrow}"]
    rows = [
        [
            candidate.text() + (" (chosen)" if place == search.winner else ""),
            with_stderr(candidate.score, candidate.score_stderr, search.unit),
        ]
        for place, candidate in enumerate(search.candidates)
    ]
    if search.race is not None:
        header += ["samples", "end"]
        for row, candidate in zip(rows, search.candidates, strict=True):
            row += [f"{candidate.num_samples:,}", leaving(search, candidate)]
    return header, rows


def differences(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return each merged model's difference to the first for each task; fractions in points.

    Each column is a pair of models, so any number of tasks fits.
    """
    pairs = report.main_comparisons()
    common = report.main_metric
    units = [info.main_metric.unit for info in report.tasks.values()]
    points = "points" if set(units) == {PERCENT} else common.unit if common else ""
    corner = f"difference, {points}" if points else "difference"
    header = [corner, *(f"{pair.of} – {pair.beside}" for pair in pairs)]
    body = [
        [label, *(_interval(pair.on(task), unit) for pair in pairs)]
        for label, task, unit in zip(task_labels(report), report.tasks, units, strict=True)
    ]
    last = "average" if common else "normalised average, points"
    unit = common.unit if common else PERCENT
    return header, [*body, [last, *(_interval(pair.average, unit) for pair in pairs)]]


def _interval(difference: Difference | None, unit: str) -> str:
    if difference is None:
        return "–"
    ends = difference.difference, difference.low, difference.high
    estimate, low, high = (signed(value, unit) for value in ends)
    return f"{estimate}  ({low} to {high})"


def print_differences(report: Report, console: Console) -> None:
    """Print ``differences``."""
    console.print(rich_table(*differences(report), bold_last=True))


def method_name(report: Report) -> str:
    """Return the method's name, of its config or else of its class; empty if nothing was merged."""
    node = report.run.config.get("method")
    if node is None:
        return ""
    if report.run.method is not None:
        return report.run.method
    target = node.get("_target_") if isinstance(node, dict) else node
    return str(target).rpartition(".")[2]


def compared_runs(report: Report) -> dict[str, Any]:
    """Return the compared runs and their paths; empty for an ordinary run."""
    runs = report.run.config.get("reports")
    return dict(runs) if isinstance(runs, dict) else {}


def sources(report: Report) -> dict[str, Any]:
    """Return the pool's models and their sources in the config."""
    pool = report.run.config.get("modelpool")
    models = pool.get("models") if isinstance(pool, dict) else None
    return dict(models) if isinstance(models, dict) else {}


class _PlainConsole(Console):
    """Prints tables in colour, with plain text in the cells."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable."""
        for segment in super().render(renderable, options):
            plain = segment if segment.control else Segment(visible(segment.text), segment.style)
            yield plain


def wide_console() -> Console:
    """Return the console for tables; a log or a pipe has no fixed width."""
    stream = sys.stdout
    console = _PlainConsole(file=stream.coloured if isinstance(stream, Stream) else None)
    if not console.is_terminal:
        console.width = 200
    return console
