"""Searches a method's options on a validation split."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
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
    fuse,
    materialize,
    tuning_data,
    uses_test_split,
)
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.spec import FusionSpec, Places, Section
from fusion_bench.progress import SAMPLES, step
from fusion_bench.report import Candidate, MetricInfo, Search, Value
from fusion_bench.report.schema import NORMALIZED, Split, mean_value, same_metric
from fusion_bench.results import METRICS

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData


#: What configs of earlier versions call it.
_NORMALIZED_BEFORE = "normalized_accuracy"


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
        return _located(self.keys, self.place, keyed_only)


@contextmanager
def _located(
    keys: Mapping[str, Place], place: Place = Places.method, keyed_only: bool = False
) -> Iterator[None]:
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


@runtime_checkable
class OptionSearch(Protocol):
    """The interface of a search for a method's options."""

    @property
    def learned(self) -> LearnedSplit:
        """The split that settings are evaluated on."""

    def settings(self, method: Section) -> list[Setting]:
        """Return the method's config node with each combination of options; nothing is loaded."""

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> Search:
        """Evaluate each of ``settings``, and return all figures with the winner."""


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
            with problems.collect(), _located(keys):
                made = as_method(instantiate(node, "method"))
                settings.append(Setting(made, node=node, options=options, keys=keys))
        with problems.collect("search"):
            for setting in settings:
                self._refuse_learned(setting.method)
        problems.raise_all()
        return settings

    @property
    def _values(self) -> dict[str, list[object]]:
        """The values of each option that has a list of them."""
        lists = {o: v for o, v in self.space.items() if isinstance(v, Sequence)}
        return {option: list(v) for option, v in lists.items() if not isinstance(v, str)}

    def _refuse_learned(self, method: FusionMethod) -> None:
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
    ) -> Search:
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
                metric = self._metric(evaluator)
            individuals = dict(evaluator.models)
            for number, setting in enumerate(settings, start=1):
                if spec.seed is not None:  # so that a setting does not depend on those before it
                    fabric.seed_everything(spec.seed, verbose=False)
                method, source = setting.method, setting.method.needs.split
                if source not in learned:
                    allowed = spec.allow_test_split
                    learned[source] = tuning_data(
                        method, modelpool, taskpool, fabric, allowed, spec.places
                    )
                evaluator.models = dict(individuals)
                with step(f"setting {number} of {len(settings)}"):
                    with setting.located(keyed_only=True):
                        merged = fuse(method, modelpool, fabric, learned[source])
                    evaluator.evaluate_merged(materialize(merged))
                evaluator.summarise()
                candidates.append(_candidate(setting, evaluator, metric))
        sign = 1 if metric.higher_is_better else -1
        merits = [-inf if isnan(c.score) else sign * c.score for c in candidates]
        winner = merits.index(max(merits))
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
            method=settings[winner].node,
        )

    def _metric(self, evaluator: Evaluator) -> MetricInfo:
        """Return the metric for comparing settings."""
        infos = evaluator.task_infos(every=True)
        own = {task: r for model in evaluator.models.values() for task, r in model.tasks.items()}
        without = [
            task
            for task, info in infos.items()
            if task not in own or not info.main_metric.normalise or not own[task].main.value > 0
        ]
        common = same_metric(infos.values())
        if self.metric in (None, NORMALIZED) and not without:
            return MetricInfo(name=NORMALIZED, unit="%", higher_is_better=True)
        if common is not None and self.metric in (None, common.name):
            return common
        others = f" Give {{here}}metric={common.name}." if common is not None else ""
        if self.metric in (None, NORMALIZED):
            raise FusionBenchError(
                f"there is no normalised value on '{without[0]}': its own model was not evaluated, "
                "or has a value of 0 there.",
                others.strip(),
                place=("metric",),
            )
        raise FusionBenchError(
            f"'{self.metric}' is not the main metric of all tasks.",
            f"Give {{here}}metric={NORMALIZED if common is None else common.name}.",
            place=("metric",),
        )


def _candidate(setting: Setting, evaluator: Evaluator, metric: MetricInfo) -> Candidate:
    merged = {name: model for name, model in evaluator.models.items() if model.role == "merged"}
    results = [(task, r) for model in merged.values() for task, r in model.tasks.items()]
    tasks = dict(results)
    if len(results) > len(tasks):
        raise FusionBenchError(
            f"{class_name(setting.method)} returns several models for each task, "
            f"{', '.join(merged)}, so there is no single score.",
            "Choose another method.",
            place=("search",),
        )
    values = [r.main for r in tasks.values()]
    if metric.name == NORMALIZED:
        infos = evaluator.task_infos()
        values = [_share(r.main, infos[task].main_metric) for task, r in tasks.items()]
    mean = mean_value(values)
    return Candidate(
        options=setting.options,
        score=mean.value,
        score_stderr=mean.stderr,
        tasks={task: r.model_copy(update={"per_class": None}) for task, r in tasks.items()},
    )


def _share(value: Value, metric: MetricInfo) -> Value:
    """Return a normalised value and its standard error, which takes the own model's as given.

    An error of 0 is infinitely better than any other.
    """
    perfect = value.value == 0 and not metric.higher_is_better
    share = inf if perfect else value.normalized or 0.0
    error = None
    if value.stderr is not None:
        error = abs(share / value.value) * value.stderr if value.value else 0.0
    return Value(value=share, stderr=error)
