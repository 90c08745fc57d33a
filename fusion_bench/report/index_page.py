"""The page of all results below a folder."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fusion_bench.problems import ConfigError
from fusion_bench.report.figures import sentence_case
from fusion_bench.report.index import Index, IndexedRun, Z
from fusion_bench.report.leaderboard import UNRANKED, Line, Standings
from fusion_bench.report.leaderboard_files import table_tasks
from fusion_bench.report.page import render
from fusion_bench.report.schema import NORMALIZED, MetricInfo
from fusion_bench.shown import visible
from fusion_bench.storage import write_bytes

#: What a page of ours has near its begin.
_OWN = b'<meta name="generator" content="fusion_bench index">'
#: A table has so many columns of tasks, a picture so many of the best, the page so many pictures.
_COLUMNS, _PICTURED, _PICTURES = 40, 20, 2
#: Figures beyond are no part of a picture.
_LARGEST = 1e9
#: Letters of a text that is shown; a longer one is cut.
_LONGEST = 300
#: A path that is text to ``compare``, too: no option and no interpolation.
_PLAIN = re.compile(r"(?!-)[\w.,=/@+:()\[\] -]+")


def save(index: Index, file: Path, *, overwrite: bool = False) -> None:
    """Write the page.

    Args:
        index: the results.
        file: the page; its links are relative to it.
        overwrite: replace a file that is not such a page.

    Raises:
        ConfigError: there is such a file.
    """
    check_free(file, overwrite=overwrite)
    # A name of the file system need not be Unicode.
    write_bytes(file, page(index, file).encode(errors="replace"))


def check_free(file: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that exists and is not such a page.

    Raises:
        ConfigError: it is one.
    """
    if file.is_dir():
        raise ConfigError(f"'{file}' is a folder.", "Name a file with --out.")
    if overwrite or not file.exists():
        return
    with file.open("rb") as content:
        begin = content.read(2**17)
    if _OWN not in begin:
        raise ConfigError(
            f"'{file}' exists and was not written by 'fusion_bench index'.",
            "Choose another file with --out, or add --overwrite to replace it.",
        )


def page(index: Index, file: Path) -> str:
    """Return the page as one HTML file.

    Args:
        index: the results.
        file: where it will be; links are relative to it.
    """
    links = _Links(file.parent)
    runs = {str(run.directory): _Row.of(n, run, links) for n, run in enumerate(index.runs)}
    tables: list[_Table] = []
    for standings, ordered, facts in index.tables():
        rows = [runs[str(run.directory)] for run in ordered]
        for row in rows:
            row.table = len(tables)
        pictured = len(rows) > 1 and sum(table.picture is not None for table in tables) < _PICTURES
        picture = _picture(standings, rows) if pictured else None
        tables.append(_Table(standings, rows, facts, picture))
    values = {
        "folder": index.folder.absolute().name or str(index.folder),
        "index": index,
        "rows": list(runs.values()),
        "tables": tables,
        "methods": sorted({run.method for run in index.runs}),
        "collections": [
            (found, links.to(found.page), links.name(found.page.parent))
            for found in index.collections
        ],
        "unreadable": [(links.name(found.path), found.reason) for found in index.unreadable],
        "brief": brief,
        "broken": _broken,
    }
    return render("index.html.j2", values)


def brief(text: str, longest: int = _LONGEST) -> str:
    """Return a text without control characters, cut if it is too long for a table."""
    text = visible(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _broken(name: str) -> Any:
    """Return an escaped path that may break between its words."""
    from markupsafe import Markup, escape

    return Markup(re.sub("([/,_])", r"\1<wbr>", str(escape(brief(name)))))


@dataclass
class _Row:
    """A run, and where its page is.

    ``table`` is the number of its table; ``path`` the folder as a shell takes it, empty for odd
    names.
    """

    number: int
    run: IndexedRun
    name: str
    link: str | None
    path: str
    table: int | None = None

    @classmethod
    def of(cls, number: int, run: IndexedRun, links: "_Links") -> "_Row":
        """Return a run with its links."""
        name = links.name(run.directory)
        path = shlex.quote(name) if _PLAIN.fullmatch(name) else ""
        return cls(number, run, name, links.to(run.directory / "report.html"), path)

    @property
    def settings(self) -> str:
        """The method's options on one line, without those that are not given."""
        options = self.run.options.items()
        given = [f"{key}={brief(value, 60)}" for key, value in options if value != "null"]
        return brief(", ".join(given))


@dataclass(frozen=True)
class _Table:
    """Ranks of comparable runs, with a picture of the first ones."""

    standings: Standings
    rows: Sequence[_Row]
    facts: Mapping[str, str]
    picture: Any
    pictured: int = _PICTURED

    @property
    def title(self) -> str:
        """What the runs were evaluated on."""
        tasks = self.standings.tasks
        number = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
        return f"{number}: {', '.join(tasks)}"

    @property
    def columns(self) -> list[tuple[str, MetricInfo, str]]:
        """The first tasks: their name, main metric and header."""
        headers = table_tasks(self.standings)
        found = zip(self.standings.metrics.items(), headers, strict=True)
        return [(task, metric, header) for (task, metric), header in found][:_COLUMNS]

    @property
    def ranked(self) -> bool:
        """Whether there are ranks."""
        return self.standings.ranked_by != UNRANKED

    @property
    def lower(self) -> bool:
        """Whether the lowest value is the best."""
        common = self.standings.common
        by_value = common is not None and self.standings.ranked_by != NORMALIZED
        return by_value and common is not None and not common.higher_is_better

    @property
    def lines(self) -> Iterable[tuple[Line, _Row | None]]:
        """The lines with their runs; baselines have none."""
        lines = self.standings.lines
        return zip(lines, [*self.rows, *[None] * (len(lines) - len(self.rows))], strict=True)


class _Links:
    """Names and addresses of files, relative to a page's folder."""

    def __init__(self, base: Path):
        self._base = base.absolute()

    def name(self, path: Path) -> str:
        """Return a path for people."""
        return visible(os.path.relpath(path, self._base))

    def to(self, path: Path) -> str | None:
        """Return the address of a file; none if it does not exist.

        No name makes it one of another scheme or machine: a colon is always escaped.
        """
        if not path.is_file():
            return None
        return quote(os.fsencode(os.path.relpath(path, self._base)))


def _picture(table: Standings, rows: Sequence[_Row]) -> Any:
    from markupsafe import Markup

    from fusion_bench.report.pictures import ranking

    names, values, errors = [], [], []
    for line, row in list(zip(table.lines, rows, strict=False))[:_PICTURED]:
        value, error = table.score(line), Z * (line.stderr or 0.0)
        if line.rank is not None and abs(value) + error < _LARGEST:
            names.append(f"{brief(row.run.method, 16)} {_end(row.name)}")
            values.append(value)
            errors.append(error)
    if not names:
        return None
    title = sentence_case(brief(table.label))
    return Markup(ranking(names, values, errors, title, brief(table.unit, 16)))


def _end(name: str, longest: int = 28) -> str:
    """Return the end of a path, which tells runs apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
