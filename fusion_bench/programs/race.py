"""Searches a method's options by a race on the samples of a validation split."""

from collections.abc import Mapping, Sequence
from math import ceil, nextafter
from typing import TYPE_CHECKING

from lightning.fabric import Fabric

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError, Problems, check_between, within
from fusion_bench.programs.fusing import LearnedSplit
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.search import GridSearch
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.setting_evaluator import SettingEvaluator
from fusion_bench.programs.spec import FusionSpec, Section
from fusion_bench.progress import SAMPLES, step
from fusion_bench.report import Candidate, RaceInfo, Search
from fusion_bench.report.schema import Split
from fusion_bench.results.race import Race, least

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData

_LARGEST_SEED = 2**32 - 1
_LEAST = 1e-6


class RaceSearch:
    """Lets a method with every combination of options race on a validation split.

    All settings are evaluated on the same random samples, a few at first and then more. A setting
    drops out as soon as a test says that it is worse than the best one: by all looks and settings
    together it drops the best one of the whole split with a probability of at most ``alpha``
    (``fusion_bench.results.race``). With a ``budget`` the worse half drops out after each round,
    without such a promise, and the best one at the end wins. It needs tasks whose main metric is a
    share of samples, such as accuracy. A setting is merged anew in each round.

    Args:
        space: as in ``GridSearch``; so are the next three arguments.
        split: the datasets of the model pool to evaluate on: ``train``, ``validation`` or ``test``.
        metric: ``normalized``, or the main metric of all tasks.
        judge_test: evaluate the winner on the test split, once.
        budget: the most samples, as a share of those that a full search of the settings evaluates;
            ``null`` has no limit, and only the test drops settings.
        alpha: see above.
        seed: of the samples' order.

    Raises:
        FusionBenchError: an unknown split or metric, or numbers out of their ranges.
    """

    @keeps_arguments
    def __init__(
        self,
        space: Mapping[str, object],
        split: Split = "validation",
        metric: str | None = None,
        judge_test: bool = True,
        budget: float | None = 0.2,
        alpha: float = 0.05,
        seed: int = 0,
    ):
        check_rules(budget, alpha, seed)
        self._grid = GridSearch(space, split, metric, judge_test)
        self._budget, self._alpha, self._seed = budget, alpha, seed
        self.judge_test = judge_test

    @property
    def learned(self) -> LearnedSplit:
        """The split that settings are evaluated on."""
        return self._grid.learned

    def settings(self, method: Section) -> list[Setting]:
        """Return the method with each combination of options; as in ``GridSearch``."""
        return self._grid.settings(method)

    def planned(self, count: int) -> str:
        """Return in words what is evaluated of so many settings."""
        most = "100 %" if self._budget is None else f"{100 * self._budget:g} %"
        return f"{self._grid.planned(count)} on at most {most} of the samples"

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> tuple[Search, Setting]:
        """Let ``settings`` race on ``data``; return all figures and the winner.

        Every process of ``fabric`` must call it.

        Raises:
            FusionBenchError: a metric that is no share of samples, a method that makes several
                models for one task, or too small a budget.
        """
        evaluator = SettingEvaluator(data, modelpool, taskpool, fabric, spec, self._grid.metric)
        evaluator.settings, evaluator.count = list(settings), len(settings)
        whole = len(settings) * sum(evaluator.sizes.values())
        most = None if self._budget is None else int(self._budget * whole)
        check_budget(most, evaluator, len(settings))
        with step("", evaluator.samples_of_individuals + (most or whole), SAMPLES):
            race = begun(evaluator, self._alpha, self._seed)
            for _ in settings:
                race.add()
            winner = race.settle(most)
        info = RaceInfo(
            alpha=self._alpha,
            budget=self._budget,
            seed=self._seed,
            num_samples=race.spent,
            whole=whole,
        )
        found = self._grid.found(
            data, evaluator.metric, results(race, evaluator), winner, settings[winner], info
        )
        return found, settings[winner]


def check_rules(budget: float | None, alpha: float, seed: int) -> None:
    """Refuse numbers out of their ranges; all problems are raised together."""
    problems = Problems()
    if budget is not None:
        with problems.collect():
            check_between("budget", budget, _LEAST, 1)
    with problems.collect():
        check_between("alpha", alpha, _LEAST, nextafter(1, 0))
    with problems.collect():
        check_between("seed", seed, 0, _LARGEST_SEED)
    problems.raise_all()


def check_budget(most: int | None, evaluator: SettingEvaluator, count: int) -> None:
    """Refuse fewer samples than the rounds of a race need.

    Raises:
        FusionBenchError: there are fewer.
    """
    needed = least(evaluator.sizes, count)
    if most is not None and most < needed:
        share = ceil(100 * needed / (count * sum(evaluator.sizes.values()))) / 100
        raise FusionBenchError(
            f"{most:,} samples are too few for a race of {count} settings.",
            f"Give at least {{here}}budget={share:g}.",
            place=("search", "budget"),
        )


def begun(evaluator: SettingEvaluator, alpha: float, seed: int) -> Race:
    """Return a race without candidates, after the individual models were evaluated."""
    with within("search"):
        evaluator.evaluate_individuals()
    return Race(evaluator.sizes, evaluator.weights, evaluator, alpha, seed)


def results(race: Race, evaluator: SettingEvaluator) -> list[Candidate]:
    """Return the report of each candidate."""
    found = []
    for number, racer in enumerate(race.racers):
        fate = {"left": racer.left, "led_by": racer.by, "behind": racer.behind}
        found.append(evaluator.candidate(number).model_copy(update=fate))
    return found
