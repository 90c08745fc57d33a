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


def file_as_options(words: Sequence[str]) -> list[str]:
    """Return the words with Hydra's options in the place of a config file as the first one."""
    if not words or not words[0].endswith((".yaml", ".yml")) or "=" in words[0]:
        return list(words)
    directory, _, file = words[0].rpartition("/")
    name = file.rpartition(".")[0]
    return ["--config-path", directory or ".", "--config-name", name, *words[1:]]


def option(*flags: str) -> list[str]:
    """Return the typed values of an option, given as ``flag value`` or ``flag=value``."""
    words, found = file_as_options(typed()[1:]), []
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
