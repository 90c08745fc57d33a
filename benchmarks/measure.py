"""What the benchmarks share: contestants take turns, and figures become tables."""

import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusion_bench.taskpool.images.pixels import PreparedImages
    from fusion_bench.taskpool.images.task import ImageTask

Times = dict[str, list[float]]
Results = dict[str, Any]


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    warm: bool = False,
) -> Times:
    """Time each contestant once a round; the first round warms up and does not count.

    A contestant that returns a float has measured its seconds itself. Where all are ``warm``
    already, the first round counts.
    """
    times: Times = {name: [] for name in contestants}
    for number in range(1 if warm else 0, rounds + 1):
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


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


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


def publish(
    results: Results,
    script: str,
    rounds: int | None,
    json_path: Path | None,
    markdown_path: Path | None,
    libraries: Sequence[str] = ("torch",),
) -> None:
    """Print the tables, and write them where asked to.

    Args:
        results: title to table; a table is row name to column name to figure.
        script: which benchmark it was.
        rounds: over how many rounds; ``None`` where that differs, or nothing was timed.
        json_path: for the figures.
        markdown_path: for a piece of a page.
        libraries: whose versions are told.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_where(libraries))
    for title, columns, rows in _tables(results):
        table = Table(title, *columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    save(results, script, rounds, json_path, markdown_path, libraries)


def save(
    results: Results,
    script: str,
    rounds: int | None,
    json_path: Path | None,
    markdown_path: Path | None,
    libraries: Sequence[str] = ("torch",),
) -> None:
    """Write the tables, with arguments as ``publish`` has them."""
    where = _where(libraries)
    if json_path:
        content = {"machine": where, "rounds": rounds, **results}
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if markdown_path:
        medians = "" if rounds is None else f"; medians of {rounds} rounds"
        lines = [f"Measured by `benchmarks/{script}` on {where}{medians}."]
        for title, columns, rows in _tables(results):
            lines += ["", "| " + " | ".join([title, *columns]) + " |"]
            lines += ["| --- |" + " ---: |" * len(columns)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
        markdown_path.write_text("\n".join(lines) + "\n")


def _where(libraries: Sequence[str]) -> str:
    versions = (f"{name} {import_module(name).__version__}" for name in libraries)
    return f"{machine()}, with {', '.join(versions)}"


def _tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    for title, table in results.items():
        columns = list(next(iter(table.values())))
        yield title, columns, [[row, *map(str, cells.values())] for row, cells in table.items()]


def prepared(task: "ImageTask") -> "PreparedImages":
    """Return a task's images as models take them, kept as its own evaluation keeps them."""
    from fusion_bench.taskpool.images.pixels import PreparedImages
    from fusion_bench.taskpool.images.task import cache_bytes

    return PreparedImages(task.images, task.preprocessor, cache_bytes("50GB"))
