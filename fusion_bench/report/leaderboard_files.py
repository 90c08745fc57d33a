"""Writes a leaderboard as page, Markdown, CSV, TeX, JSON and on the terminal."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fusion_bench.report.figures import metric_label, sentence_case, shown, with_stderr
from fusion_bench.report.leaderboard import Leaderboard, Line, Standings
from fusion_bench.report.page import render
from fusion_bench.report.schema import Value
from fusion_bench.report.table import (
    markdown_table,
    markdown_text,
    rich_table,
    table_width,
)
from fusion_bench.storage import write_text

#: Half of a 95 % interval, in standard errors.
_Z = 1.96
#: A picture shows so many of the best, or so many curves.
_SHOWN, _CURVES = 40, 3
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "–": "--",
        "±": r"\textpm{}",
        "↓": r"$\downarrow$",
        "∞": r"$\infty$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def save(board: Leaderboard, directory: Path) -> None:
    """Write ``leaderboard.{html,md,csv,tex,json}``."""
    contents = {
        "html": page(board),
        "md": markdown(board),
        "csv": table_of_values(board),
        "tex": tex(board),
        "json": board.model_dump_json(indent=2) + "\n",
    }
    for suffix, content in contents.items():
        write_text(directory / f"leaderboard.{suffix}", content)


def page(board: Leaderboard) -> str:
    """Return the leaderboard as one HTML file."""
    pictures = [(table, _picture(table)) for table in board.tables]
    values = {"board": board, "shown": pictures, "table_tasks": table_tasks}
    return render("leaderboard.html.j2", values)


def markdown(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown."""
    lines = ["# Leaderboard", "", markdown_text(board.name), ""]
    for table in board.tables:
        if table.facts:
            lines += [f"{key}: {markdown_text(value)}  " for key, value in table.facts.items()]
            lines += [""]
        lines += [*markdown_table(*_grid(table, errors=True), left=2), "", table.sentence(), ""]
    if board.failures:
        lines += ["## Failed", ""]
        lines += [f"- {markdown_text(f.name)}: {markdown_text(f.message)}" for f in board.failures]
    return "\n".join(lines).rstrip() + "\n"


def table_of_values(board: Leaderboard) -> str:
    """Return all lines of all tables as CSV; ``%`` are fractions, those missing are empty.

    The columns of averages bear the metric's name, if all tasks have the same.
    """
    tasks = list(dict.fromkeys(task for table in board.tables for task in table.tasks))
    commons = [table.common for table in board.tables]
    names = {None if common is None else common.name for common in commons}
    main = next(iter(names)) if len(names) == 1 else None
    averages = [f"normalized_{main or 'value'}", main or "average", f"{main or 'average'}_stderr"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["table", "rank", "name", "role", "directory"]
    columns = [column for task in tasks for column in (task, f"{task} stderr")]
    writer.writerow([*head, *map(_no_formula, [*averages, *columns]), "error"])
    for number, table in enumerate(board.tables, start=1):
        for line in table.lines:
            own = [line.normalized, *_both(line.average)]
            for task in tasks:
                own += _both(line.tasks.get(task))
            texts = map(_no_formula, (line.name, line.role, line.directory))
            writer.writerow([number, line.rank, *texts, *own, None])
    for failure in board.failures:
        texts = map(_no_formula, (failure.name, "", failure.directory))
        blank = [None] * (3 + len(columns))
        writer.writerow([None, None, *texts, *blank, _no_formula(failure.message)])
    return file.getvalue()


def _both(value: Value | None) -> list[float | None]:
    return [None, None] if value is None else [value.value, value.stderr]


def tex(board: Leaderboard) -> str:
    """Return the tables for a paper, for ``input`` with the package ``booktabs``."""
    parts = [r"% \usepackage{booktabs}"]
    parts += [f"% failed: {' '.join(f.name.split())}" for f in board.failures]
    for table in board.tables:
        header, body = _grid(table, errors=True)
        parts += [
            "% " + " ".join(line.split())
            for line in (table.sentence(), *(f"{k}: {v}" for k, v in table.facts.items()))
        ]
        ranked = sum(line.rank is not None for line in table.lines)
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in body]
        if ranked < len(rows):
            rows.insert(ranked, r"\midrule")
        parts += [
            rf"\begin{{tabular}}{{rl{'r' * (len(header) - 2)}}}",
            r"\toprule",
            " & ".join(map(_tex, header)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    return "\n".join(parts) + "\n"


def print_leaderboard(board: Leaderboard, console: Console) -> None:
    """Print the leaderboard, without tasks that do not fit."""
    for table in board.tables:
        if table.facts:
            console.print(Text("; ".join(f"{key}: {value}" for key, value in table.facts.items())))
        header, body = _grid(table)
        whole = rich_table(header, body, left=2)
        if table_width(whole, console) > console.width:
            few = len(header) - len(table.tasks)
            whole = rich_table(header[:few], [row[:few] for row in body], left=2)
        console.print(whole)
        console.print(Text(table.sentence()))
    for failure in board.failures:
        console.print(Text(f"failed: {failure.name}: {failure.message}", style="red"))


def _grid(table: Standings, *, errors: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows; with ``errors`` each value has its standard error."""

    def cell(value: Value | None, unit: str) -> str:
        if value is None:
            return shown(None)
        return with_stderr(value.value, value.stderr if errors else None, unit)

    common = table.common
    header = ["rank", "run", "normalised, %"]
    header += [] if common is None else [f"average {metric_label(common)}"]
    header += table_tasks(table)
    body = []
    for line in table.lines:
        row = ["–" if line.rank is None else str(line.rank), line.name, shown(line.normalized)]
        row += [] if common is None else [cell(line.average, common.unit)]
        row += [cell(line.tasks.get(task), m.unit) for task, m in table.metrics.items()]
        body.append(row)
    return header, body


def table_tasks(table: Standings) -> list[str]:
    """Return the headers of the tasks: with the metric where it differs, and what is held out."""
    labels = []
    for task, metric in table.metrics.items():
        label = task if table.common is not None else f"{task}: {metric_label(metric)}"
        labels.append(f"{label} (held out)" if task in table.held_out else label)
    return labels


def _no_formula(text: str) -> str:
    """Prevent a spreadsheet from evaluating a name as a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") and text else text


def _tex(text: str) -> str:
    """Return escaped text for TeX; unsupported characters are replaced by their code point."""
    plain = "".join(
        c if c in "–↓∞" or (c.isprintable() and c <= "\u017f") else f"U+{ord(c):04X}" for c in text
    )
    return plain.translate(_TEX)


def _picture(table: Standings) -> Any:
    """Return a plot: curves if a single number was swept, otherwise a ranking."""
    from markupsafe import Markup

    from fusion_bench.report.pictures import curves, ranking

    title, unit = sentence_case(table.label), table.unit
    ranked = [line for line in table.lines if line.rank is not None]
    if not ranked:
        return None
    swept = _swept_number(table, ranked)
    if swept is not None:
        return Markup(curves(*swept, title, unit))
    best = ranked[:_SHOWN]
    values, errors = map(table.score, best), map(_half, best)
    return Markup(ranking([line.name for line in best], list(values), list(errors), title, unit))


def _swept_number(
    table: Standings, lines: Sequence[Line]
) -> tuple[str, dict[str, list[tuple[float, float, float]]]] | None:
    """Return the single swept number, and its score curves.

    A model that lacks the number is a level line.
    """
    settings = [dict(o.partition("=")[::2] for o in line.overrides) for line in lines]
    keys = {key for own in settings for key in own}
    numbers = [key for key in keys if all(_is_number(own.get(key, "0")) for own in settings)]
    if len(numbers) != 1:
        return None
    (key,) = numbers
    values = [float(own[key]) for own in settings if key in own]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for line, own in zip(lines, settings, strict=True):
        name = " ".join(f"{k}={v}" for k, v in own.items() if k != key) or "merged"
        at = [float(own[key])] if key in own else [min(values), max(values)]
        series.setdefault(name, []).extend((x, table.score(line), _half(line)) for x in at)
    distinct = all(len({x for x, _, _ in found}) == len(found) for found in series.values())
    if not distinct or len(set(values)) < 3 or len(series) > _CURVES:
        return None
    return key, series


def _half(line: Line) -> float:
    """Return half the width of a line's interval; 0 where it is not known."""
    return _Z * (line.stderr or 0.0)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
