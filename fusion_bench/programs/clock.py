"""The seconds of a run's steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusion_bench.progress import step

log = logging.getLogger(__name__)

#: What is said of a step while it is done, and when it is done.
_WORDS = {
    "prepare": ("Preparing", "Prepared"),
    "plan": ("Planning", "Planned"),
    "load": ("Loading", "Loaded"),
    "search": ("Searching", "Searched"),
    "fuse": ("Fusing", "Fused"),
    "evaluate": ("Evaluating", "Evaluated"),
    "report": ("Reporting", "Reported"),
}


class Clock:
    """Measures the time of named steps, and shows and logs them if it ``says`` anything."""

    def __init__(self, says: bool = True) -> None:
        self._says = says
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str, *, says: bool = True) -> Iterator[None]:
        """Measure a step, which is logged when it has succeeded."""
        start = time.perf_counter()
        doing, done = _WORDS[name]
        with step(doing, shown=self._says):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if self._says and says:
            log.info("%s in %.1f s.", done, self.seconds[name])

    def total(self) -> float:
        """Return the seconds since the clock was made."""
        return round(time.perf_counter() - self._start, 3)
