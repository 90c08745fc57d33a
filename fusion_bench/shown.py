"""Plain text for the terminal and logs, on streams that may fail without ending the run.

Names, paths, metadata and messages of libraries are untrusted. Their control characters could move
the cursor, forge lines and colours, or reverse text.
"""

import errno
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from fusion_bench.progress import above
from fusion_bench.redact import redacted

#: Control and format characters, lone surrogates, and line ends that are none for us.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
#: Line breaks and tabs are text; without joiners some languages cannot be written.
_TEXT = frozenset("\n\t\u200c\u200d")
_COLOUR = re.compile(r"\x1b\[[\d;:]*m")
#: What bars write on a terminal: back to the line's begin, or some lines up.
_BAR = re.compile(r"\r|(\x1b\[A)+\Z")


def visible(text: str) -> str:
    r"""Return a text with escaped control characters, such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text.replace("\r\n", "\n")))


def _visible(character: str) -> str:
    if character.isprintable() or character in _TEXT:
        return character
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()


def message(text: str) -> str:
    """Return text that is safe to show: without secrets, control characters and forged lines."""
    return visible(redacted(text)).replace("\n", "\n  ")


class Record(logging.LogRecord):
    """A log record with plain text for every handler, including the traceback."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = message(f"\n{logging.Formatter().formatException(self.exc_info)}")[1:]
            self.exc_info = None

    def getMessage(self) -> str:  # noqa: N802
        """Return the message with its arguments."""
        return message(super().getMessage())


class Stream(TextIOWrapper):
    """A stream for standard output, standard error or a log that ignores write failures.

    Args:
        binary: where the text goes.
        encoding: the text's.
        by_line: write each line at once.
        coloured: allow colours and cursor movements, for text that is clean already.
    """

    #: Kept, for one that is deleted closes the file.
    replaced: TextIOWrapper | None = None

    def __init__(self, binary: Any, encoding: str | None, *, by_line: bool, coloured: bool = False):
        # Nothing is held back here, so that two may write to the same place in turn.
        super().__init__(
            binary, encoding, "backslashreplace", line_buffering=by_line, write_through=True
        )
        self._passes = coloured
        self.coloured: Stream = (
            self if coloured else Stream(binary, encoding, by_line=by_line, coloured=True)
        )

    def write(self, text: str) -> int:
        """Write plain text, above the line that shows progress; failures are ignored."""
        try:
            with above(text) if self.isatty() else nullcontext():
                super().write(text if self._passes else self._plain(text))
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _plain(self, text: str) -> str:
        found = _BAR.match(text) if self.isatty() else None
        begin = found[0] if found else ""
        return begin + visible(redacted(_COLOUR.sub("", text[len(begin) :])))

    def _give_up(self, error: OSError) -> None:
        """Discard all further output to this stream, from the whole process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno != errno.EPIPE and self is not sys.stderr:  # `head` has seen enough
            reason = f"Standard output is closed or full ({error.strerror})"
            print(f"fusion_bench: {reason}. The run continues without it.", file=sys.stderr)


def set_up_streams() -> None:
    """Make all output plain text, and ignore its write failures."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # those of Python's own messages are lost
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)
    logging.setLogRecordFactory(Record)


def are_set_up() -> bool:
    """Return whether ``set_up_streams`` was called in this process."""
    return logging.getLogRecordFactory() is Record


def _safe(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed; the next file that is opened would take its place
        return Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(stream, Stream) or not isinstance(stream, TextIOWrapper):
        return stream
    stream.flush()
    safe = Stream(stream.buffer, stream.encoding, by_line=stream.line_buffering)
    safe.replaced = stream
    return safe


def colour(handlers: Iterable[logging.Handler]) -> None:
    """Allow handlers to colour plain records."""
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, Stream):
            handler.setStream(handler.stream.coloured)
