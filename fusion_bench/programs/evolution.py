"""Searches a method's options by evolution; a race compares the settings that it proposes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Literal

from lightning.fabric import Fabric

from fusion_bench.arguments import keeps_arguments
from fusion_bench.instantiate import check, instantiate, parameters
from fusion_bench.method.plain import as_method
from fusion_bench.problems import (
    EnvironmentProblem,
    FusionBenchError,
    Place,
    Problems,
    check_between,
    check_choice,
    did_you_mean,
    key_of,
)
from fusion_bench.programs.fusing import LearnedSplit
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.race import begun, check_budget, check_rules, results
from fusion_bench.programs.search import GridSearch
from fusion_bench.programs.setting import Setting, located
from fusion_bench.programs.setting_evaluator import SettingEvaluator
from fusion_bench.programs.spec import FusionSpec, Section
from fusion_bench.progress import SAMPLES, step
from fusion_bench.report import RaceInfo, Search
from fusion_bench.report.schema import Split

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

    from fusion_bench.taskpool import LearningData

Sampler = Literal["cmaes", "tpe"]
_MOST_TRIALS = 10_000
#: Of a drawn number, so that people can read a recipe.
_DIGITS = 4
_RANGE = {"low", "high", "log"}
#: What a list of values to choose from holds.
_PLAIN = (str, int, float, type(None))


@dataclass(frozen=True)
class _Range:
    """Numbers from ``low`` to ``high``; with ``log`` their logarithms are drawn."""

    low: float
    high: float
    log: bool = False

    @property
    def values(self) -> list[object]:
        return [self.low, self.high]


@dataclass(frozen=True)
class _Choice:
    """One of some values."""

    values: list[object]


_Variable = _Range | _Choice


class EvolutionSearch:
    """Lets CMA-ES or TPE propose options of a method, which race on a validation split.

    All trials are evaluated on the same random samples, half of the budget, and the sampler learns
    from their scores. Then the trials race on with new samples, as in ``RaceSearch``, and the test
    bets on these alone: so the winner is not the one that chance helped. Needs
    ``fusion_bench[optuna]``. CMA-ES: Hansen and Ostermeier, Completely derandomized self-adaptation
    in evolution strategies (2001).

    Args:
        space: options of the method. In them a mapping ``{low: 0, high: 1}``, which may have
            ``log: true``, stands for a number from a range, and a list of plain values for one of
            them; all else stays: ``weights: {digits: {low: 0, high: 1}}``.
        trials: how many settings are tried.
        sampler: ``cmaes``, which needs two ranges or more, or ``tpe``.
        split: as in ``RaceSearch``; so are the next arguments.
        metric: ``normalized``, or the main metric of all tasks.
        judge_test: evaluate the winner on the test split, once.
        budget: the most samples, as a share of those of all trials on the whole split.
        alpha: how likely the test may drop the best trial of the whole split.
        seed: of the trials and of the samples' order.

    Raises:
        FusionBenchError: an unknown split, metric or sampler, numbers out of their ranges, or a
            space without anything to choose.
        EnvironmentProblem: Optuna is not installed.
    """

    @keeps_arguments
    def __init__(
        self,
        space: Mapping[str, object],
        trials: int = 60,
        sampler: Sampler = "cmaes",
        split: Split = "validation",
        metric: str | None = None,
        judge_test: bool = True,
        budget: float = 0.2,
        alpha: float = 0.05,
        seed: int = 0,
    ):
        problems = Problems()
        with problems.collect():
            check_rules(budget, alpha, seed)
        with problems.collect():
            check_between("trials", trials, 2, _MOST_TRIALS)
        with problems.collect():
            check_choice("sampler", sampler, Sampler)
        with problems.collect():
            self._variables = {
                key_of(place): own
                for option, value in space.items()
                for place, own in _variables(value, ("space", option))
            }
            _check_variables(self._variables, sampler)
        problems.raise_all()
        if not all(map(find_spec, ("optuna", "cmaes"))):
            raise EnvironmentProblem(
                "Optuna is not installed.", "Run \"pip install 'fusion_bench[optuna]'\"."
            )
        self._grid = GridSearch({}, split, metric, judge_test=False)
        self._space, self._trials, self._sampler = dict(space), trials, sampler
        self._budget, self._alpha, self._seed = budget, alpha, seed
        self.judge_test = judge_test

    @property
    def learned(self) -> LearnedSplit:
        """The split that settings are evaluated on."""
        return self._grid.learned

    def planned(self, _: int) -> str:
        """Return in words what is evaluated."""
        count = len(self._variables)
        return (
            f"{self._trials:,} trials of {count} option{'' if count == 1 else 's'} on at most "
            f"{100 * self._budget:g} % of the samples"
        )

    def settings(self, method: Section) -> list[Setting]:
        """Return the method at the ends of all ranges and with all values; nothing is loaded.

        Args:
            method: the method's config node.

        Raises:
            FusionBenchError: no node, or options that the method does not take.
        """
        if not isinstance(method, Mapping) or "_target_" not in method:
            raise FusionBenchError(
                "needs the method as a config node with '_target_'.", place=("search",)
            )
        problems = Problems()
        with problems.collect("method"):
            check({"_target_": method["_target_"], "_partial_": True}, "method")
        problems.raise_all()
        known = list(parameters(method["_target_"]))
        for option in self._space.keys() - known:
            with problems.collect():
                raise FusionBenchError(
                    f"{str(method['_target_']).rpartition('.')[2]} takes no such key.",
                    did_you_mean(option, known),
                    place=("search", "space", option),
                )
        problems.raise_all()
        most = max(len(own.values) for own in self._variables.values())
        settings = []
        for place in range(most):
            with problems.collect():
                values = {
                    name: own.values[min(place, len(own.values) - 1)]
                    for name, own in self._variables.items()
                }
                settings.append(self._setting(method, values))
                self._grid.refuse_learned(settings[-1].method)
        problems.raise_all()
        return settings

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> tuple[Search, Setting]:
        """Try settings on ``data``; return all figures and the winner.

        Every process of ``fabric`` must call it, and proposes the same settings.

        Raises:
            FusionBenchError: as ``RaceSearch.run``.
        """
        from optuna import create_study, logging

        logging.set_verbosity(logging.WARNING)
        node = settings[0].node
        evaluator = SettingEvaluator(data, modelpool, taskpool, fabric, spec, self._grid.metric)
        evaluator.count = self._trials
        whole = self._trials * sum(evaluator.sizes.values())
        most = int(self._budget * whole)
        check_budget(most // 2, evaluator, self._trials)
        study = create_study(direction="maximize", sampler=self._optuna_sampler())
        with step("", evaluator.samples_of_individuals + most, SAMPLES):
            race = begun(evaluator, self._alpha, self._seed)
            first = race.steps_for(most / 2 / self._trials)
            for _ in range(self._trials):
                trial = study.ask()
                values = {name: _drawn(trial, name, own) for name, own in self._variables.items()}
                evaluator.settings.append(self._setting(node, values))
                number = race.add()
                race.advance([number], first)
                study.tell(trial, race.score(number))
            winner = race.settle(most)
        info = RaceInfo(
            alpha=self._alpha,
            budget=self._budget,
            seed=self._seed,
            num_samples=race.spent,
            whole=whole,
        )
        chosen = evaluator.settings[winner]
        found = self._grid.found(
            data, evaluator.metric, results(race, evaluator), winner, chosen, info
        )
        space = dict(
            zip(_names(self._variables), (v.values for v in self._variables.values()), strict=True)
        )
        return found.model_copy(update={"space": space, "judge_test": self.judge_test}), chosen

    def _setting(self, method: Mapping[str, object], values: Mapping[str, object]) -> Setting:
        """Return the method with values for the variables."""
        built = {
            option: _filled(value, ("space", option), values)
            for option, value in self._space.items()
        }
        keys: dict[str, Place] = {option: ("search", "space", option) for option in built}
        node = {**method, **built}
        with located(keys):
            made = as_method(instantiate(node, "method"))
        options = dict(zip(_names(values), values.values(), strict=True))
        return Setting(made, node=node, options=options, keys=keys)

    def _optuna_sampler(self) -> "BaseSampler":
        from optuna.samplers import CmaEsSampler, TPESampler

        if self._sampler == "tpe":
            return TPESampler(seed=self._seed)
        return CmaEsSampler(seed=self._seed, warn_independent_sampling=False)


def _names(variables: Mapping[str, object]) -> list[str]:
    return [name.removeprefix("space.") for name in variables]


def _variables(value: object, place: Place) -> Iterator[tuple[Place, _Variable]]:
    """Yield what there is to choose in a value.

    Raises:
        FusionBenchError: a range without numbers, or an empty one.
    """
    if isinstance(value, Mapping) and {"low", "high"} <= value.keys() <= _RANGE:
        yield place, _range(value, place)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _variables(inner, (*place, name))
    elif isinstance(value, list) and value and all(isinstance(own, _PLAIN) for own in value):
        yield place, _Choice(value)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _variables(inner, (*place, index))


def _range(value: Mapping[str, object], place: Place) -> _Range:
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = [own for own in (low, high) if isinstance(own, int | float) and isfinite(own)]
    if len(numbers) < 2 or isinstance(low, bool) or isinstance(high, bool):
        raise FusionBenchError("low and high are not both numbers.", place=place)
    if not numbers[0] < numbers[1]:
        raise FusionBenchError(f"{low} is not below {high}.", place=place)
    if not isinstance(log, bool) or (log and numbers[0] <= 0):
        raise FusionBenchError("log is true or false, and needs numbers above 0.", place=place)
    return _Range(float(numbers[0]), float(numbers[1]), log)


def _check_variables(variables: Mapping[str, _Variable], sampler: str) -> None:
    if not variables:
        raise FusionBenchError(
            "has nothing to choose.",
            "Write a range like '{low: 0, high: 1}', or values like '[10, 20]'.",
            place=("space",),
        )
    if sampler == "cmaes" and sum(isinstance(own, _Range) for own in variables.values()) < 2:
        raise FusionBenchError(
            "CMA-ES needs two ranges or more.", "Give {here}sampler=tpe.", place=("sampler",)
        )


def _drawn(trial: "Trial", name: str, own: _Variable) -> object:
    if isinstance(own, _Range):
        drawn = trial.suggest_float(name, own.low, own.high, log=own.log)
        return min(own.high, max(own.low, float(f"{drawn:.{_DIGITS}g}")))
    place = trial.suggest_categorical(name, list(range(len(own.values))))
    assert isinstance(place, int)
    return own.values[place]


def _filled(value: object, place: Place, values: Mapping[str, object]) -> object:
    """Return a value of the space with what was chosen."""
    if (name := key_of(place)) in values:
        return values[name]
    if isinstance(value, Mapping):
        return {key: _filled(inner, (*place, key), values) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, (*place, i), values) for i, inner in enumerate(value)]
    return value
