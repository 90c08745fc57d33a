"""Ends the process soon after Ctrl-C or SIGTERM, at any moment."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

from fusion_bench.progress import farewell
from fusion_bench.shown import message

#: Seconds in which the work may be unwound, which removes what is half done. After that the process
#: ends all the same: what is half done lies aside and is removed by the next run.
PATIENCE = 0.8


class Interrupted(KeyboardInterrupt):
    """The user or the system has interrupted the process.

    Attributes:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at a signal, and end the process if it does not react in time.

    Python handles signals only between bytecode steps and waits for threads, so a long operation of
    torch or a large read would delay the end. So a thread watches the signals too. Use it once in a
    process, around all its work.
    """
    said = cache(_say_what_is_kept)  # by the one that comes first, the handler or the thread
    handled = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    noticed, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.set_wakeup_fd(notice, warn_on_full_buffer=False)
    threading.Thread(
        target=_watch, args=(noticed, handled, said), daemon=True, name="signals"
    ).start()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for each in handled:  # one is enough: what follows is not to be interrupted again
            signal.signal(each, signal.SIG_IGN)
        said()
        raise Interrupted(signum)

    def in_child() -> None:
        # A child's signals are its own; it ends at them as Python and the system have it.
        signal.set_wakeup_fd(-1)
        for each in handled:
            if signal.getsignal(each) is interrupt:
                plain = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
                signal.signal(each, plain)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, handled),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, handled),
        after_in_child=in_child,
    )
    for each in handled:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        if any(signal.getsignal(each) == signal.SIG_IGN for each in handled):  # there was one
            end_children()


def end_children() -> None:
    """Kill the ``multiprocessing`` children of this process."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)  # joblib's have no method for it


def _say_what_is_kept() -> None:
    """Tell what is kept of the work, and how to go on."""
    told = message(farewell())
    # Not by the stream, which may be in the middle of something.
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\r\x1b[K")  # the remains of a bar
        if told:
            os.write(2, f"fusion_bench: Interrupted. {told}\n".encode())


def _watch(noticed: int, handled: list[signal.Signals], said: Callable[[], None]) -> None:
    """End the process some time after a signal, if it is still there."""
    while (signum := os.read(noticed, 1)[0]) not in handled:
        pass
    time.sleep(PATIENCE)
    end_children()
    said()
    os._exit(128 + signum)
