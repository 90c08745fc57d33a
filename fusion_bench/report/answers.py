"""The predictions of every model for every sample, for comparisons."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fusion_bench.problems import ConfigError
from fusion_bench.report.schema import Report
from fusion_bench.storage import write_bytes

Numbers = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TaskAnswers:
    """One task's samples and the models' predictions.

    Attributes:
        samples: which of the dataset's samples were evaluated, in ascending order; int32.
        labels: their classes.
        predictions: the predicted classes by model name.
    """

    samples: Numbers
    labels: Numbers
    predictions: dict[str, Numbers] = field(default_factory=dict)

    def right(self, model: str) -> NDArray[np.bool_]:
        """Return which samples a model classified correctly."""
        return self.predictions[model] == self.labels


class Answers:
    """All predictions of a run, by task. They are saved next to its report, as safetensors."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskAnswers] = {}

    @staticmethod
    def path(report: Path) -> Path:
        """Return the path of a report's predictions."""
        return report.with_name(f"{report.stem}.answers.safetensors")

    def add(self, task: str, model: str, found: TaskAnswers) -> None:
        """Add a model's predictions; all models have the same samples."""
        own = self.tasks.setdefault(task, TaskAnswers(found.samples, found.labels))
        own.predictions[model] = found.predictions[model]

    def save(self, report: Path) -> None:
        """Write the predictions next to the report."""
        arrays: dict[str, Numbers] = {}
        for task, found in self.tasks.items():
            arrays[_name("samples", task)] = found.samples
            arrays[_name("labels", task)] = found.labels
            for model, predictions in found.predictions.items():
                arrays[_name("predictions", task, model)] = predictions
        write_bytes(self.path(report), save(arrays))

    @classmethod
    def load(cls, path: Path, report: Report | None = None) -> "Answers":
        """Read the predictions of a report.

        Args:
            path: the report's file.
            report: its content; if given, the predictions must be those of its models.

        Raises:
            ConfigError: there are none, the file is no such file, or does not fit the report.
        """
        place = cls.path(path)
        try:
            arrays = load(place.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"'{place}' is missing: it contains the predictions of '{path.name}'. Keep both "
                "files together."
            ) from error
        except Exception as error:  # from a damaged file the library makes anything
            raise ConfigError(f"'{place}' cannot be read: {error}") from error
        try:
            answers = cls._from_arrays(arrays)
            if report is not None:
                answers._refuse_others(report)
        except (LookupError, ValueError) as error:
            raise ConfigError(
                f"'{place}' does not contain the predictions of a report: {error}"
            ) from error
        return answers

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, Numbers]) -> "Answers":
        answers = cls()
        parts = {tuple(map(unquote, name.split("/"))): array for name, array in arrays.items()}
        for name in sorted(parts):
            if name[0] == "samples":
                answers.tasks[name[1]] = TaskAnswers(parts[name], parts["labels", name[1]])
        for name, predictions in parts.items():
            if name[0] == "predictions":
                _, task, model = name
                answers.tasks[task].predictions[model] = predictions
        for task, found in answers.tasks.items():
            if found.samples.ndim != 1 or len(np.unique(found.samples)) != found.samples.size:
                raise ValueError(f"'{task}' is not a list of samples")
            for array in (found.samples, found.labels, *found.predictions.values()):
                if array.dtype != np.int32 or array.shape != found.samples.shape:
                    raise ValueError(f"'{task}' does not have one number per sample")
        return answers

    def _refuse_others(self, report: Report) -> None:
        """Raise ``ValueError`` for missing or invalid predictions of an evaluated model."""
        for name, model in report.models.items():
            for task in model.tasks:
                found, classes = self.tasks[task], report.tasks[task].num_classes
                for array in (found.labels, found.predictions[name]):
                    if array.size and not 0 <= array.min() <= array.max() < classes:
                        raise ValueError(
                            f"'{task}' has {classes} classes, and a prediction is not one of them"
                        )


def _name(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)
