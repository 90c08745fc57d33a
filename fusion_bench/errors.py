"""The one exception that is shown to people as a message, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class FusionBenchError(Exception):
    """A mistake that the user can mend; its text names the culprit and the mend."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a sentence that points from ``name`` to the nearest of ``choices``.

    Falls back to listing all choices, and to an empty string when there are none.
    """
    known = sorted(set(choices))
    if close := get_close_matches(name, known, n=1, cutoff=0.6):
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(known)}." if known else ""
