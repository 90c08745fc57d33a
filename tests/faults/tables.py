"""What the page on reliability shows: tables of what the exhaustive tests have found."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMAND = "pytest -m exhaustive --tables"
Row = Mapping[str, Any]


def write(rows: Iterable[tuple[str, Row]], directory: Path = RESULTS) -> None:
    """Write the table of each kind of which there are rows."""
    found: dict[str, list[Row]] = {}
    for kind, row in rows:
        found.setdefault(kind, []).append(row)
    for kind, own in found.items():
        lines = _TABLES[kind](own)
        (directory / f"faults_{kind}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _machine() -> str:
    sys.path.append(str(RESULTS.parent))
    from measure import machine

    return str(machine())


def _hostile(rows: Sequence[Row]) -> list[str]:
    from faults.hostile import cases

    order = [case.name for case in cases()]
    rows = sorted(rows, key=lambda row: order.index(row["case"]))
    refused = sum(row["refused"] for row in rows)
    return [
        f"Tried by `{COMMAND}`: {refused} of {len(rows)} refused, each with exit code 2 and one "
        "message, before anything was started, written or connected to.",
        "",
        "| what it tries | what is said |",
        "| --- | --- |",
        *(f"| {_plain(row['case'])} | {_plain(_short(row['message']))} |" for row in rows),
    ]


def _short(message: str) -> str:
    first = message.removeprefix("fusion_bench: ").partition("\n")[0]
    return first if len(first) < 160 else f"{first[:157]}…"


def _plain(text: str) -> str:
    for mark in "\\`|<>_*$":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def _kills(rows: Sequence[Row]) -> list[str]:
    kills = sum(row["kills"] for row in rows)
    head = f"Measured by `{COMMAND}` on {_machine()}."
    return [head, "", *_table(rows, f"{kills} kills (SIGKILL)")]


def _fuzz(rows: Sequence[Row]) -> list[str]:
    from fixtures_fuzz import KINDS

    rows = sorted(rows, key=lambda row: list(KINDS).index(row["title"]))
    cases = sum(row["cases"] for row in rows)
    head = f"Measured by `{COMMAND}` on {_machine()}: {cases:,} cases."
    return [head, "", *_table(rows, "files")]


def _table(rows: Sequence[Row], title: str) -> list[str]:
    """Return a table whose first column is each row's ``title``."""
    columns = [key for key in rows[0] if key != "title"]
    return [
        "| " + " | ".join([title, *columns]) + " |",
        "| --- |" + " ---: |" * len(columns),
        *("| " + " | ".join(str(row[key]) for key in ("title", *columns)) + " |" for row in rows),
    ]


def _network(rows: Sequence[Row]) -> list[str]:
    from faults.network import SUBJECTS, TIMEOUT, trials

    tried = {row["fault"] for row in rows}
    faults = [fault for fault in dict.fromkeys(trial.fault for trial in trials()) if fault in tried]
    subjects = list(SUBJECTS)
    cells = {(row["fault"], row["subject"]): row for row in rows}
    lines = [
        f"Measured by `{COMMAND}` on {_machine()}: {len(rows)} trials, "
        f"{sum(row['right'] for row in rows)} as expected. Timeouts of {TIMEOUT} seconds. "
        "Seconds, in brackets, hold some waiting for the processor.",
        "",
        "| fault | " + " | ".join(subjects) + " |",
        "| --- |" + " --- |" * len(subjects),
    ]
    for fault in faults:
        own = [_cell(cells.get((fault, subject))) for subject in subjects]
        lines.append(f"| {fault} | " + " | ".join(own) + " |")
    lines += [
        "",
        "What is said, and how often:",
        "",
        "| times | exit code | line |",
        "| ---: | ---: | --- |",
    ]
    said: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["outcome"].startswith("refused"):
            key = row["outcome"].removeprefix("refused, "), row["said"].replace("|", "\\|")
            said[key] = said.get(key, 0) + 1
    return lines + [
        f"| {times} | {code} | {text} |" for (code, text), times in sorted(said.items())
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    what = "read" if row["outcome"] == "read whole" else row["outcome"]
    return f"{what} ({row['seconds']:.0f} s)"


_TABLES: Mapping[str, Callable[[Sequence[Row]], list[str]]] = {
    "hostile": _hostile,
    "kills": _kills,
    "fuzz": _fuzz,
    "network": _network,
}
