"""The plan of a run: its steps and problems, known before any weight is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench.problems import Problems
from fusion_bench.repository import Repository
from fusion_bench.zoo import families

if TYPE_CHECKING:
    from fusion_bench.weights import Weights


@dataclass(frozen=True)
class Step:
    """One thing that a run does.

    Attributes:
        verb: ``build``, ``download``, ``prepare``, ``read``, ``merge``, ``compute``, ``hold``
            (memory), ``option`` (what it is for which entries), ``evaluate`` or ``write``.
        what: the object of the step.
        nbytes: the number of bytes, if known.
        place: the directory or file that takes the bytes.
        key: where in the config another place can be chosen, or the environment variable.
    """

    verb: str
    what: str
    nbytes: int | None = None
    place: Path | None = None
    key: str = ""


def zoo_step(place: Path) -> Step:
    """Return the step that builds the family of embedded models that is missing at ``place``."""
    family = families.at(place)
    return Step("build", family.what, family.nbytes, place, "FUSION_BENCH_CACHE")


@dataclass
class Plan:
    """The steps, problems and notes of a part of a run.

    Attributes:
        steps: the steps.
        problems: the problems; places are relative to the part.
        weights: the models that could be opened by their headers alone, by name.
        notes: remarks on accepted differences, each once.
        entries: what the merged model's entries come from, as sentences.
        reads: the bytes of the weights that a merge reads, if known.
        writes: the bytes of the merged weights, if known.
        holds: the most bytes of memory that a merge to files takes, if known.
    """

    steps: list[Step] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    weights: "dict[str, Weights]" = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    reads: int | None = None
    writes: int | None = None
    holds: int | None = None
    _files: dict[tuple[str, str], int | None] = field(default_factory=dict)

    @contextmanager
    def collect(self, *place: str | int) -> Iterator[None]:
        """Collect problems that are raised in the context, with ``place`` prepended."""
        with self.problems.collect(*place):
            yield

    def add(self, step: Step) -> None:
        """Add a step, once."""
        if step not in self.steps:
            self.steps.append(step)

    def note(self, *notes: str) -> None:
        """Add notes, each once."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def download(self, repository: Repository, *files: str) -> None:
        """Add the download of a repository's missing files."""
        for file in files:
            if not repository.has(file):
                self._files[repository.name, file] = repository.sizes.get(file)

    def take(self, other: "Plan", *place: str | int) -> None:
        """Add another part's plan, which is at ``place`` in the config."""
        for step in other.steps:
            self.add(step)
        self.problems.add(problem.inside(*place) for problem in other.problems)
        self.weights |= other.weights
        self.note(*other.notes)
        self._files |= other._files

    def downloads(self) -> dict[str, int | None]:
        """Return the bytes to download of each repository; ``None`` if unknown."""
        total: dict[str, int | None] = {}
        for (name, _), size in self._files.items():
            known = total.get(name, 0)
            total[name] = None if size is None or known is None else known + size
        for step in self.steps:
            if step.verb == "download":
                total[step.what] = step.nbytes
        return total
