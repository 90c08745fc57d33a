"""What one sees of long work, with a clock that stands still unless it is moved."""

import io
import logging
import os
import subprocess
import sys

import pytest

from fusion_bench import progress
from fusion_bench.progress import Line, Screen, Step, bar, duration, kept, step
from fusion_bench.shown import Stream


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Terminal(io.StringIO):
    """A terminal that shows what its last lines are."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("is no file")

    def rows(self) -> list[str]:
        """Return the lines as one sees them."""
        found = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for part in line.split("\r"):
                seen = part + seen[len(part) :]
            found.append(seen.rstrip())
        return found


def test_steps_count_for_those_around_them_in_the_same_unit() -> None:
    whole = Step("evaluating", 100, "samples")
    model = Step("", 40, "samples", outer=whole)
    model.advance(10)
    assert (whole.done, model.done) == (10, 10)
    tensors = Step("fusing", 500, "B", outer=whole)
    tensors.advance(500)
    tensors.close(complete=True)
    assert whole.done == 10
    model.close(complete=True)  # nobody counted the rest
    assert whole.done == 40
    Step("", 60, "samples", outer=whole).close(complete=False)  # it has failed
    assert whole.done == 40


def test_a_step_is_done_as_far_as_the_one_in_it_whatever_that_counts() -> None:
    whole = Step("evaluating", 100, "samples")
    task = Step("digits", 40, "samples", by_inner=True, outer=whole)
    loop = Step("", 8, "batches", outer=Step("", outer=task))
    loop.advance(2)
    assert (task.done, whole.done) == (10, 10)
    loop.advance(6)
    assert (task.done, whole.done) == (40, 40)


def test_what_was_known_does_not_make_the_rest_look_fast(clock: Clock) -> None:
    whole = Step("Evaluating", 100, "samples", clock=clock)
    line = Line(whole, print, clock=clock)
    whole.skip(50)
    clock.now += 10
    assert line.sentence() == "Evaluating: 50 of 100 samples, 50 %."
    whole.advance(10)
    assert line.sentence() == "Evaluating: 60 of 100 samples, 60 %, about 40 s left."


def test_a_log_has_a_line_at_least_every_half_minute(clock: Clock) -> None:
    told: list[str] = []
    whole = Step("Fusing", 3_840_000_000, "B", clock=clock)
    line = Line(whole, told.append, clock=clock)
    at = []
    for _ in range(600):  # ten minutes
        clock.now += 1
        whole.advance(3_200_000)
        before = len(told)
        line.look()
        if len(told) > before:
            at.append(clock.now)
    assert max(b - a for a, b in zip([1000.0, *at], at, strict=False)) <= 30
    assert told[0] == "Fusing: 0.1 of 3.8 GB, 2 %, about 20 min left."
    assert told[-1] == "Fusing: 1.9 of 3.8 GB, 50 %, about 10 min left."
    assert len(told) <= 25


def test_work_of_unknown_size_is_told_of_too(clock: Clock) -> None:
    told: list[str] = []
    line = Line(Step("Loading", clock=clock), told.append, clock=clock)
    clock.now += 130
    line.look()
    assert told == ["Loading: for 2 min so far."]


def test_what_is_told_names_all_that_is_open_and_counts_the_outermost(clock: Clock) -> None:
    root = Step("Searching", clock=clock)
    whole = Step("", 2000, "samples", outer=root, clock=clock)
    setting = Step("setting 3 of 12", outer=whole)
    task = Step("merged on digits", 100, "samples", by_inner=True, outer=setting)
    task.advance(100)
    whole.advance(1100)
    task.detail = "again"
    line = Line(root, print, clock=clock)
    numbers = "1,200 of 2,000 samples, 60 %."
    assert line.sentence() == f"Searching: setting 3 of 12: merged on digits, again: {numbers}"
    task.close(complete=True)
    Step("merging tensors", 4e6, "B", outer=setting).advance(1e6)  # which is no part of them
    assert line.sentence() == f"Searching: setting 3 of 12: merging tensors: 25 %: {numbers}"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5400, "1 h 30 min"),
        (3600 * 5 + 60 * 7, "5 h 7 min"),
        (3600 * 50, "2 d 2 h"),
    ],
)
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def shown_on(terminal: Terminal, clock: Clock) -> tuple[Step, Line]:
    whole = Step("Evaluating", 200, "samples", clock=clock)
    line = Line(whole, pytest.fail, Screen(terminal), clock=clock)
    return whole, line


def test_a_terminal_has_one_line_that_goes_away(clock: Clock) -> None:
    terminal = Terminal()
    whole, line = shown_on(terminal, clock)
    whole.advance(50)
    line.look()
    assert terminal.getvalue() == ""  # it may be done in no time
    clock.now += 10
    line.look()
    (row,) = terminal.rows()
    assert row == " 25%|███         | 30 s left, 50 of 200 samples: Evaluating"
    whole.title = "Yes"
    line.look()
    assert terminal.rows() == [row.replace("Evaluating", "Yes")]
    line.end()
    assert terminal.rows() == [""]
    line.look()
    assert terminal.rows() == [""]


def test_what_else_is_written_stands_above_the_line(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    raw.isatty = lambda: True  # type: ignore[method-assign]
    stream = Stream(raw, "utf-8", by_line=True)
    whole, line = shown_on(stream, clock)  # type: ignore[arg-type]
    monkeypatch.setattr(progress, "_line", line)

    def rows() -> list[str]:
        terminal = Terminal()
        terminal.write(raw.getvalue().decode())
        return terminal.rows()

    clock.now += 10
    whole.advance(100)
    line.look()
    print("a message", file=stream)
    assert rows() == ["a message", ""]
    line.look()
    assert rows()[0] == "a message" and "50%" in rows()[1]
    stream.write("half a li")
    line.look()  # not now
    assert rows() == ["a message", "half a li"]
    stream.write("ne\n")
    line.look()
    assert rows()[:2] == ["a message", "half a line"] and "50%" in rows()[2]
    handler = logging.StreamHandler(stream.coloured)
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "a record", (), None))
    assert rows()[2:] == ["a record", ""]


def test_only_the_outermost_step_of_the_first_process_has_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with step("outer"):
        first = progress._line
        assert first is not None
        with step("inner"):
            assert progress._line is first
    assert progress._line is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    with step("outer"):
        assert progress._line is None


def test_a_bar_counts_what_was_iterated_over_and_ends_where_it_is_left() -> None:
    with step("whole", 4, "things") as whole:
        for number in bar("abcd", "", total=4, unit="things"):
            if number == "c":
                break
        assert whole.done == 2
        with step("next", 2, "things") as following:
            following.advance()
        assert whole.inner is None and whole.done == 4


def test_a_forked_process_shows_nothing() -> None:
    with step("outer"):
        if (child := os.fork()) == 0:
            line = progress._line
            os._exit(0 if line is not None and line.screen is None and line._ended.is_set() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert progress._line is not None and not progress._line._ended.is_set()


def test_the_outermost_tells_what_is_kept() -> None:
    assert progress.farewell() == ""
    with kept(lambda: "2 of 3 jobs are done."), kept(lambda: "It is in the cache."):
        assert progress.farewell() == "2 of 3 jobs are done."
    assert progress.farewell() == ""


def test_importing_it_is_cheap() -> None:
    code = "import sys, fusion_bench.progress; print({'torch', 'tqdm'} & set(sys.modules))"
    done = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert done == "set()\n"


def test_a_log_is_told_of_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), step("Loading"):
        assert progress._line is not None
        progress._line._told -= 60
        progress._line.look()
    assert [record.getMessage() for record in caplog.records] == ["Loading: for 1 s so far."]
