"""How many cases are drawn: ten times as many under ``pytest -m exhaustive``."""

_times = 1


def exhaustively() -> None:
    """Draw ten times as many; called before any test is imported."""
    global _times
    _times = 10


def examples(count: int) -> int:
    """Return how many cases a test is to draw, where it otherwise draws ``count``."""
    return _times * count
