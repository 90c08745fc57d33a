"""Figures of a search's settings, on all samples of a split or on some."""

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray

from fusion_bench.method.contract import Product
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.evaluating import Evaluator, several_models
from fusion_bench.programs.fusing import MERGED, TuningData, fuse, materialize, tuning_data
from fusion_bench.programs.pools import EvaluatesParts, PlacedModelPool, TaskPool
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.spec import FusionSpec
from fusion_bench.progress import step
from fusion_bench.report import Candidate, MetricInfo, ModelResult, TaskResult, Value
from fusion_bench.report.schema import NORMALIZED, mean_value, same_metric
from fusion_bench.results import SampleScores
from fusion_bench.results.metrics import Numbers, mean

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData


_GRID = "Use fusion_bench.programs.GridSearch."


class SettingEvaluator:
    """Evaluates settings on parts of a split.

    Args:
        data: the split's data by dataset.
        modelpool: the models.
        taskpool: the tasks.
        fabric: the device, precision and processes; all processes must make the same calls.
        spec: of the run.
        metric: as in ``GridSearch``.

    Attributes:
        settings: those that are evaluated, which may be added to.
        count: how many there will be, for the progress.

    Raises:
        FusionBenchError: a task pool that evaluates no parts, or a task whose main metric is not a
            mean over samples.
    """

    def __init__(
        self,
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
        metric: str | None,
    ):
        pool = taskpool.evaluating(data)
        if not isinstance(pool, EvaluatesParts):
            raise FusionBenchError(
                f"a {type(pool).__name__} evaluates whole splits only.", _GRID, place=("search",)
            )
        self._modelpool, self._taskpool = modelpool, taskpool
        self._fabric, self._spec = fabric, spec
        self._evaluator = Evaluator(modelpool, pool, fabric, "own_task", spec.fast_dev_run)
        self._wanted = metric
        self._metrics = {task: pool.describe(task).metrics for task in pool.task_names}
        self._main = {task: metrics[0] for task, metrics in self._metrics.items()}
        for task, main in self._main.items():
            if main.value is not mean or main.unit != "%":
                raise _no_share(task, main.name)
        self._universe = {
            task: pool.samples(task, fabric, fast_dev_run=spec.fast_dev_run)
            for task in pool.task_names
        }
        self._learned: dict[str | None, TuningData] = {}
        self._scores: list[dict[str, SampleScores]] = []
        self.settings: list[Setting] = []
        self.count = 0

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each task has."""
        return {task: len(samples) for task, samples in self._universe.items()}

    @property
    def samples_of_individuals(self) -> int:
        """How many samples the individual models are evaluated on."""
        if self._spec.baselines == "none":
            return 0
        return sum(len(self._universe[t]) for _, own in self._evaluator.individuals() for t in own)

    def evaluate_individuals(self) -> None:
        """Evaluate each individual model on its own task, and choose the metric.

        Raises:
            FusionBenchError: a metric that cannot be had; its place is the search's.
        """
        if self._spec.baselines != "none":
            self._evaluator.evaluate_individuals()
        self.metric = metric_of(self._evaluator, self._wanted)
        low = [task for task, main in self._main.items() if not main.higher_is_better]
        if self.metric.name == NORMALIZED and low:
            raise FusionBenchError(
                f"a race needs a metric that is higher where a model is better, and that of "
                f"'{low[0]}' is lower. Give {{here}}metric={self._main[low[0]].name}.",
                place=("metric",),
            )
        self._individuals = dict(self._evaluator.models)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the tasks' means in the score."""
        count = len(self._universe)
        if self.metric.name != NORMALIZED:
            return dict.fromkeys(self._universe, 1 / count)
        own = {task: r for m in self._individuals.values() for task, r in m.tasks.items()}
        return {task: 1 / (count * own[task].main.value) for task in self._universe}

    def __call__(self, number: int, samples: Mapping[str, NDArray[np.int64]]) -> dict[str, Numbers]:
        """Return a setting's values of samples, which are numbered by task; 1 is the best."""
        setting = self.settings[number]
        wanted = {task: self._universe[task][own] for task, own in samples.items()}
        with step(f"setting {number + 1} of {self.count}"):
            merged = fused(
                setting, self._modelpool, self._taskpool, self._fabric, self._spec, self._learned
            )
            found = self._evaluator.evaluate_part(setting.method, materialize(merged), wanted)
        self._scores += [{} for _ in range(number + 1 - len(self._scores))]
        kept = self._scores[number]
        values = {}
        for task, new in found.items():
            kept[task] = kept[task].joined(new) if task in kept else new
            main = self._main[task]
            rows = new.statistics[main.name]
            if (rows[:, 1] != 1).any() or (np.abs(rows[:, 0] - 0.5) > 0.5).any():
                raise _no_share(task, main.name)
            values[task] = rows[:, 0] if main.higher_is_better else 1 - rows[:, 0]
        return values

    def candidate(self, number: int) -> Candidate:
        """Return the report of a setting on the samples that it was evaluated on."""
        evaluator, scores = self._evaluator, self._scores[number]
        results = {t: TaskResult.of(s, self._metrics[t]) for t, s in scores.items()}
        merged = ModelResult(role="merged", identity="", num_parameters=0, tasks=results)
        evaluator.models = self._individuals | {MERGED: merged}
        evaluator.summarise()
        found = candidate(self.settings[number], evaluator, self.metric)
        return found.model_copy(update={"num_samples": sum(s.num_samples for s in scores.values())})


def _no_share(task: str, metric: str) -> FusionBenchError:
    return FusionBenchError(
        f"'{metric}' on '{task}' is not a mean over samples of values from 0 to 100 %, which a "
        "race needs.",
        _GRID,
        place=("search",),
    )


def fused(
    setting: Setting,
    modelpool: PlacedModelPool,
    taskpool: TaskPool,
    fabric: Fabric,
    spec: FusionSpec,
    learned: "dict[str | None, TuningData]",
) -> dict[str, Product]:
    """Return a setting's merged models, the same ones each time; ``learned`` keeps the data."""
    if spec.seed is not None:  # so that a setting does not depend on those before it
        fabric.seed_everything(spec.seed, verbose=False)
    method, source = setting.method, setting.method.needs.split
    if source not in learned:
        allowed = spec.allow_test_split
        learned[source] = tuning_data(method, modelpool, taskpool, fabric, allowed, spec.places)
    with setting.located(keyed_only=True):
        return fuse(method, modelpool, fabric, learned[source])


def metric_of(evaluator: Evaluator, wanted: str | None) -> MetricInfo:
    """Return the metric for comparing settings, once the individual models were evaluated.

    Args:
        evaluator: their results.
        wanted: as in ``GridSearch``.

    Raises:
        FusionBenchError: a metric that cannot be had.
    """
    infos = evaluator.task_infos(every=True)
    own = {task: r for model in evaluator.models.values() for task, r in model.tasks.items()}
    without = [
        task
        for task, info in infos.items()
        if task not in own or not info.main_metric.normalise or not own[task].main.value > 0
    ]
    common = same_metric(infos.values())
    if wanted in (None, NORMALIZED) and not without:
        return MetricInfo(name=NORMALIZED, unit="%", higher_is_better=True)
    if common is not None and wanted in (None, common.name):
        return common
    others = f" Give {{here}}metric={common.name}." if common is not None else ""
    if wanted in (None, NORMALIZED):
        raise FusionBenchError(
            f"there is no normalised value on '{without[0]}': its own model was not evaluated, "
            "or has a value of 0 there.",
            others.strip(),
            place=("metric",),
        )
    raise FusionBenchError(
        f"'{wanted}' is not the main metric of all tasks.",
        f"Give {{here}}metric={NORMALIZED if common is None else common.name}.",
        place=("metric",),
    )


def candidate(setting: Setting, evaluator: Evaluator, metric: MetricInfo) -> Candidate:
    """Return the report of a setting, whose models are among the evaluator's."""
    merged = {name: model for name, model in evaluator.models.items() if model.role == "merged"}
    results = [(task, r) for model in merged.values() for task, r in model.tasks.items()]
    tasks = dict(results)
    if len(results) > len(tasks):
        raise several_models(setting.method, merged)
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
