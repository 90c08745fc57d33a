"""The exceptions that are shown to people as a message, without a traceback."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, get_args


class FusionBenchError(Exception):
    """A mistake that the user can mend; its text names the culprit and the mend.

    Attributes:
        exit_code: what the command line ends with.
    """

    exit_code = 2


class ConfigError(FusionBenchError):
    """A key of the config asks for what cannot be, or may not be; found before the work starts."""


class ResultError(FusionBenchError):
    """The work was done, and its result is not what was asked for."""

    exit_code = 1


class WorldError(FusionBenchError):
    """The network, a disk, memory or a device failed; the same command may work later."""

    exit_code = 3


#: The command line ends with it after Ctrl-C.
INTERRUPTED = 130


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    seen: set[int] = set()  # a re-raised exception may stand in its own context
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a sentence that points from ``name`` to the nearest of ``choices``.

    Falls back to listing all choices, and to an empty string when there are none.
    """
    known = sorted(set(choices))
    begun = [choice for choice in known if name and choice.startswith(name)]
    if close := begun or get_close_matches(name, known, n=1, cutoff=0.6):
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(known)}." if known else ""


def check_choice(where: str, value: object, choices: Any) -> None:
    """Refuse a ``value`` that is not among a ``Literal``'s choices; ``where`` is its key.

    Raises:
        FusionBenchError: it is not.
    """
    known = get_args(choices)
    if value not in known:
        raise FusionBenchError(f"{where}: '{value}' is unknown. {did_you_mean(str(value), known)}")


def check_between(where: str, value: float, least: float, most: float) -> None:
    """Refuse a ``value`` that is no number from ``least`` to ``most``; ``where`` is its key.

    Raises:
        FusionBenchError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise FusionBenchError(f"{where}: {value!r} is not a number from {least} to {most}.")
