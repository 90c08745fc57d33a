"""Access to the command line as it was typed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

#: Options whose value is the next word.
_TAKE_A_VALUE = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--allow", "--plugins"),
)
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
    """Return the words with Hydra's options in the place of a config file, which has no flag."""
    for place, word in enumerate(words):
        if not word.endswith((".yaml", ".yml")) or "=" in word or word.startswith(("-", "~")):
            continue
        if place and words[place - 1] in _TAKE_A_VALUE:
            continue
        file = Path(word)
        options = ["--config-path", str(file.parent), "--config-name", file.stem]
        return [*words[:place], *options, *words[place + 1 :]]
    return list(words)


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
