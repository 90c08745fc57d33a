"""Runs the tests in several processes, which are forked once everything is imported and collected.

To import what the tests need, to rewrite their assertions and to collect them takes a process a
quarter of a minute. So one does it, and the others are forked from it. Each takes the next file
when it is done with one, and sends its reports to the first process, which shows and counts them.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
from _pytest._io import TerminalWriter

#: The niceness of the tests. The build of the embedded models has none, and so goes first: its two
#: threads wait for each other at each step, which takes far longer on a busy machine.
LATER = 10
#: So many bytes say which file is the next. A pipe gives them whole to one of the processes.
_SIZE = 4


@dataclass
class _Worker:
    """What the first process knows of another."""

    process: int
    reports: Connection
    at: pytest.Item | None = None
    """The test that it is running."""


def run(session: pytest.Session, count: int) -> None:
    """Run the session's tests in ``count`` processes.

    Raises:
        pytest.Session.Interrupted: something asked to stop, as ``-x`` does.
    """
    files = list(_by_file(session.items).values())
    todo, asked = os.pipe()
    for number in range(len(files)):
        os.write(asked, number.to_bytes(_SIZE))
    os.close(asked)
    factory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    root = factory.getbasetemp()
    shown = session.config.pluginmanager.getplugin("terminalreporter")
    shown.showfspath = False  # as several files are in the works, there is no current one
    workers: list[_Worker] = []
    try:
        for number in range(count):
            ours, theirs = Pipe(duplex=False)
            process = os.fork()
            if not process:
                for other in (*(worker.reports for worker in workers), ours):
                    other.close()
                factory._basetemp = root / f"process-{number}"
                factory._basetemp.mkdir()
                _work(session, files, todo, theirs)
            theirs.close()
            workers.append(_Worker(process, ours))
        _listen(session, workers, {item.nodeid: item for item in session.items}, todo)
    finally:
        for worker in workers:
            if worker.reports.closed:
                continue
            os.kill(worker.process, signal.SIGINT)
        for worker in workers:
            os.waitpid(worker.process, 0)
        os.close(todo)


def _by_file(items: list[pytest.Item]) -> dict[Path | str, list[pytest.Item]]:
    """Return the tests of each file, in their order; one process has those that need a browser."""
    browser = {item.path for item in items if item.get_closest_marker("browser")}
    files: dict[Path | str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault("browser" if item.path in browser else item.path, []).append(item)
    return files


def _listen(
    session: pytest.Session, workers: list[_Worker], items: dict[str, pytest.Item], todo: int
) -> None:
    """Pass on what the others report until all have ended."""
    hook = session.config.hook
    by_reports = {worker.reports: worker for worker in workers}
    stopping = False
    while by_reports:
        for ready in wait(list(by_reports)):
            assert isinstance(ready, Connection)
            worker = by_reports[ready]
            try:
                kind, what = ready.recv()
            except EOFError:
                del by_reports[ready]
                ready.close()
                if worker.at:
                    report = _lost(worker, worker.at)
                    worker.at.ihook.pytest_runtest_logreport(report=report)
                continue
            if kind == "begun":
                worker.at = items[what]
                hook.pytest_runtest_logstart(nodeid=what, location=worker.at.location)
            elif kind == "ended":
                worker.at = None
            elif kind == "warned":
                hook.pytest_warning_recorded.call_historic(kwargs=_warning(*what))
            else:
                report = hook.pytest_report_from_serializable(config=session.config, data=what)
                items[report.nodeid].ihook.pytest_runtest_logreport(report=report)
        if (session.shouldfail or session.shouldstop) and not stopping:
            stopping = True
            while os.read(todo, _SIZE):  # nobody begins another file
                pass
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def _warning(told: str, file: str, line: int, when: str, test: str) -> dict[str, object]:
    """Return what pytest says of a warning; its category is part of what is told."""
    message = warnings.WarningMessage(Warning(told), Warning, file, line)
    return {"warning_message": message, "when": when, "nodeid": test, "location": None}


def _lost(worker: _Worker, item: pytest.Item) -> pytest.TestReport:
    """Return the report of a test whose process ended in the midst of it."""
    told = f"The process that ran {item.nodeid} ended, and with it the tests of its file."
    return pytest.TestReport(
        item.nodeid, item.location, {}, outcome="failed", longrepr=told, when="call"
    )


def _work(
    session: pytest.Session, files: list[list[pytest.Item]], todo: int, reports: Connection
) -> None:
    """Run one file after the other, and end the process."""
    status = 1
    os.nice(LATER)
    try:
        config = session.config
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # whose files are of the process that was forked
        capture.start_global_capturing()
        writer = config.get_terminal_writer()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(_Silent(writer), "terminalreporter")
        config.pluginmanager.register(_Sender(config, reports))
        items = _taken(files, todo)
        item = next(items, None)
        while item and not (session.shouldfail or session.shouldstop):
            following = next(items, None)
            reports.send(("begun", item.nodeid))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            reports.send(("ended", item.nodeid))
            item = following
        status = 0
    except BaseException:  # which the first process knows nothing of
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def _taken(files: list[list[pytest.Item]], todo: int) -> Iterator[pytest.Item]:
    while number := os.read(todo, _SIZE):
        yield from files[int.from_bytes(number)]


@dataclass(eq=False)  # as plugins are told apart by who they are
class _Silent:
    """Takes the place of what shows the results: the first process shows them."""

    _tw: TerminalWriter
    """Where pytest-timeout writes what each thread was doing."""


@dataclass(eq=False)
class _Sender:
    """Sends the results to the first process."""

    config: pytest.Config
    reports: Connection

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        to_serializable = self.config.hook.pytest_report_to_serializable
        self.reports.send(("report", to_serializable(config=self.config, report=report)))

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str
    ) -> None:
        if not nodeid:  # of before the tests, which the first process has heard itself
            return
        told = f"{warning_message.category.__name__}: {warning_message.message}"
        place = (warning_message.filename, warning_message.lineno)
        self.reports.send(("warned", (told, *place, when, nodeid)))
