"""Problems as data, and the exceptions that carry them.

The code that raises gives a place relative to itself. Each caller prepends its own key with
``within`` or ``Problems.collect``. So nested methods, sweeps and studies report full keys, and a
run can report all problems.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

#: The way to a value in a config: ``("method", "base_method", "threshold")``.
Place = tuple[str | int, ...]
#: Whose fault it is, which decides the exit code. ``config``: the user's config or files.
#: ``result``: the work was done, and its result is not what was asked for. ``world``: network,
#: disk, memory or a device failed, and the same command may work later.
Kind = Literal["config", "result", "world"]

#: The command line ends with it after Ctrl-C.
INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """A problem with its place, reason and fix.

    Attributes:
        place: the key in the config, relative to the raising code; empty without a key.
        reason: what is wrong, as a sentence that names the culprit.
        remedy: how to fix it, as a sentence; what it tells to type works when typed. A key beside
            the last of ``place`` is written ``{here}key``, one further out ``{above}key``.
        kind: whose fault it is.
        details: lines of evidence, such as the keys that two models do not share.
        whole: ``place`` is the whole key already; nobody puts anything before it.
    """

    place: Place
    reason: str
    remedy: str = ""
    kind: Kind = "config"
    details: tuple[str, ...] = ()
    whole: bool = False

    def inside(self, *place: str | int) -> "Problem":
        """Return the same problem with an outer place prepended."""
        if self.whole:
            return self
        return replace(self, place=(*place, *self.place))

    def __str__(self) -> str:
        return text_of((self,))

    @property
    def key(self) -> str:
        """The place as text: ``search.space.sparsity_ratio[1]``."""
        return key_of(self.place)


class FusionBenchError(Exception):
    """An error that users see as a message without a traceback.

    Args:
        reason: what is wrong, as a sentence that names the culprit.
        remedy: how to fix it, as a sentence.
        place: the key in the config, relative to the raising code.
        details: lines of evidence.

    Attributes:
        problems: one or more problems.
        kind: the kind of the problems.
        exit_code: the exit code of the command line.
    """

    kind: ClassVar[Kind] = "config"
    exit_code: ClassVar[int] = 2

    def __init__(
        self, reason: str, remedy: str = "", *, place: Place = (), details: Iterable[str] = ()
    ):
        super().__init__(reason)
        self.problems: tuple[Problem, ...] = (
            Problem(place, reason, remedy, self.kind, tuple(details)),
        )

    def __str__(self) -> str:
        return text_of(self.problems)

    def __reduce__(self) -> Any:
        return error_of, (self.problems,)


class ConfigError(FusionBenchError):
    """An invalid or forbidden value in the config, found before the work starts."""


class ResultError(FusionBenchError):
    """The run finished, but with a negative result."""

    kind = "result"
    exit_code = 1


class EnvironmentProblem(FusionBenchError):  # noqa: N818 (it is no fault of the user)
    """The network, a disk, memory or a device failed; the same command may work later."""

    kind = "world"
    exit_code = 3


def error_of(problems: Iterable[Problem]) -> FusionBenchError:
    """Return one error with all ``problems``; a config error takes precedence."""
    problems = tuple(problems)
    kinds = {problem.kind for problem in problems}
    classes = (ResultError, EnvironmentProblem)
    found = next((cls for cls in classes if kinds == {cls.kind}), ConfigError)
    error = found(problems[0].reason)
    error.problems = problems
    return error


class Problems(list[Problem]):
    """A collection of problems that are reported together."""

    def __init__(self, problems: Iterable[Problem] = ()):
        super().__init__(problems)
        self._cause: BaseException | None = None

    @contextmanager
    def collect(self, *place: str | int) -> Iterator[None]:
        """Collect problems that are raised in the context, with ``place`` prepended."""
        try:
            with within(*place):
                yield
        except FusionBenchError as error:
            self._cause = self._cause or error.__cause__ or error
            self.add(error.problems)

    def add(self, problems: Iterable[Problem]) -> None:
        """Add new problems, each once."""
        self += [problem for problem in dict.fromkeys(problems) if problem not in self]

    def raise_all(self) -> None:
        """Raise them as one error, if there are any.

        Raises:
            FusionBenchError: there are.
        """
        if self:
            raise error_of(self) from self._cause


@contextmanager
def within(*place: str | int, keyed_only: bool = False, whole: bool = False) -> Iterator[None]:
    """Prepend ``place`` to each problem that is raised in the context.

    With ``keyed_only``, problems without a place stay unchanged, such as a damaged file. With
    ``whole``, outer callers prepend nothing.
    """
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(
            problem
            if keyed_only and not problem.place
            else replace(problem.inside(*place), whole=whole or problem.whole)
            for problem in error.problems
        )
        raise


def key_of(place: Iterable[str | int]) -> str:
    """Return a place as a key for the command line."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")


def text_of(problems: Iterable[Problem]) -> str:
    """Return the message text: a line for each problem, with its details below.

    Hardware and network failures with one cause share a line.
    """
    alike: dict[Problem | str, list[Problem]] = {}
    for problem in problems:
        # What fails in the world, and is helped alike, has failed once.
        same = problem.kind == "world" and problem.remedy
        alike.setdefault(same or problem, []).append(problem)
    lines = []
    for problem, *others in alike.values():
        remedy = problem.remedy
        for name, key in (("here", problem.place[:-1]), ("above", problem.place[:-2])):
            remedy = remedy.replace(f"{{{name}}}", f"{key_of(key)}." if key else "")
        said = " ".join(filter(None, [problem.reason, remedy]))
        line = f"{problem.key}: {said}" if problem.place else said
        keys = dict.fromkeys(other.key for other in others)
        if also := [key for key in keys if key not in ("", problem.key)]:
            line += f" The same applies to: {', '.join(also)}."
        lines += [line, *(f"  {detail}" for detail in problem.details)]
    return "\n".join(lines)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()  # a re-raised exception may stand in its own context
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


#: Choices that fit a message.
_MANY = 24


def did_you_mean(name: str, choices: Iterable[str], otherwise: str | None = None) -> str:
    """Return a sentence that suggests the choice nearest to ``name``.

    Where none is near it returns ``otherwise``. Without that it falls back to listing the choices,
    the nearest alone if they are many, and to an empty string when there are none.
    """
    known = sorted(set(choices))
    begun = [choice for choice in known if name and choice.startswith(name)]
    if close := begun or get_close_matches(name, known, n=1, cutoff=0.6):
        return f"Did you mean '{close[0]}'?"
    if otherwise is not None:
        return otherwise
    if len(known) > _MANY:
        return f"The nearest: {', '.join(get_close_matches(name, known, n=3, cutoff=0))}."
    return f"Known: {', '.join(known)}." if known else ""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a ``value`` that is not among a ``Literal``'s choices; ``name`` is its own key.

    Raises:
        ConfigError: it is not.
    """
    known = get_args(choices)
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise ConfigError(f"'{value}' is unknown.", hint, place=(name,))


def check_one_each(name: str, values: Collection[object], models: Collection[str]) -> None:
    """Refuse a number of values that differs from the number of models.

    Raises:
        FusionBenchError: there is another number.
    """
    if len(values) != len(models):
        few = "1 value" if len(values) == 1 else f"{len(values)} values"
        many = "1 model" if len(models) == 1 else f"{len(models)} models"
        raise FusionBenchError(
            f"{few} for {many} ({', '.join(models)}).", "Give one for each.", place=(name,)
        )


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Refuse a ``value`` that is not a number from ``least`` to ``most``; ``name`` is its key.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        reason = f"{value!r} is not a number from {least} to {most}."
        if most == math.inf:
            below = isinstance(value, float | int) and not isinstance(value, bool) and value < least
            reason = f"{value!r} is {f'less than {least}' if below else 'not a number'}."
        raise ConfigError(reason, place=(name,))
