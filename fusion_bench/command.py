"""Access to the command line as it was typed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_typed: ContextVar[tuple[str, ...] | None] = ContextVar("_typed", default=None)


def typed() -> list[str]:
    """Return the words of this process's command as they were typed, beginning with its name."""
    words = _typed.get()
    return list(sys.argv if words is None else words)


def overrides() -> dict[str, str]:
    """Return the typed config keys, without ``+``, and their values."""
    pairs = (word.lstrip("+").partition("=") for word in typed()[1:])
    return {key: value for key, equals, value in pairs if equals}


def option(*flags: str) -> list[str]:
    """Return the typed values of an option, given as ``flag value`` or ``flag=value``."""
    words, found = typed(), []
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags and (equals or position + 1 < len(words)):
            found.append(value if equals else words[position + 1])
    return found


@contextmanager
def replaced(words: Sequence[str]) -> Iterator[None]:
    """Let libraries read ``words`` instead; this module still returns what was typed."""
    before = sys.argv
    token = _typed.set(tuple(before))
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
        _typed.reset(token)
