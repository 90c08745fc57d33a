"""How many jobs of a sweep have ended, in whatever process or machine they were done."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusion_bench.progress import Step, duration

#: A file of the sweep's directory, with a letter for each job that has ended.
_NAME = ".ended"
_WORKED, _KNOWN = b"+", b"="


@dataclass
class Tally:
    """Counts the jobs of a sweep.

    Attributes:
        directory: the sweep's.
        total: the number of all jobs, if it is known.
        begun: when the sweep began, in seconds since the epoch.
    """

    directory: Path = Path()
    total: int | None = None
    begun: float = 0.0

    def begin(self, directory: Path, total: int | None) -> None:
        """Begin to count."""
        self.directory, self.total, self.begun = directory, total, time.time()
        self.end()

    def add(self, *, known: bool) -> None:
        """Count a job that has ended, or was ``known`` from before."""
        with suppress(OSError), (self.directory / _NAME).open("ab") as file:
            file.write(_KNOWN if known else _WORKED)

    def onto(self, step: Step) -> None:
        """Let a step tell of it."""
        ended, known = self._read()
        step.total, step.done, step.skipped = self.total, ended, known

    def text(self, now: float) -> str:
        """Return how many jobs have ended, and how long the others will take."""
        ended, known = self._read()
        if self.total is None:
            return f"job {ended}"
        text = f"{ended} of {self.total} jobs"
        left, worked = self.total - ended, ended - known
        if left <= 0 or not worked:
            return text
        return f"{text}, about {duration((now - self.begun) * left / worked)} left"

    def what_is_kept(self) -> str:
        """Return what is kept of a sweep that is interrupted, and how to go on."""
        of = "" if self.total is None else f" of {self.total}"
        done = f"{self._read()[0]}{of} jobs done: {self.directory}."
        return f"{done} The same command goes on with the others."

    def end(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            (self.directory / _NAME).unlink(missing_ok=True)

    def _read(self) -> tuple[int, int]:
        """Return how many jobs have ended, and how many of these were known."""
        with suppress(OSError):
            letters = (self.directory / _NAME).read_bytes()
            return len(letters), letters.count(_KNOWN)
        return 0, 0
