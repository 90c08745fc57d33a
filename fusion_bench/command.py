"""The command line that was typed: the only place that reads it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_typed: ContextVar[tuple[str, ...] | None] = ContextVar("_typed", default=None)


def typed() -> list[str]:
    """Return the words of this process's command, its name first, as they were typed."""
    words = _typed.get()
    return list(sys.argv if words is None else words)


def overrides() -> dict[str, str]:
    """Return the keys that were typed, without ``+``, and their values."""
    pairs = (word.lstrip("+").partition("=") for word in typed()[1:])
    return {key: value for key, equals, value in pairs if equals}


def option(*flags: str) -> list[str]:
    """Return the values that were typed for an option, as ``flag value`` or ``flag=value``."""
    words, found = typed(), []
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags and (equals or position + 1 < len(words)):
            found.append(value if equals else words[position + 1])
    return found


@contextmanager
def replaced(words: Sequence[str]) -> Iterator[None]:
    """Let libraries read ``words`` instead; who asks here still gets what was typed."""
    before = sys.argv
    token = _typed.set(tuple(before))
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
        _typed.reset(token)
