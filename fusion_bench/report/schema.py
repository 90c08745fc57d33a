"""The result of a run, as in ``report.json``."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.report.schema_1 import lifted_report
from fusion_bench.results import Interval, Metric, SampleScores, normalized, stderr
from fusion_bench.storage import read_plausible, write_text
from fusion_bench.tasks import canonical_name

if TYPE_CHECKING:
    import pandas

Role = Literal["pretrained", "individual", "merged"]
Relation = Literal["own", "other", "held_out"]
Split = Literal["train", "validation", "test"]
Verdict = Literal["better", "worse", "not distinguishable"]
_ABBREVIATIONS = {"auc": "AUC", "f1": "F1", "iou": "IoU", "rmse": "RMSE"}
#: What several tasks are compared by where their metrics differ.
NORMALIZED = "normalized"


#: Of ``Report.to_pandas``.
_COLUMNS = (
    *("model", "role", "task", "relation", "metric", "unit"),
    *("value", "stderr", "normalized", "num_samples"),
)

T = TypeVar("T", bound=BaseModel)


def read_model(kind: type[T], path: Path, name: str) -> T:
    """Read a run's JSON file, of this or an earlier schema; ``name`` is its name in messages.

    Raises:
        ConfigError: there is none, or it is none of a known version.
    """
    try:
        return kind.model_validate_json(read_plausible(path))
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"'{path}' is not a {name} of this version: {place}: {reason}."
        ) from error


class Strict(BaseModel):
    """What a file holds; a key that is not known is refused.

    JSON has no nan: a value that does not exist is written as text.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Seconds(Strict):
    """Wall-clock time of each step, in seconds."""

    load: float
    fuse: float
    evaluate: float
    total: float
    search: float = 0.0


class TuningTask(Strict):
    """A dataset that a method learned from."""

    num_samples: int
    fingerprint: str


class Tuning(Strict):
    """The data that the method learned from.

    ``test_split``: models are evaluated on the same data.
    """

    split: str
    labels: bool
    test_split: bool
    tasks: dict[str, TuningTask]

    def sentence(self) -> str:
        """Return it in words."""
        labels = "with their labels" if self.labels else "without labels"
        if not self.test_split:
            return f"tuned on the {self.split} split, {labels}"
        if self.labels:
            return "tuned on the test split with its labels: the figures do not apply to new data"
        return "adapted to the unlabelled data of the test split (test-time adaptation)"


class MetricInfo(Strict):
    """How a metric's values are read.

    Attributes:
        name: as in the results.
        unit: ``%`` for a fraction that is shown in percent; otherwise what follows a value.
        higher_is_better: whether a greater value is a better one.
        normalise: whether values may be divided by that of the task's own model.
        source: the name of a user's function that returns the metric.
    """

    name: str
    unit: str
    higher_is_better: bool
    normalise: bool = True
    source: str | None = None

    @property
    def label(self) -> str:
        """The name in words."""
        return " ".join(_ABBREVIATIONS.get(word, word) for word in self.name.split("_"))


class TaskInfo(Strict):
    """What models were evaluated on.

    Attributes:
        kind: the kind of task, such as ``image_classification``.
        main: the most important metric.
        metrics: all of them, the main one first.
        num_samples: how many samples were evaluated.
        identity: hashes of what the figures depend on besides the models, by what it is.
        owner: the model that was trained for the task.
        num_classes: of a task with classes.
        classes: their names, if results are told class by class.
    """

    kind: str
    main: str
    metrics: list[MetricInfo]
    num_samples: int
    identity: dict[str, str | None]
    owner: str | None = None
    num_classes: int | None = None
    classes: list[str] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "TaskInfo":
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError("the number of class names differs from the number of classes")
        if not self.metrics or self.metrics[0].name != self.main:
            raise ValueError("the main metric is not the first one")
        return self

    @property
    def main_metric(self) -> MetricInfo:
        """The most important metric."""
        return self.metrics[0]


class Value(Strict):
    """A metric's value, its standard error, and the share of the value of the task's own model.

    The share is greater for a better model, whatever the metric.
    """

    value: float
    stderr: float | None = None
    normalized: float | None = None


class TaskResult(Strict):
    """The result of one model on one task; the main metric is the first one.

    ``per_class`` is the accuracy of each class, where the task has classes and tells them.
    """

    num_samples: int
    relation: Relation | None = None
    metrics: dict[str, Value]
    per_class: list[float | None] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "TaskResult":
        if not self.metrics:
            raise ValueError("it has no metric")
        return self

    @property
    def main(self) -> Value:
        """The value of the main metric."""
        return next(iter(self.metrics.values()))

    @classmethod
    def of(
        cls,
        scores: SampleScores,
        metrics: Iterable[Metric],
        per_class: list[float | None] | None = None,
    ) -> "TaskResult":
        """Compute the values of metrics and their standard errors."""
        return cls(
            num_samples=scores.num_samples,
            metrics={
                metric.name: Value(
                    value=scores.value(metric), stderr=_finite(stderr(metric, scores))
                )
                for metric in metrics
                if scores.has(metric)
            },
            per_class=per_class,
        )


class Average(Strict):
    """The mean over the tasks that a model was evaluated on, each task weighing the same.

    Attributes:
        metrics: the averages of metrics, the main one first; none where the tasks have different
            main metrics, because such values have no meaningful sum.
        normalized: the average share of the own models' values of the main metrics.
    """

    metrics: dict[str, Value]
    normalized: float | None = None

    @property
    def main(self) -> Value | None:
        """The average of the main metric, if all tasks have the same."""
        return next(iter(self.metrics.values()), None)

    @classmethod
    def over(cls, results: Mapping[str, TaskResult], tasks: Mapping[str, TaskInfo]) -> "Average":
        """Average the results of tasks."""
        found = list(results.values())
        metrics = {}
        if same_metric(tasks[task] for task in results):
            for name in found[0].metrics:
                if all(name in result.metrics for result in found):
                    metrics[name] = mean_value([result.metrics[name] for result in found])
        shares = [r.main.normalized for r in found]
        return cls(metrics=metrics, normalized=_mean(shares))


def same_metric(tasks: Iterable[TaskInfo]) -> MetricInfo | None:
    """Return the main metric that all tasks have; ``None`` where it differs."""
    mains = {(t.main, t.main_metric.unit): t.main_metric for t in tasks}
    return next(iter(mains.values())) if len(mains) == 1 else None


def mean_value(values: Collection[Value]) -> Value:
    """Return the mean of independent values."""
    errors = [v.stderr for v in values if v.stderr is not None]
    complete = len(errors) == len(values)
    return Value(
        value=fmean(v.value for v in values),
        stderr=math.hypot(*errors) / len(errors) if complete else None,
        normalized=_mean([v.normalized for v in values]),
    )


class Candidate(Strict):
    """A setting of a method, and its result on the search split.

    ``score`` is the mean of the search's metric over ``tasks``; its standard error takes the
    individual models' values as given. In a race, ``num_samples`` is how many samples of all tasks
    it took, and ``left`` says why it took no more: it is ``worse`` than the candidate ``led_by``,
    by the race's test, or was ``behind`` when there were not enough samples for all. Its score was
    ``behind`` that of the candidate ``led_by`` by so much, on the same samples.
    """

    options: dict[str, Any]
    score: float
    score_stderr: float | None
    tasks: dict[str, TaskResult]
    num_samples: int | None = None
    left: Literal["worse", "behind"] | None = None
    led_by: int | None = None
    behind: float | None = None

    def text(self) -> str:
        """Return the options as they are written on a command line."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items()) or "as given"


class RaceInfo(Strict):
    """The race of a search's candidates.

    Attributes:
        alpha: the best candidate of the whole split was dropped as ``worse`` with at most this
            probability.
        budget: the most samples, as a share of ``whole``; ``None`` for no limit.
        seed: of the samples' order.
        num_samples: how many were evaluated for all candidates.
        whole: how many a full search evaluates.
    """

    alpha: float
    budget: float | None
    seed: int
    num_samples: int
    whole: int


class Search(Strict):
    """The search for the method's options.

    ``metric``: ``normalized``, or the tasks' main metric, whose unit and direction are the next
    two. ``test_split``: the search used the data of the final evaluation. ``judge_test``: the
    winner was evaluated there. ``winner`` is an index into ``candidates``, and ``method`` the full
    config of the method.
    """

    split: Split
    metric: str
    unit: str = "%"
    higher_is_better: bool = True
    test_split: bool
    judge_test: bool
    space: dict[str, list[Any]]
    tasks: dict[str, TuningTask]
    candidates: list[Candidate]
    winner: int
    method: dict[str, Any]
    race: RaceInfo | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        places = range(len(self.candidates))
        if self.winner not in places:
            raise ValueError("there is no such winner")
        if any(c.led_by is not None and c.led_by not in places for c in self.candidates):
            raise ValueError("there is no such leader")
        return self

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.winner]


class Run(Strict):
    """The description of a run.

    ``command`` is as it was typed, ``method`` the name of the method's config, if there was one.
    """

    version: str
    created_at: str
    command: list[str]
    method: str | None = None
    config: dict[str, Any]
    config_sha256: str
    seed: int | None
    precision: str
    device: str
    world_size: int
    packages: dict[str, str]
    seconds: Seconds
    inputs: dict[str, str] = {}
    notes: list[str] = []
    tuning: Tuning | None = None
    search: Search | None = None


class ModelResult(Strict):
    """A model and its results.

    ``identity`` is the hash of its weights.
    """

    role: Role
    identity: str
    num_parameters: int
    tasks: dict[str, TaskResult]
    average: Average | None = None


class Difference(Strict):
    """A difference of two models' values, and its interval; fractions where the unit is ``%``."""

    difference: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, found: Interval) -> "Difference":
        """Return an interval as a difference."""
        return cls(difference=found.estimate, interval=(found.low, found.high))

    @property
    def low(self) -> float:
        """The lower end."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """The upper end."""
        return self.interval[1]


class Comparison(Strict):
    """The differences between the model ``of`` and the model ``beside``: of minus beside.

    Attributes:
        of: the first contender's name.
        beside: the second one's.
        tasks: the difference of each task's main metric, under the metric's name.
        metrics: the average difference of the main metric; empty where the tasks' differ.
        normalized: that of the normalised values.
        verdict: by the average, of normalised values where the metrics differ; none without one.
    """

    of: str
    beside: str
    tasks: dict[str, dict[str, Difference]]
    metrics: dict[str, Difference]
    normalized: Difference | None = None
    verdict: Verdict | None

    def on(self, task: str) -> Difference | None:
        """Return the difference of a task's main metric."""
        return next(iter(self.tasks.get(task, {}).values()), None)

    @property
    def average(self) -> Difference | None:
        """The average difference: of the main metric, or else of normalised values."""
        return next(iter(self.metrics.values()), self.normalized)


class Similarity(Strict):
    """The similarity of the models' task vectors, for each part of the network.

    ``norms`` has a row per part and a value per model; ``cosines`` a matrix per part.
    """

    models: list[str]
    parts: list[str]
    norms: list[list[float]]
    cosines: list[list[list[float]]]

    @model_validator(mode="after")
    def _fits(self) -> "Similarity":
        models, parts = len(self.models), len(self.parts)
        if not models or not parts:
            raise ValueError("it has no models or no parts")
        matrices = (self.norms, *self.cosines)
        heights = [parts] + [models] * len(self.cosines)
        square = all(
            len(matrix) == height and all(len(row) == models for row in matrix)
            for matrix, height in zip(matrices, heights, strict=True)
        )
        if len(self.cosines) != parts or not square:
            raise ValueError("the number of figures does not match the models and parts")
        return self


class Contender(NamedTuple):
    """A row of a comparison: a model, or several models that count as one.

    Attributes:
        name: the name in tables.
        role: the models'.
        models: each task that it was evaluated on, to the model that was evaluated.
    """

    name: str
    role: Role
    models: dict[str, str]


class Report(Strict):
    """The whole result of a run."""

    schema_version: Literal[2] = 2
    run: Run
    tasks: dict[str, TaskInfo]
    models: dict[str, ModelResult]
    comparisons: list[Comparison] = []
    similarity: Similarity | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, content: Any) -> Any:
        return lifted_report(content)

    @model_validator(mode="after")
    def _fits(self) -> "Report":
        spellings = set(map(canonical_name, self.models))
        for name, model in self.models.items():
            if unknown := model.tasks.keys() - self.tasks.keys():
                raise ValueError(f"'{name}' was evaluated on '{min(unknown)}', which is not a task")
            for task, result in model.tasks.items():
                if next(iter(result.metrics)) != self.tasks[task].main:
                    raise ValueError(f"'{name}' has another main metric than the task '{task}'")
                known = {metric.name for metric in self.tasks[task].metrics}
                if strange := result.metrics.keys() - known:
                    raise ValueError(f"'{task}' has no metric '{min(strange)}'")
                if result.relation is None:
                    owner = self.tasks[task].owner
                    result.relation = _relation(name, model.role, owner, self.models, spellings)
        for comparison in self.comparisons:
            if unknown := comparison.tasks.keys() - self.tasks.keys():
                raise ValueError(f"a comparison is of '{min(unknown)}', which is not a task")
        return self

    @property
    def objective(self) -> float | None:
        """The value that a sweeper maximises: the search's best score, if there is a search.

        Where a lower score is better, it is the negated score.
        """
        search = self.run.search
        if search is None:
            return None
        return search.best.score if search.higher_is_better else -search.best.score

    @property
    def main_metric(self) -> MetricInfo | None:
        """The main metric of all tasks; ``None`` where they differ, or there is no task."""
        return same_metric(self.tasks.values())

    def contenders(self) -> list[Contender]:
        """Return the compared rows: pretrained, individual, merged.

        Individual models that were each evaluated on their own tasks alone are one contender, which
        has each task's own model; in the full matrix each model is one. So it is with merged
        models, such as ``merged/a`` and ``merged/b``, that have the same name before the slash.
        """
        found = []
        for role in get_args(Role):
            kin: dict[str, dict[str, ModelResult]] = {}
            for name, model in self.models.items():
                if model.role == role and (model.tasks or role == "merged"):
                    family = name.partition("/")[0] if role == "merged" else role
                    kin.setdefault(family, {})[name] = model
            for family, models in kin.items():
                found += _contenders(family, role, models)
        return found

    def results(self, contender: Contender) -> dict[str, TaskResult]:
        """Return a contender's result on each evaluated task."""
        return {task: self.models[name].tasks[task] for task, name in contender.models.items()}

    def average(self, contender: Contender) -> Average | None:
        """Return a contender's average over its tasks."""
        results = self.results(contender)
        return Average.over(results, self.tasks) if results else None

    def main_comparisons(self) -> list[Comparison]:
        """Return the most important comparisons.

        A single merged contender is compared with the pretrained and the individual models; if
        there are several, each is compared with the first.
        """
        merged = [contender.name for contender in self.contenders() if contender.role == "merged"]
        others = merged[:1] if len(merged) > 1 else ["pretrained", "individual"]
        return [comparison for comparison in self.comparisons if comparison.beside in others]

    def own_models(self) -> dict[str, str]:
        """Return each task's own model, if it was evaluated on the task."""
        return {
            task: info.owner
            for task, info in self.tasks.items()
            if info.owner in self.models and task in self.models[info.owner].tasks
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures, a row for each model, task and metric; fractions where the unit is %.

        Raises:
            FusionBenchError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise FusionBenchError(
                "pandas is not installed.", "Install it: 'pip install pandas'."
            ) from error
        units = {(t, m.name): m.unit for t, info in self.tasks.items() for m in info.metrics}
        return pandas.DataFrame(
            [
                {
                    "model": name,
                    "role": model.role,
                    "task": task,
                    "relation": result.relation,
                    "metric": metric,
                    "unit": units[task, metric],
                    **value.model_dump(),
                    "num_samples": result.num_samples,
                }
                for name, model in self.models.items()
                for task, result in model.tasks.items()
                for metric, value in result.metrics.items()
            ],
            columns=_COLUMNS,
        )

    def _repr_html_(self) -> str:
        """Return the most important figures, for notebooks."""
        from fusion_bench.report.page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        models, tasks = ", ".join(self.models), ", ".join(self.tasks) or "nothing"
        return f"<Report: {models} on {tasks}; to_pandas() returns the figures>"

    __str__ = __repr__

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a report, of this or an earlier schema.

        Raises:
            ConfigError: there is none, or it is none of a known version.
        """
        return read_model(cls, path, "report")


def _contenders(family: str, role: Role, models: Mapping[str, ModelResult]) -> list[Contender]:
    """Return one contender for models on their own tasks, none twice; else one a model."""
    evaluated = {task: name for name, model in models.items() for task in model.tasks}
    apart = len(evaluated) == sum(len(model.tasks) for model in models.values())
    own = all(len(model.tasks) == 1 for model in models.values()) or (
        role == "individual"
        and all(r.relation == "own" for m in models.values() for r in m.tasks.values())
    )
    if apart and own and role != "pretrained" and evaluated:
        return [Contender(family, role, evaluated)]
    return [
        Contender(role if name == "_pretrained_" else name, role, dict.fromkeys(model.tasks, name))
        for name, model in models.items()
    ]


def summarise(models: Mapping[str, ModelResult], tasks: Mapping[str, TaskInfo]) -> None:
    """Fill in normalised values, relations and averages, by the owners of the tasks."""
    spellings = set(map(canonical_name, models))
    for name, model in models.items():
        for task, result in model.tasks.items():
            info = tasks[task]
            result.relation = _relation(name, model.role, info.owner, models, spellings)
            owner = models.get(info.owner or "")
            reference = owner.tasks.get(task) if owner else None
            references = {} if reference is None else reference.metrics
            for metric in info.metrics:
                value, own = result.metrics.get(metric.name), references.get(metric.name)
                if value is not None and own is not None and metric.normalise:
                    share = normalized(value.value, own.value, metric.higher_is_better)
                    value.normalized = _finite(float(share))
        model.average = Average.over(model.tasks, tasks) if model.tasks else None


def _relation(
    name: str,
    role: Role,
    owner: str | None,
    models: Collection[str],
    spellings: Collection[str],
) -> Relation:
    """Return whether a model was trained for a task, or made from the one that was.

    ``spellings`` are the canonical names of ``models``.
    """
    if owner is None or owner not in models:
        return "held_out"
    if role == "merged":  # from all models, unless it has the name of one
        made_for = canonical_name(name.partition("/")[2])
        if made_for not in spellings:
            return "own"
        return "own" if made_for == canonical_name(owner) else "other"
    return "own" if name == owner else "other"


def _mean(values: Collection[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there and len(there) == len(values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
