"""By how much merged models differ, task by task, for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_bench.report.schema import Difference, Report


def print_differences(report: Report, console: Console) -> None:
    """Print what each merged model has over the first, in points, with 95 % intervals.

    A column is a pair of models, so that any number of tasks fits.
    """
    pairs = report.main_comparisons()
    table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
    table.add_column("difference, points")
    for pair in pairs:
        table.add_column(Text(f"{pair.model} – {pair.other}"), justify="right")
    for task in report.tasks:
        cells = [_cell(pair.tasks.get(task)) for pair in pairs]
        table.add_row(Text(task), *cells)
    table.add_row("average", *(_cell(pair.accuracy) for pair in pairs), style="bold")
    console.print(table)


def _cell(difference: Difference | None) -> Text:
    if difference is None:
        return Text("–")
    ends = difference.estimate, difference.low, difference.high
    estimate, low, high = (f"{100 * value:+.1f}" for value in ends)
    return Text(f"{estimate}  ({low} to {high})")
