"""What one sees of long work: one line in a terminal, and in a log a line from time to time.

Work is a tree of steps. The outermost open one has the line, which says what is being done, how
much of it and how long it will take. A thread draws it, so that work only counts.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TextIO, TypeVar

from fusion_bench.imports import when_imported

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The unit of evaluations, which search and studies count together.
SAMPLES = "samples"
#: Seconds between two lines in a log, which never are more than 30.
EVERY = 25.0
#: Seconds between two looks at the work, in a terminal and elsewhere.
_LOOK, _LOOK_FOR_LOG = 0.2, 1.0
#: Seconds of work that nothing is shown of in a terminal.
_BRIEF = 0.3
#: Of a line where nobody knows how much fits, as in a notebook.
_COLUMNS = 100
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Step:
    """A part of the work, with others in it.

    Attributes:
        title: what is being done; empty where the steps around it say so.
        detail: what more there is to say of it.
        total: the units that there are to do; ``None`` if this is unknown.
        unit: what is counted, in the plural; ``B`` for bytes.
        done: the units that are done.
        skipped: those of them that took no time, such as results that were known.
        inner: the step in it that was opened last.
    """

    def __init__(
        self,
        title: str,
        total: float | None = None,
        unit: str = "",
        *,
        by_inner: bool = False,
        outer: "Step | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.detail = title, ""
        self.total, self.unit = total, unit
        self.done = self.skipped = 0.0
        self.inner: Step | None = None
        self.is_open = True
        self.started = clock()
        self._outer = outer
        self._by_inner = by_inner
        self._counts_for, self._scale = self._counted_outer()
        if outer is not None:
            outer.inner = self

    def _counted_outer(self) -> "tuple[Step | None, float]":
        """Return the step that this one is a part of in numbers, and its units in one of these."""
        outer = self._outer
        while outer is not None and outer.total is None:
            outer = outer._outer
        if outer is None or outer.total is None or self.total is None:
            return None, 0
        if outer.unit == self.unit:
            return outer, 1
        if outer._by_inner and self.total:
            return outer, (outer.total - outer.done) / self.total
        return None, 0

    @property
    def counts_for_outer(self) -> bool:
        """Whether what is done of it is done of a step around it, too."""
        return self._counts_for is not None

    def advance(self, amount: float = 1) -> None:
        """Count more units as done."""
        self.done += amount
        if self._counts_for is not None:
            self._counts_for.advance(amount * self._scale)

    def skip(self, amount: float) -> None:
        """Count more units as done that took no time, so that they do not make others look fast."""
        self.done += amount
        self.skipped += amount
        if self._counts_for is not None:
            self._counts_for.skip(amount * self._scale)

    def close(self, *, complete: bool) -> None:
        """End the step; what was not counted of it is done if it is ``complete``."""
        self.is_open = False
        if complete and self.total is not None and self.total > self.done:
            self.advance(self.total - self.done)
        if self._outer is not None and self._outer.inner is self:
            self._outer.inner = None

    def nearest_open(self) -> "Step | None":
        """Return this step, or the one around it that is still open."""
        found: Step | None = self
        while found is not None and not found.is_open:
            found = found._outer
        return found


@contextmanager
def step(
    title: str,
    total: float | None = None,
    unit: str = "",
    *,
    by_inner: bool = False,
    shown: bool = True,
    on_screen: bool = True,
    tell: Callable[[str], None] | None = None,
    measure: Callable[[Step], None] | None = None,
) -> Iterator[Step]:
    """Do a part of the work; a step around it counts the same units too.

    Args:
        title: what is being done.
        total: the units that there are to do.
        unit: what is counted, in the plural; ``B`` for bytes.
        by_inner: the steps in it say how much is done, whatever they count.
        shown: show it, if it is the outermost, as are the next three.
        on_screen: show it in a terminal, if there is one.
        tell: where the lines go without a terminal; by default into the log.
        measure: is called before the step is shown, to count what is done elsewhere.
    """
    global _line
    last = _current.get()
    outer = None if last is None else last.nearest_open()
    own = Step(title, total, unit, by_inner=by_inner, outer=outer)
    _current.set(own)
    line = None
    if outer is None and shown and _line is None and is_first():
        screen = Screen(sys.stderr) if on_screen and watched() else None
        line = _line = Line(own, tell or log.info, screen, measure)
        line.start()
    complete = False
    try:
        yield own
        complete = True
    finally:
        own.close(complete=complete)
        if line is not None:
            _line = None
            line.end()


def bar(
    items: Iterable[T], title: str, *, total: int | None = None, unit: str = "steps"
) -> Iterator[T]:
    """Iterate over ``items``, which are counted as done one after the other."""
    with step(title, total, unit) as work:
        for item in items:
            yield item
            work.advance()


class Line:
    """Says of a step what is being done, how much of it, and how long it will take.

    Args:
        root: the step.
        tell: is given a sentence from time to time, where there is no screen.
        screen: shows it all the time.
        measure: is called before the step is shown.
        clock: returns seconds.
    """

    def __init__(
        self,
        root: Step,
        tell: Callable[[str], None],
        screen: "Screen | None" = None,
        measure: Callable[[Step], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.screen = screen
        self._root, self._tell, self._measure, self._clock = root, tell, measure, clock
        self._begun = self._told = clock()
        self._ended = threading.Event()

    def start(self) -> None:
        """Look at the work again and again, in a thread."""
        threading.Thread(target=self._watch, daemon=True, name="progress").start()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_FOR_LOG if self.screen is None else _LOOK):
            self.look()

    def look(self) -> None:
        """Show how far the work is, if it is time to."""
        now = self._clock()
        if self.screen is None:
            if now - self._told >= EVERY:
                self._told = now
                self._tell(self.sentence())
        elif now - self._begun >= _BRIEF and (text := self._text(self.screen)):
            with self.screen.lock:
                if not self._ended.is_set():
                    self.screen.show(text)

    def stop(self) -> None:
        """Show nothing more; what is on the screen stays there."""
        self._ended.set()

    def end(self) -> None:
        """Show nothing more, and remove what is on the screen."""
        self._ended.set()
        if self.screen is not None:
            with self.screen.lock:
                self.screen.show("")

    def forget(self) -> None:
        """Show nothing more, in the fork of a process that does."""
        self._ended.set()
        self.screen = None  # its lock may be held by a thread that is not here

    def sentence(self) -> str:
        """Return how far the work is, for a log."""
        steps = self._steps()
        counted = _counted(steps)
        if counted is None or not counted.total:
            return f"{_titles(steps)}: for {duration(self._clock() - self._begun)} so far."
        percent = f"{int(100 * _share(counted))} %"
        facts = [_amount(counted, counted.total), percent]
        if (left := self._left(counted, counted.total)) is not None:
            facts.append(f"about {left} left")
        return f"{_titles(steps)}: {', '.join(facts)}."

    def _text(self, screen: "Screen") -> str:
        """Return how far the work is, for a line of the screen; nothing if nobody knows."""
        from tqdm import tqdm

        steps = self._steps()
        counted = _counted(steps)
        if counted is None or not counted.total:
            return ""
        facts, left = _amount(counted, counted.total), self._left(counted, counted.total)
        facts = facts if left is None else f"{left} left, {facts}"
        text: str = tqdm.format_meter(
            _share(counted),
            1,
            0,
            ncols=screen.columns,
            prefix=f"{facts}: {_titles(steps)}",
            ascii=not screen.has_blocks,
            bar_format="{percentage:3.0f}%|{bar:12}| {desc}",
        )
        return text

    def _steps(self) -> list[Step]:
        """Return the open steps, the outermost first."""
        if self._measure is not None:
            self._measure(self._root)
        found: list[Step] = []
        each: Step | None = self._root
        while each is not None:
            found.append(each)
            each = each.inner
        return found

    def _left(self, counted: Step, total: float) -> str | None:
        """Return the time that is left, if there is anything to tell it by."""
        elapsed, worked = self._clock() - counted.started, counted.done - counted.skipped
        if worked <= 0 or elapsed < 1:
            return None
        return duration(elapsed * max(total - counted.done, 0) / worked)


class Screen:
    """The last line of a terminal. What else is written there goes above it.

    Args:
        stream: writes to the terminal.

    Attributes:
        lock: held while anything is written.
    """

    def __init__(self, stream: TextIO):
        self.lock = threading.RLock()
        self.has_blocks = "utf" in (stream.encoding or "").lower()
        self._stream = stream
        self._shown, self._width = "", 0
        self._at_margin = True
        self._showing = False

    @property
    def columns(self) -> int:
        """How much fits into the line."""
        with suppress(OSError, ValueError):
            return os.get_terminal_size(self._stream.fileno()).columns - 1
        return _COLUMNS

    def show(self, text: str) -> None:
        """Replace what is shown, unless somebody else is in the middle of a line."""
        from tqdm.utils import disp_len

        if not self._at_margin or text == self._shown:
            return
        width = disp_len(text)
        self._showing = True
        try:
            with suppress(OSError, ValueError):  # a terminal that is gone
                self._stream.write("\r" + text + " " * (self._width - width))
                if not text:
                    self._stream.write("\r")
                self._stream.flush()
        finally:
            self._showing = False
        self._shown, self._width = text, width

    @contextmanager
    def above(self, text: str) -> Iterator[None]:
        """Remove the line while something else is written."""
        with self.lock:
            if not self._showing and text:
                self.show("")
                self._at_margin = text.endswith("\n")
            yield


_current: ContextVar[Step | None] = ContextVar("step", default=None)
#: The one that has the terminal, or the log.
_line: Line | None = None
#: What is said about the work when it is interrupted, the outermost first.
_kept: list[Callable[[], str]] = []


def above(text: str) -> AbstractContextManager[None]:
    """Remove the line while ``text`` is written to the terminal."""
    screen = None if _line is None else _line.screen
    return nullcontext() if screen is None else screen.above(text)


@contextmanager
def kept(tell: Callable[[], str]) -> Iterator[None]:
    """Do work of which something is kept when it is interrupted.

    Args:
        tell: returns what is kept, and how to go on, in a sentence or two.
    """
    _kept.append(tell)
    try:
        yield
    finally:
        _kept.remove(tell)


def hide() -> None:
    """Show nothing more of the work that is open."""
    if _line is not None:
        _line.end()


def farewell() -> str:
    """Return what is kept of the work that is being interrupted; nothing more is shown of it."""
    if _line is not None:
        _line.stop()
    return _kept[0]() if _kept and is_first() else ""


def is_first() -> bool:
    """Return whether this is the first process of the machine's."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def watched() -> bool:
    """Return whether to show progress: in a terminal or notebook, in the first process."""
    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return is_first() and (notebook or sys.stderr.isatty())


def duration(seconds: float) -> str:
    """Return a time in words, in two units at most."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _titles(steps: Sequence[Step]) -> str:
    """Return what is being done; where the outermost cannot count a step in it, with its share."""
    counted, said = _counted(steps), []
    for each in steps:
        apart = each.total and each is not counted and not each.counts_for_outer
        said.append(", ".join(filter(None, (each.title, each.detail))))
        said.append(f"{int(100 * _share(each))} %" if apart else "")
    return ": ".join(filter(None, said))


def _counted(steps: Sequence[Step]) -> Step | None:
    """Return the outermost step whose size is known."""
    return next((each for each in steps if each.total), None)


def _share(counted: Step) -> float:
    return min(counted.done / counted.total, 1.0) if counted.total else 0.0


def _amount(counted: Step, total: float) -> str:
    done = min(counted.done, total)
    if counted.unit != "B":
        return f"{int(done):,} of {int(total):,} {counted.unit}".rstrip()
    size, name = next((own for own in _SIZES if total >= own[0]), _SIZES[-1])
    return f"{done / size:.1f} of {total / size:.1f} {name}"


def _forget() -> None:
    if _line is not None:
        _line.forget()


os.register_at_fork(after_in_child=_forget)


def quiet_libraries() -> None:
    """Silence the libraries' bars without a terminal, and their advice always.

    Libraries that are not imported yet are silenced when they are.
    """
    when_imported("datasets", _quiet_datasets)
    when_imported("huggingface_hub", _quiet_hub)
    when_imported("transformers", _quiet_transformers)
    for name in ("httpx2", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _quiet_datasets() -> None:
    import datasets

    if not watched():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def _quiet_hub() -> None:
    import huggingface_hub.utils

    if not watched():
        huggingface_hub.utils.disable_progress_bars()


def _quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
