"""What a run is going to do and what stands in its way, known before any weight is loaded."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench.errors import ConfigError, FusionBenchError, WorldError
from fusion_bench.repository import Repository

if TYPE_CHECKING:
    from fusion_bench.weights import Weights

#: How a message begins that names its key.
_KEY = re.compile(r"[a-z_]+((\.[^\s:]+)|(\[\d+\]))*: ")
#: What the embedded zoo takes on disk, rounded up.
_ZOO_BYTES = 150_000_000


@dataclass(frozen=True)
class Step:
    """One thing that a run does.

    Attributes:
        verb: ``build``, ``download``, ``prepare``, ``read``, ``compute``, ``judge`` or ``write``.
        what: of what it is.
        nbytes: how much is moved, where that is known.
        place: the directory or file that takes up the bytes.
        key: where in the config another place can be chosen, or the environment variable.
    """

    verb: str
    what: str
    nbytes: int | None = None
    place: Path | None = None
    key: str = ""


def zoo_step(place: Path) -> Step:
    """Return what is to be done where the embedded zoo is not there yet."""
    what = "the zoo of tiny models and images, which takes 2 to 3 minutes"
    return Step("build", what, _ZOO_BYTES, place, "FUSION_BENCH_CACHE")


@dataclass
class Plan:
    """What a part of a run has to say before it begins.

    Attributes:
        steps: what it does.
        problems: why it cannot; each names its key and the mend.
        weights: the models that could be opened by their headers alone, by name.
        notes: what is done all the same and people should know, each once.
    """

    steps: list[Step] = field(default_factory=list)
    problems: list[FusionBenchError] = field(default_factory=list)
    weights: "dict[str, Weights]" = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _files: dict[tuple[str, str], int | None] = field(default_factory=dict)

    @contextmanager
    def noting(self, key: str = "") -> Iterator[None]:
        """Keep what is raised as a problem, with ``key`` before it where it names none."""
        try:
            yield
        except FusionBenchError as error:
            text = str(error)
            if key and key not in text and not _KEY.match(text):
                named = type(error)(f"{key}: {text}")
                named.__cause__ = error.__cause__
                error = named
            if text not in map(str, self.problems):
                self.problems.append(error)

    def add(self, step: Step) -> None:
        """Add a step, once."""
        if step not in self.steps:
            self.steps.append(step)

    def note(self, *notes: str) -> None:
        """Add notes, each once."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def download(self, repository: Repository, *files: str) -> None:
        """Note those of a repository's files that are not here yet."""
        for file in files:
            if not repository.has(file):
                self._files[repository.name, file] = repository.sizes.get(file)

    def take(self, other: "Plan") -> None:
        """Add what another part has to say."""
        for step in other.steps:
            self.add(step)
        known = set(map(str, self.problems))
        self.problems += [problem for problem in other.problems if str(problem) not in known]
        self.weights |= other.weights
        self.note(*other.notes)
        self._files |= other._files

    def downloads(self) -> dict[str, int | None]:
        """Return the bytes to fetch of each repository; None where the Hub does not tell them."""
        total: dict[str, int | None] = {}
        for (name, _), size in self._files.items():
            known = total.get(name, 0)
            total[name] = None if size is None or known is None else known + size
        for step in self.steps:
            if step.verb == "download":
                total[step.what] = step.nbytes
        return total

    def raise_problems(self) -> None:
        """Raise all problems as one error.

        Raises:
            WorldError: all of them are of the network, a disk or a device, and may pass.
            ConfigError: any others.
        """
        if not self.problems:
            return
        passing = all(isinstance(problem, WorldError) for problem in self.problems)
        kind = WorldError if passing else ConfigError
        first = self.problems[0]
        raise kind("\n".join(_told(self.problems))) from (first.__cause__ or first)


def _told(problems: Iterable[FusionBenchError]) -> Iterator[str]:
    """Yield a line for each problem; one for all that have the same fault of the world."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        text = str(problem)
        fault = text.partition("': ")[2] if isinstance(problem, WorldError) else ""
        alike.setdefault(fault or text, []).append(text)
    for first, *others in alike.values():
        keys = dict.fromkeys(text.partition(": ")[0] for text in others)
        yield f"{first} Likewise: {', '.join(keys)}." if keys else first
