"""The seconds of a run's steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

#: What the log says when a step is done.
_DONE = {
    "prepare": "Prepared",
    "plan": "Planned",
    "load": "Loaded",
    "search": "Searched",
    "fuse": "Fused",
    "evaluate": "Evaluated",
    "report": "Reported",
}


class Clock:
    """Measures the time of named steps and logs it, if it ``says`` anything."""

    def __init__(self, says: bool = True) -> None:
        self._says = says
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str, *, says: bool = True) -> Iterator[None]:
        """Measure a step, which is logged when it has succeeded."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)
        if self._says and says:
            log.info("%s in %.1f s.", _DONE[step], self.seconds[step])

    def total(self) -> float:
        """Return the seconds since the clock was made."""
        return round(time.perf_counter() - self._start, 3)
