"""What every model answered, sample by sample: from it follows what a comparison can tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fusion_bench.errors import FusionBenchError
from fusion_bench.storage import write_bytes

Numbers = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TaskAnswers:
    """One task's samples, and what models made of them.

    Attributes:
        samples: which of the dataset's samples were judged, in ascending order; int32.
        labels: their classes.
        predictions: a model's name to the classes that it chose.
    """

    samples: Numbers
    labels: Numbers
    predictions: dict[str, Numbers] = field(default_factory=dict)

    def right(self, model: str) -> NDArray[np.bool_]:
        """Return which samples a model got right."""
        return self.predictions[model] == self.labels


class Answers:
    """All answers of a run, in ``tasks`` by task. They lie beside its report, as safetensors."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskAnswers] = {}

    @staticmethod
    def path(report: Path) -> Path:
        """Return where a report's answers are."""
        return report.with_name(f"{report.stem}.answers.safetensors")

    def add(self, task: str, model: str, found: TaskAnswers) -> None:
        """Add a model's answers, ``found.predictions[model]``; all models have the same samples."""
        own = self.tasks.setdefault(task, TaskAnswers(found.samples, found.labels))
        own.predictions[model] = found.predictions[model]

    def save(self, report: Path) -> None:
        """Write the answers beside the report."""
        arrays: dict[str, Numbers] = {}
        for task, found in self.tasks.items():
            arrays[_name("samples", task)] = found.samples
            arrays[_name("labels", task)] = found.labels
            for model, predictions in found.predictions.items():
                arrays[_name("predictions", task, model)] = predictions
        write_bytes(self.path(report), save(arrays))

    @classmethod
    def load(cls, report: Path) -> "Answers":
        """Read the answers that lie beside a report.

        Raises:
            FusionBenchError: there are none, or the file is no such file.
        """
        path = cls.path(report)
        try:
            arrays = load(path.read_bytes())
        except FileNotFoundError as error:
            raise FusionBenchError(
                f"'{path}' is missing: it holds the answers of '{report.name}'. Keep both files "
                "together."
            ) from error
        except (OSError, SafetensorError) as error:
            raise FusionBenchError(f"'{path}' cannot be read: {error}") from error
        return cls._from_arrays(arrays, path)

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, Numbers], path: Path) -> "Answers":
        answers = cls()
        parts = {tuple(map(unquote, name.split("/"))): array for name, array in arrays.items()}
        try:
            for name in sorted(parts):
                if name[0] == "samples":
                    answers.tasks[name[1]] = TaskAnswers(parts[name], parts["labels", name[1]])
            for name, predictions in parts.items():
                if name[0] == "predictions":
                    _, task, model = name
                    if predictions.shape != answers.tasks[task].labels.shape:
                        raise ValueError(name)
                    answers.tasks[task].predictions[model] = predictions
        except (LookupError, ValueError) as error:
            raise FusionBenchError(f"'{path}' holds no answers of a report: {error}") from error
        return answers


def _name(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)
