"""What the benchmarks share: contestants take turns, and figures become tables."""

import argparse
import compileall
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusion_bench
from fusion_bench.storage import write_text

if TYPE_CHECKING:
    from fusion_bench.taskpool.images.pixels import PreparedImages
    from fusion_bench.taskpool.images.task import ImageTask

Times = dict[str, list[float]]
Row = dict[str, Any]
Results = dict[str, dict[str, Row]]
ROOT = Path(__file__).parents[1]
#: Files that decide what is measured; among them are not those that benchmarks write.
DECIDING = ("fusion_bench", "hydra_plugins", "config", "benchmarks", ":!benchmarks/results")
#: Options that say where files are; they are not told.
PLACES = ("--json", "--markdown", "--workdir", "--work")


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    warm: bool = False,
) -> Times:
    """Time each contestant once a round; the first round warms up and does not count.

    A contestant that returns a float has measured its seconds itself. Where all are ``warm``
    already, or where a single round only tries a benchmark out, the first round counts.
    """
    times: Times = {name: [] for name in contestants}
    for number in range(1 if warm or rounds == 1 else 0, rounds + 1):
        for name, work in contestants.items():
            before()
            start = time.perf_counter()
            result = work()
            seconds = result if isinstance(result, float) else time.perf_counter() - start
            del result
            if number > 0:
                times[name].append(seconds)
        print(f"round {number} of {rounds} done", file=sys.stderr)
    return times


def peak(work: Callable[[], object]) -> int:
    """Return how many bytes of anonymous memory ``work`` needs at most, beside what was there."""
    before, most, done = _anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        result = work()
        most = max(most, _anonymous())
    finally:
        done.set()
        thread.join()
    del result
    return most - before


def compile_package() -> None:
    """Compile the package, as an installer does; else each command that is typed may do it."""
    for folder in fusion_bench.__path__:
        compileall.compile_dir(folder, quiet=1)


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class CommandError(Exception):
    """A command that ended with an error; what it said last."""


def watched(command: Sequence[str], accepts: Sequence[int] = (0,)) -> tuple[float, float, str]:
    """Run a command in an empty folder.

    Args:
        command: its words.
        accepts: the exit codes that are no error.

    Returns:
        The peak of its anonymous memory and that of its children in MB, the seconds that the cores
        worked for it, and what it said.

    Raises:
        CommandError: it failed.
    """
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as output:
        with subprocess.Popen(command, cwd=place, stdout=output, stderr=output) as process:
            most = 0
            while True:
                pid, status, used = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                most = max(most, _anonymous_of_all(process.pid))
                time.sleep(0.003)
        output.seek(0)
        said = output.read().decode()
    if process.returncode not in accepts:
        raise CommandError(said.strip().rpartition("\n")[2])
    return most / 1e6, used.ru_utime + used.ru_stime, said


def _anonymous_of_all(process: int) -> int:
    """Return the bytes of anonymous memory that a process and its children have now."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = status.partition("RssAnon:")[2].split()
    own = int(found[0]) * 1024 if found else 0
    return own + sum(_anonymous_of_all(int(child)) for child in children)


def ratio(times: Times, name: str, to: str) -> float:
    """Return the median over the rounds of one contestant's time divided by another's."""
    pairs = zip(times[name], times[to], strict=True)
    return round(statistics.median(one / other for one, other in pairs), 2)


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, fastest and slowest."""
    return {
        "seconds": round(statistics.median(seconds), 3),
        "fastest": round(min(seconds), 3),
        "slowest": round(max(seconds), 3),
    }


def machine() -> str:
    """Return what this machine is, in words."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB{device}"


def parser(
    description: str | None, *, rounds: bool = True, workdir: bool = False
) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks take; the description's first line is shown."""
    made = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], allow_abbrev=False
    )
    made.add_argument("--json", type=Path, help="where the figures go; those there are kept")
    made.add_argument("--markdown", type=Path, help="where the tables go as Markdown")
    made.add_argument("--small", action="store_true", help="cut down, to try it out")
    if rounds:
        made.add_argument("--rounds", type=int)
    if workdir:
        made.add_argument("--workdir", type=Path, help="where the files go; they stay there")
    return made


def rounds_of(arguments: argparse.Namespace, usual: int) -> int:
    """Return how many rounds are wanted: as said, or one of a small benchmark."""
    wanted: int | None = arguments.rounds
    return wanted or (1 if arguments.small else usual)


class Record:
    """The tables of a benchmark, written after each row, so that a run that is stopped goes on.

    Args:
        arguments: the parsed ones; ``--json`` and ``--markdown`` say where the tables go. What the
            file of ``--json`` has is kept, with the command and commit that it is from.
        rounds: of which the figures are medians; ``None`` where that differs, or nothing is timed.
        libraries: whose versions are told.

    Attributes:
        tables: title to table; a table is row name to column name to figure.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        rounds: int | None = None,
        libraries: Sequence[str] = ("torch",),
    ):
        self._json, self._markdown = arguments.json, arguments.markdown
        self._settings = {"rounds": rounds, "small": arguments.small}
        self._made, self._own = list[str](), made(libraries)
        self.tables: Results = {}
        if self._json and self._json.exists():
            self._resume(json.loads(self._json.read_text()))

    def _resume(self, known: dict[str, Any]) -> None:
        self.tables = {title: table for title, table in known.items() if isinstance(table, dict)}
        if not self.tables:
            return
        for name, mine in self._settings.items():
            if known.get(name, mine) != mine:
                raise SystemExit(
                    f"'{self._json}' is of a run with {name}={known[name]}, this one has "
                    f"{name}={mine}. Choose another file for --json, or remove that one."
                )
        unknown = f"a command and commit that were not noted, on {known.get('machine')}"
        self._made = known.get("made", [unknown])

    def has(self, title: str, name: str) -> bool:
        """Return whether a row is there already."""
        return name in self.tables.get(title, {})

    def row(self, title: str, name: str, figures: Row) -> None:
        """Add a row, show it, and write all that there are."""
        self.tables.setdefault(title, {})[name] = figures
        print(f"{title}: {name} {json.dumps(figures)}", file=sys.stderr, flush=True)
        self.save()

    def table(self, title: str, measure: Callable[[], dict[str, Row]]) -> None:
        """Measure the rows of a table that take turns, unless it is there."""
        if title not in self.tables:
            self.tables[title] = measure()
            print(f"{title}: {json.dumps(self.tables[title])}", file=sys.stderr, flush=True)
            self.save()

    def save(self) -> None:
        """Write the tables, of which some are new."""
        if self._own not in self._made:
            self._made.append(self._own)
        self._write()

    def show(self) -> None:
        """Print the tables, and write them once more."""
        if not self.tables:
            return
        self._write()
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(self._head(), markup=False)
        for title, columns, rows in _tables(self.tables):
            table = Table(title, *columns)
            for row in rows:
                table.add_row(*row)
            console.print(table)

    def _write(self) -> None:
        if self._json:
            content = {"made": self._made, **self._settings, **self.tables}
            write_text(self._json, json.dumps(content, indent=2) + "\n")
        if self._markdown:
            write_text(self._markdown, "\n".join(self._lines()) + "\n")

    def _head(self) -> str:
        rounds = self._settings["rounds"]
        said = {None: "", 1: "; one round"}.get(rounds, f"; medians of {rounds} rounds")
        return f"Measured by {', and by '.join(self._made)}{said}."

    def _lines(self) -> Iterator[str]:
        yield self._head()
        for title, columns, rows in _tables(self.tables):
            yield ""
            yield "| " + " | ".join([title, *columns]) + " |"
            yield "| --- |" + " ---: |" * len(columns)
            yield from ("| " + " | ".join(row) + " |" for row in rows)


def made(libraries: Sequence[str]) -> str:
    """Return what makes a table: the command, the commit, the machine and some versions."""
    versions = (f"{name} {import_module(name).__version__}" for name in libraries)
    return f"`{command()}` at {commit()} on {machine()}, with {', '.join(versions)}"


def command() -> str:
    """Return the command as it was typed, without paths of this machine."""
    script, *rest = sys.argv
    words = [f"benchmarks/{Path(script).name}"]
    given = iter(rest)
    for word in given:
        option, equals, value = word.partition("=")
        if option in PLACES:
            if not equals:
                next(given, None)
        elif equals and _is_path(value):
            words.append(f"{option}=…")
        else:
            words.append("…" if _is_path(word) else word)
    return " ".join(["python", *(word if "…" in word else shlex.quote(word) for word in words)])


def _is_path(word: str) -> bool:
    return word.startswith(("/", "~")) or ("/" in word and Path(word).exists())


@cache
def commit() -> str:
    """Return the commit of this checkout, with ``+`` if it was changed; else the version."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        own = Path(git("rev-parse", "--show-toplevel")) == ROOT.resolve()
        known = git("rev-parse", "--short", "HEAD") if own else ""
        changed = git("status", "--porcelain", "--", *DECIDING) if own else ""
    except (OSError, subprocess.CalledProcessError):
        known = changed = ""
    if not known:
        return f"version {version('fusion_bench')}"
    return f"commit `{known}{'+' if changed else ''}`"


def publish(
    results: Results,
    script: str,
    rounds: int | None,
    json_path: Path | None,
    markdown_path: Path | None,
    libraries: Sequence[str] = ("torch",),
) -> None:
    """Print tables that are made at once, and write them where asked to."""
    given = argparse.Namespace(json=json_path, markdown=markdown_path, small=False)
    record = Record(given, rounds, libraries)
    record.tables = results
    record.save()
    record.show()


def _tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    for title, table in results.items():
        columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
        rows = [
            [row, *(str(cells.get(column, "–")) for column in columns)]
            for row, cells in table.items()
        ]
        yield title, columns, rows


def same(one: str, ours: Mapping[str, Tensor], other: str, theirs: Mapping[str, Tensor]) -> None:
    """Refuse to compare times where results differ by more than two roundings of their type.

    Raises:
        SystemExit: it names both, and the first entry that differs.
    """
    if sorted(ours) != sorted(theirs):
        key = min(set(ours) ^ set(theirs))
        raise SystemExit(f"'{one}' and '{other}' differ: '{key}' is in one of them only.")
    for key in ours:
        mine, its = ours[key], theirs[key]
        if mine.shape != its.shape:
            raise SystemExit(f"'{one}' and '{other}' differ: '{key}' has other shapes.")
        step = max(torch.finfo(mine.dtype).eps, torch.finfo(its.dtype).eps)
        sums = 4 * torch.finfo(torch.float32).eps * float(its.abs().max())
        if not torch.allclose(mine.float(), its.float(), 2 * step, sums):
            apart = float((mine.float() - its.float()).abs().max())
            raise SystemExit(
                f"'{one}' and '{other}' differ by up to {apart:.1e} in '{key}': their times are "
                "not compared."
            )


@contextmanager
def own_cache(place: Path) -> Iterator[None]:
    """Have the program keep what it keeps in another place."""
    before = os.environ.get("FUSION_BENCH_CACHE")
    os.environ["FUSION_BENCH_CACHE"] = str(place)
    try:
        yield
    finally:
        del os.environ["FUSION_BENCH_CACHE"]
        if before is not None:
            os.environ["FUSION_BENCH_CACHE"] = before


def prepared(task: "ImageTask") -> "PreparedImages":
    """Return a task's images as models take them, kept as its own evaluation keeps them."""
    from fusion_bench.taskpool.images.pixels import PreparedImages
    from fusion_bench.taskpool.images.task import cache_bytes

    return PreparedImages(task.images, task.preprocessor, cache_bytes("50GB"))
