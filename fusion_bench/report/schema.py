"""The result of a run, as in ``report.json``."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fusion_bench.problems import ConfigError
from fusion_bench.storage import write_text
from fusion_bench.tasks import canonical_name

Role = Literal["pretrained", "individual", "merged"]
Split = Literal["train", "validation", "test"]
Metric = Literal["normalized_accuracy", "accuracy"]
Verdict = Literal["better", "worse", "not distinguishable"]


T = TypeVar("T", bound=BaseModel)


def read_model(kind: type[T], path: Path, name: str) -> T:
    """Read a run's JSON file; ``name`` is its name in messages.

    Raises:
        ConfigError: there is none, or it is none of this version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        raise ConfigError(
            f"'{path}' is not a {name} of this version: {place}: {first['msg']}."
        ) from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Seconds(_Strict):
    """Wall-clock time of each step, in seconds."""

    load: float
    fuse: float
    evaluate: float
    total: float
    search: float = 0.0


class TuningTask(_Strict):
    """A dataset that a method learned from."""

    num_samples: int
    fingerprint: str


class Tuning(_Strict):
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
        return "adapted to the unlabelled images of the test split (test-time adaptation)"


class TaskInfo(_Strict):
    """A dataset that models were evaluated on.

    The hashes cover other inputs of the figures: the classifier's parts outside the model, such as
    prompts and text tower, and the image preprocessing.
    """

    num_classes: int
    num_samples: int
    fingerprint: str
    head_sha256: str | None = None
    images_sha256: str | None = None
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "TaskInfo":
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError("the number of class names differs from the number of classes")
        return self


class TaskResult(_Strict):
    """The result of one model on one task; fractions, and nats per sample."""

    accuracy: float
    accuracy_stderr: float
    loss: float
    num_samples: int
    normalized_accuracy: float | None = None
    per_class_accuracy: list[float | None] | None = None

    @classmethod
    def from_counts(
        cls,
        num_correct: int,
        loss_sum: float,
        num_samples: int,
        per_class_accuracy: list[float | None] | None = None,
    ) -> "TaskResult":
        """Compute the figures from sums; the standard error is that of a binomial proportion."""
        accuracy = num_correct / num_samples
        return cls(
            accuracy=accuracy,
            accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / num_samples),
            loss=loss_sum / num_samples,
            num_samples=num_samples,
            per_class_accuracy=per_class_accuracy,
        )


class Average(_Strict):
    """The mean over the tasks that a model was evaluated on, each task weighing the same."""

    accuracy: float
    accuracy_stderr: float
    loss: float
    normalized_accuracy: float | None = None

    @classmethod
    def over(cls, results: Collection[TaskResult]) -> "Average":
        """Average ``results``; the normalised accuracy is empty where one of them has none."""
        normalized = [r.normalized_accuracy for r in results if r.normalized_accuracy is not None]
        return cls(
            accuracy=fmean(r.accuracy for r in results),
            accuracy_stderr=math.hypot(*(r.accuracy_stderr for r in results)) / len(results),
            loss=fmean(r.loss for r in results),
            normalized_accuracy=fmean(normalized) if len(normalized) == len(results) else None,
        )


class Candidate(_Strict):
    """A setting of a method, and its result on the search split.

    ``score`` is the mean of the search's metric over ``tasks``; its standard error takes the
    individual models' accuracies as given.
    """

    options: dict[str, Any]
    score: float
    score_stderr: float
    tasks: dict[str, TaskResult]

    def text(self) -> str:
        """Return the options as they are written on a command line."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items()) or "as given"


class Search(_Strict):
    """The search for the method's options.

    ``test_split``: the search used the data of the final evaluation. ``judge_test``: the winner was
    evaluated there. ``winner`` is an index into ``candidates``, and ``method`` the full config of
    the method.
    """

    split: Split
    metric: Metric
    test_split: bool
    judge_test: bool
    space: dict[str, list[Any]]
    tasks: dict[str, TuningTask]
    candidates: list[Candidate]
    winner: int
    method: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        if not 0 <= self.winner < len(self.candidates):
            raise ValueError("there is no such winner")
        return self

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.winner]

    def sentence(self) -> str:
        """Return it in words."""
        metric = self.metric.replace("normalized_", "normalised ")
        found = (
            f"{self.best.text()} is the best of {len(self.candidates)} settings"
            if len(self.candidates) > 1
            else f"one setting, {self.best.text()}, was evaluated"
        )
        found += f" on the {self.split} split"
        found += f" ({metric} {100 * self.best.score:.1f} ± {100 * self.best.score_stderr:.1f})"
        if self.test_split:
            return f"{found}, where the models are evaluated: the figures do not apply to new data"
        if not self.judge_test:
            return f"{found}; the test split was not used"
        return f"{found}; only this setting was evaluated on the test split, once"


class Run(_Strict):
    """The description of a run."""

    version: str
    created_at: str
    command: list[str]
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


class ModelResult(_Strict):
    """A model and its results."""

    role: Role
    weights_sha256: str
    num_parameters: int
    tasks: dict[str, TaskResult]
    average: Average | None = None


class Difference(_Strict):
    """A difference of two models' accuracies, and its interval; fractions."""

    estimate: float
    low: float
    high: float


class Comparison(_Strict):
    """The differences between ``model`` and ``other``: model minus other."""

    model: str
    other: str
    tasks: dict[str, Difference]
    accuracy: Difference
    normalized_accuracy: Difference | None = None
    verdict: Verdict

    def sentence(self) -> str:
        """Return it in words."""
        estimate, low, high = (
            f"{100 * value:+.1f}"
            for value in (self.accuracy.estimate, self.accuracy.low, self.accuracy.high)
        )
        what = {
            "better": f"is better than {self.other}",
            "worse": f"is worse than {self.other}",
            "not distinguishable": f"and {self.other} are not distinguishable",
        }[self.verdict]
        tasks = f"{len(self.tasks)} test sets" if len(self.tasks) > 1 else "this test set"
        return (
            f"{self.model} {what} on {tasks}: {estimate} points of accuracy "
            f"(95 % interval {low} to {high})."
        )


class Similarity(_Strict):
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


class Report(_Strict):
    """The whole result of a run."""

    schema_version: Literal[1] = 1
    run: Run
    tasks: dict[str, TaskInfo]
    models: dict[str, ModelResult]
    comparisons: list[Comparison] = []
    similarity: Similarity | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Report":
        for name, model in self.models.items():
            if unknown := model.tasks.keys() - self.tasks.keys():
                raise ValueError(f"'{name}' was evaluated on '{min(unknown)}', which is not a task")
        for comparison in self.comparisons:
            if unknown := comparison.tasks.keys() - self.tasks.keys():
                raise ValueError(f"a comparison is of '{min(unknown)}', which is not a task")
        return self

    @property
    def objective(self) -> float | None:
        """The value that a sweeper maximises: the search's best score, if there is a search."""
        return None if self.run.search is None else self.run.search.best.score

    def contenders(self) -> list[Contender]:
        """Return the compared rows: pretrained, individual, merged.

        Individual models that were each evaluated on their own task alone are one contender, which
        has each task's own model; in the full matrix each model is one. So it is with merged
        models, such as ``merged/a`` and ``merged/b``, that have the same name before the slash.
        """
        found = []
        for role in get_args(Role):
            kin: dict[str, dict[str, list[str]]] = {}
            for name, model in self.models.items():
                if model.role == role:
                    family = name.partition("/")[0] if role == "merged" else role
                    kin.setdefault(family, {})[name] = list(model.tasks)
            for family, models in kin.items():
                found += _contenders(family, role, models)
        return found

    def results(self, contender: Contender) -> dict[str, TaskResult]:
        """Return a contender's result on each evaluated task."""
        return {task: self.models[name].tasks[task] for task, name in contender.models.items()}

    def main_comparisons(self) -> list[Comparison]:
        """Return the most important comparisons.

        A single merged contender is compared with the pretrained and the individual models; if
        there are several, each is compared with the first.
        """
        merged = [contender.name for contender in self.contenders() if contender.role == "merged"]
        others = merged[:1] if len(merged) > 1 else ["pretrained", "individual"]
        return [comparison for comparison in self.comparisons if comparison.other in others]

    def own_models(self) -> dict[str, str]:
        """Return each task's individual model, if it was evaluated."""
        return {
            task: name
            for name, model in self.models.items()
            if model.role == "individual"
            for task in model.tasks
            if canonical_name(task) == canonical_name(name)
        }

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a report.

        Raises:
            ConfigError: there is none, or it is none of this version.
        """
        return read_model(cls, path, "report")


def _contenders(family: str, role: Role, models: Mapping[str, list[str]]) -> list[Contender]:
    """Return one contender for models that have a task each, none twice; else one a model."""
    evaluated = [task for tasks in models.values() for task in tasks]
    if len(evaluated) == len(models) == len(set(evaluated)) and role != "pretrained" and evaluated:
        return [Contender(family, role, {tasks[0]: name for name, tasks in models.items()})]
    return [
        Contender(role if name == "_pretrained_" else name, role, dict.fromkeys(tasks, name))
        for name, tasks in models.items()
    ]


def summarise(models: Mapping[str, ModelResult], own_model: Mapping[str, str]) -> None:
    """Fill in normalised accuracies and averages.

    ``own_model`` names the individual model of each task. The normalised accuracy is the accuracy
    divided by the individual model's on the same task; it stays empty where none was evaluated.
    """
    for model in models.values():
        for task, result in model.tasks.items():
            individual = models.get(own_model.get(task, ""))
            reference = individual.tasks.get(task) if individual else None
            if reference is not None and reference.accuracy > 0:
                result.normalized_accuracy = result.accuracy / reference.accuracy
        if model.tasks:
            model.average = Average.over(model.tasks.values())
