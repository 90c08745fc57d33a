"""A method as a run tries it, and where its options are in the config."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from fusion_bench.method.contract import FusionMethod
from fusion_bench.problems import FusionBenchError, Place, Problem
from fusion_bench.programs.spec import Places


@dataclass(frozen=True)
class Setting:
    """A method that a run tries.

    Attributes:
        method: the method.
        place: where it is in the config.
        models: the models that it merges; ``None`` for all of the pool.
        node: its whole config node, where a search or a study tries several.
        options: the options that a search chose.
        keys: where these are in the config.
    """

    method: FusionMethod
    place: Place = Places.method
    models: Sequence[str] | None = None
    node: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    keys: Mapping[str, Place] = field(default_factory=dict)

    def located(self, *, keyed_only: bool = False) -> AbstractContextManager[None]:
        """Map each problem of the method to the key of its option."""
        return located(self.keys, self.place, keyed_only)


@contextmanager
def located(
    keys: Mapping[str, Place], place: Place = Places.method, keyed_only: bool = False
) -> Iterator[None]:
    """Map the problems of a method at ``place`` to the keys of its options."""
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(
            problem if keyed_only and not problem.place else _from_space(problem, keys, place)
            for problem in error.problems
        )
        raise


def _from_space(problem: Problem, keys: Mapping[str, Place], place: Place) -> Problem:
    first, *rest = problem.place or ("",)
    if problem.whole or first not in keys:
        return problem.inside(*place)
    return replace(problem, place=(*keys[str(first)], *rest))
