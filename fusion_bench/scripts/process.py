"""A command's process: where it imports from, its standard input, its messages and exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENAMETOOLONG
from pathlib import Path
from types import TracebackType
from typing import Any

from fusion_bench.problems import INTERRUPTED, ConfigError, FusionBenchError
from fusion_bench.progress import hide
from fusion_bench.shown import message

log = logging.getLogger(__name__)


@contextmanager
def closed_stdin() -> Iterator[None]:
    """Prevent libraries from reading standard input.

    Only ``breakpoint()`` gets the terminal back; under a debugger it stays open.
    """
    if sys.gettrace() is not None:
        yield
        return
    before, hook = sys.stdin, sys.breakpointhook
    try:
        terminal = os.dup(0)
    except OSError:  # it is closed already, as it is for services
        terminal = None

    def restore() -> None:
        sys.stdin, sys.breakpointhook = before, hook
        if terminal is not None:
            os.dup2(terminal, 0)

    def debug(*arguments: Any, **options: Any) -> Any:
        restore()
        if hook is not sys.__breakpointhook__ or "PYTHONBREAKPOINT" in os.environ:
            return hook(*arguments, **options)
        from pdb import Pdb

        return Pdb().set_trace(sys._getframe(1))  # where the user wrote it, not here

    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        sys.stdin, sys.breakpointhook = nothing, debug
        try:
            yield
        finally:
            restore()
            if terminal is not None:
                os.close(terminal)


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(message(text.rstrip()), file=sys.stderr)


def leave_working_directory() -> None:
    """Import nothing from the working directory, unless ``PYTHONPATH`` names it.

    Hydra runs each plugin that it finds, and a process that is started would look there first.
    """
    here = Path.cwd()
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in named if path]  # an empty one stands for the working directory
    if here == Path(__file__).parents[2]:  # a checkout, where the package need not be installed
        paths.insert(0, str(here))
    elif here not in {Path(path).absolute() for path in paths}:
        if sys.path and Path(sys.path[0]).absolute() == here:
            del sys.path[0]
        if len(named) > len(paths) > 0:
            sys.path[:] = [path for path in sys.path if Path(path).absolute() != here]
    os.environ["PYTHONSAFEPATH"] = "1"
    if paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


@contextmanager
def plain_messages(
    show_traceback: bool, explain: Callable[[Exception], str | None] = lambda error: None
) -> Iterator[None]:
    """End the process with a message and an exit code; the traceback goes to the log file.

    Args:
        show_traceback: print it instead.
        explain: returns the message for an error of a library's that the user can fix.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", INTERRUPTED))
    except Exception as error:
        hide()
        if show_traceback:
            sys.excepthook = _print_traceback
            raise
        logs = _log_traceback()
        ours = isinstance(error, FusionBenchError)
        text = str(error) if ours else _too_long(error) or explain(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            where = f"\n  {_where(logs)}" if text is None else ""
            said = message(unexpected(error) if text is None else text)
            print(f"fusion_bench: {said}{where}", file=sys.stderr)
        if isinstance(error, FusionBenchError):
            sys.exit(error.exit_code)
        sys.exit(1 if text is None else ConfigError.exit_code)


def _too_long(error: Exception) -> str | None:
    """Return what to say of a word that is longer than the name of a file may be."""
    if not isinstance(error, OSError) or error.errno != ENAMETOOLONG:
        return None
    return f"there is no '{str(error.filename)[:60]}…': it is too long for the name of a file."


def unexpected(error: Exception) -> str:
    """Return the text of an error that nobody foresaw."""
    return f"{type(error).__name__}: {error}"


def _log_traceback() -> list[str]:
    """Write the exception that is being handled to the log files; returns their names."""
    text = traceback.format_exc()
    record = log.makeRecord(__name__, logging.ERROR, __file__, 0, text, (), None)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    for handler in handlers:
        handler.handle(record)
    return [handler.baseFilename for handler in handlers]


def _where(logs: list[str]) -> str:
    traces = (
        f"The traceback is in {logs[0]}." if logs else ("HYDRA_FULL_ERROR=1 shows the traceback.")
    )
    return f"This is unexpected, so please report it. {traces}"
