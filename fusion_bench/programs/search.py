"""Searches a method's options on a validation split."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import inf, isnan
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.fabric import Fabric

from fusion_bench.arguments import keeps_arguments
from fusion_bench.instantiate import check, instantiate, parameters
from fusion_bench.method.contract import FusionMethod
from fusion_bench.method.plain import as_method, class_name
from fusion_bench.problems import (
    FusionBenchError,
    Place,
    Problem,
    Problems,
    check_choice,
    did_you_mean,
    error_of,
    within,
)
from fusion_bench.programs.evaluating import Evaluator
from fusion_bench.programs.fusing import (
    LearnedSplit,
    TuningData,
    describe_data,
    materialize,
    uses_test_split,
)
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.setting import Setting, located
from fusion_bench.programs.setting_evaluator import candidate, fused, metric_of
from fusion_bench.programs.spec import FusionSpec, Section
from fusion_bench.progress import SAMPLES, step
from fusion_bench.report import Candidate, MetricInfo, RaceInfo, Search
from fusion_bench.report.schema import NORMALIZED, Split
from fusion_bench.results import METRICS

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData


#: What configs of earlier versions call it.
_NORMALIZED_BEFORE = "normalized_accuracy"


@runtime_checkable
class OptionSearch(Protocol):
    """The interface of a search for a method's options."""

    @property
    def learned(self) -> LearnedSplit:
        """The split that settings are evaluated on."""

    def settings(self, method: Section) -> list[Setting]:
        """Return the method's config node with each combination of options; nothing is loaded."""

    def planned(self, count: int) -> str:
        """Return in words what is evaluated of so many settings."""

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> tuple[Search, Setting]:
        """Evaluate ``settings``, or others; return all figures and the winner."""


def as_search(made: object) -> OptionSearch | None:
    """Return an object as a search; ``None`` stays.

    Raises:
        FusionBenchError: it is none.
    """
    if made is None or isinstance(made, OptionSearch):
        return made
    raise FusionBenchError(
        f"a {type(made).__name__} is not a search.",
        "Use one such as fusion_bench.programs.GridSearch.",
    )


class GridSearch:
    """Evaluates a method with every combination of options on a validation split.

    The best average wins; in a tie, the first one. Results are cached, so an interrupted search
    resumes.

    Args:
        space: maps options of the method to values; the last option changes fastest. An empty
            space, without ``judge_test``, evaluates the method unchanged.
        split: the datasets of the model pool to evaluate on: ``train``, ``validation`` or ``test``.
        metric: ``normalized``, which needs an own model for each task, or the main metric of all
            tasks, such as ``accuracy``; by default the first if possible.
        judge_test: evaluate the winner on the test split, once.

    Raises:
        FusionBenchError: an unknown split or metric.
    """

    @keeps_arguments
    def __init__(
        self,
        space: Mapping[str, object],
        split: Split = "validation",
        metric: str | None = None,
        judge_test: bool = True,
    ):
        problems = Problems()
        with problems.collect():
            check_choice("split", split, Split)
        metric = NORMALIZED if metric == _NORMALIZED_BEFORE else metric
        if metric is not None and metric not in (known := [NORMALIZED, *METRICS]):
            hint = did_you_mean(str(metric), known)
            if not isinstance(metric, str) or hint.startswith("Did you mean"):  # else a user's
                with problems.collect():
                    raise FusionBenchError(f"'{metric}' is unknown.", hint, place=("metric",))
        problems.raise_all()
        self.space = dict(space)
        self.split = split
        self.metric = metric
        self.judge_test = judge_test

    def settings(self, method: Section) -> list[Setting]:
        """Return the method with each combination of options; nothing is loaded.

        Args:
            method: the method's config node.

        Raises:
            FusionBenchError: with all problems: no node, values that are not a list, an empty list,
                an option that the method does not take, or takes no such value of, or data that it
                learns from and would be evaluated on.
        """
        problems = Problems()
        if not isinstance(method, Mapping) or "_target_" not in method:
            with problems.collect("search"):
                raise FusionBenchError("needs the method as a config node with '_target_'.")
            problems.add(self._space_problems(None))
            raise error_of(problems)
        with problems.collect("method"):
            check({"_target_": method["_target_"], "_partial_": True}, "method")
        wrong = self._space_problems(None if problems else method["_target_"])
        problems.add(wrong)
        refused = {problem.place for problem in wrong}
        space = {o: v for o, v in self._values.items() if ("search", "space", o) not in refused}
        settings = []
        for numbered in product(*(enumerate(values) for values in space.values())):
            tried = dict(zip(space, numbered, strict=True))
            options = {option: value for option, (_, value) in tried.items()}
            keys: dict[str, Place] = {
                option: ("search", "space", option, index) for option, (index, _) in tried.items()
            }
            node = {**method, **options}
            with problems.collect(), located(keys):
                made = as_method(instantiate(node, "method"))
                settings.append(Setting(made, node=node, options=options, keys=keys))
        with problems.collect("search"):
            for setting in settings:
                self.refuse_learned(setting.method)
        problems.raise_all()
        return settings

    def planned(self, count: int) -> str:
        """Return in words what is evaluated of so many settings."""
        return f"{count:,} setting{'' if count == 1 else 's'}"

    @property
    def _values(self) -> dict[str, list[object]]:
        """The values of each option that has a list of them."""
        lists = {o: v for o, v in self.space.items() if isinstance(v, Sequence)}
        return {option: list(v) for option, v in lists.items() if not isinstance(v, str)}

    def refuse_learned(self, method: FusionMethod) -> None:
        """Refuse a method that learns from what its options are evaluated on."""
        if method.needs.split == self.split:
            raise FusionBenchError(
                f"{class_name(method)} learns from the {self.split} split itself, so this split "
                "cannot evaluate the options.",
                "Choose another {above}method.split or another {here}split.",
                place=("split",),
            )

    def _space_problems(self, target: object | None) -> list[Problem]:
        """Return what is wrong with the space of a method's options, whatever their values.

        Args:
            target: the method's ``_target_``; ``None`` where it is not known.
        """
        place: Place = ("search", "space")
        if self.judge_test and not self.space:
            return [Problem(place, "is empty.", "Name an option of the method to try.")]
        known = [] if target is None else list(parameters(target))
        found = []
        for option, values in self.space.items():
            remove = f"'~{{here}}{option}'."
            if target is not None and option not in known:
                reason = f"{str(target).rpartition('.')[2]} takes no such key."
                remedy = f"{did_you_mean(option, known)} To remove it: {remove}"
            elif option not in self._values:
                reason, remedy = f"'{values}' is not a list.", "Write it like '[0.1, 0.2]'."
            elif not values:
                reason = "the list is empty."
                remedy = f"Add a value, or remove the option: {remove}"
            else:
                continue
            found.append(Problem((*place, option), reason, remedy))
        return found

    @property
    def learned(self) -> LearnedSplit:
        """The split that settings are evaluated on."""
        return LearnedSplit(self.split, "the search evaluates on", ("search", "split"))

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> tuple[Search, Setting]:
        """Evaluate each of ``settings`` on ``data``, and return all figures with the winner.

        Every process of ``fabric`` must call it.

        Raises:
            FusionBenchError: a metric that cannot be had, or a method that makes several models for
                one task.
        """
        pool = taskpool.evaluating(data)
        evaluator = Evaluator(modelpool, pool, fabric, "own_task", spec.fast_dev_run)
        alone = [] if spec.baselines == "none" else evaluator.individuals()
        tasks = [task for _, own in alone for task in own] + len(settings) * pool.task_names
        learned: dict[str | None, TuningData] = {}
        candidates = []
        with step("", evaluator.num_samples(tasks), SAMPLES):
            if alone:
                evaluator.evaluate_individuals()
            with within("search"):
                metric = metric_of(evaluator, self.metric)
            individuals = dict(evaluator.models)
            for number, setting in enumerate(settings, start=1):
                evaluator.models = dict(individuals)
                with step(f"setting {number} of {len(settings)}"):
                    merged = fused(setting, modelpool, taskpool, fabric, spec, learned)
                    evaluator.evaluate_merged(materialize(merged))
                evaluator.summarise()
                candidates.append(candidate(setting, evaluator, metric))
        sign = 1 if metric.higher_is_better else -1
        merits = [-inf if isnan(c.score) else sign * c.score for c in candidates]
        winner = merits.index(max(merits))
        return self.found(data, metric, candidates, winner, settings[winner]), settings[winner]

    def found(
        self,
        data: "Mapping[str, LearningData]",
        metric: MetricInfo,
        candidates: list[Candidate],
        winner: int,
        chosen: Setting,
        race: RaceInfo | None = None,
    ) -> Search:
        """Return the report of a search."""
        return Search(
            split=self.split,
            metric=metric.name,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            test_split=uses_test_split(data),
            judge_test=self.judge_test,
            space=self._values,
            tasks=describe_data(data),
            candidates=candidates,
            winner=winner,
            method=chosen.node,
            race=race,
        )
