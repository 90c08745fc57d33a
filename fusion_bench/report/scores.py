"""The scores of every model on every sample, for comparisons."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fusion_bench.problems import ConfigError
from fusion_bench.report.schema import MetricInfo, Report
from fusion_bench.results import METRICS, Example, Metric, SampleScores
from fusion_bench.storage import write_bytes
from fusion_bench.trust import find

Arrays = Mapping[tuple[str, ...], NDArray[np.generic]]


class Scores:
    """All scores of a run. They are saved next to its report, as safetensors.

    Attributes:
        tasks: a task's name to each model's scores on it; all models have the same samples.
        metrics: a task's name to its metrics, the main one first.
        examples: a task's name to some samples as people read them, by number; they are not saved.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, dict[str, SampleScores]] = {}
        self.metrics: dict[str, list[Metric]] = {}
        self.examples: dict[str, dict[int, Example]] = {}

    @staticmethod
    def path(report: Path) -> Path:
        """Return the path of a report's scores."""
        return report.with_name(f"{report.stem}.scores.safetensors")

    def add(self, task: str, model: str, scores: SampleScores) -> None:
        """Add a model's scores."""
        self.tasks.setdefault(task, {})[model] = scores

    def main(self, task: str) -> Metric:
        """Return a task's main metric."""
        return self.metrics[task][0]

    def save(self, report: Path) -> None:
        """Write the scores next to the report; what all models of a task share is there once."""
        arrays: dict[tuple[str, ...], NDArray[np.generic]] = {}
        for task, models in self.tasks.items():
            found = {model: scores.arrays() for model, scores in models.items()}
            for name in dict.fromkeys(chain.from_iterable(found.values())):
                own = {model: parts[name] for model, parts in found.items() if name in parts}
                first, *others = own.values()
                if len(own) == len(found) and all(np.array_equal(first, o) for o in others):
                    own = {"": first}
                arrays |= {(task, model, *name): array for model, array in own.items()}
            arrays |= {(task, model, "model"): np.empty(0, np.uint8) for model in models}
        write_bytes(self.path(report), save({_joined(n): array for n, array in arrays.items()}))

    @classmethod
    def load(cls, path: Path, report: Report | None = None) -> "Scores":
        """Read the scores of a report.

        Args:
            path: the report's file.
            report: its content; if given, the scores must be those of its models.

        Raises:
            ConfigError: there are none, the file is no such file, or does not fit the report.
            FusionBenchError: a user's metric that may not be imported.
        """
        place, read = cls.path(path), cls._from_arrays
        if not place.exists() and _answers(path).exists():
            place, read = _answers(path), cls._from_answers
        try:
            arrays = load(place.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"'{place}' is missing: it contains the scores of '{path.name}'. Keep both "
                "files together."
            ) from error
        except Exception as error:  # from a damaged file the library makes anything
            raise ConfigError(f"'{place}' cannot be read: {error}") from error
        try:
            scores = read({_parted(name): array for name, array in arrays.items()})
            if report is not None:
                scores.metrics = {t: list(map(metric, i.metrics)) for t, i in report.tasks.items()}
                scores._refuse_others(report)
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"'{place}' does not contain the scores of a report: {error}"
            ) from error
        return scores

    @classmethod
    def _from_arrays(cls, arrays: Arrays) -> "Scores":
        shared: dict[str, dict[tuple[str, ...], NDArray[np.generic]]] = {}
        own: dict[tuple[str, str], dict[tuple[str, ...], NDArray[np.generic]]] = {}
        for (task, model, *name), array in arrays.items():
            if name == ["model"]:
                own.setdefault((task, model), {})
            elif model:
                own.setdefault((task, model), {})[tuple(name)] = array
            else:
                shared.setdefault(task, {})[tuple(name)] = array
        scores = cls()
        for task, model in sorted(own):
            parts = {**shared.get(task, {}), **own[task, model]}
            scores.add(task, model, SampleScores.from_arrays(parts))
        return scores

    @classmethod
    def _from_answers(cls, arrays: Arrays) -> "Scores":
        """Read the file beside a report of schema 1: labels and predicted classes."""
        scores = cls()
        for (kind, task, *model), predictions in sorted(arrays.items(), key=lambda item: item[0]):
            if kind == "predictions":
                found = arrays["samples", task], arrays["labels", task], predictions
                if any(array.dtype != np.int32 for array in found):
                    raise ValueError(f"'{task}' does not have one whole number per sample")
                samples, labels, answers = (array.astype(np.int64) for array in found)
                scores.add(task, model[0], SampleScores.classified(samples, labels, answers))
        return scores

    def _refuse_others(self, report: Report) -> None:
        """Raise ``ValueError`` for missing or invalid scores of an evaluated model."""
        for name, model in report.models.items():
            for task in model.tasks:
                found, info = self.tasks[task][name], report.tasks[task]
                first = next(iter(self.tasks[task].values()))
                main = self.main(task)
                if not found.has(main):
                    raise ValueError(f"'{name}' has no {main.name} on '{task}'")
                if not np.array_equal(found.samples, first.samples):
                    raise ValueError(f"'{name}' has other samples of '{task}'")
                if main.value is not None:
                    shapes = (s.statistics[main.name].shape for s in (found, first))
                    if len(set(shapes)) > 1:
                        raise ValueError(f"'{name}' has other statistics of '{task}'")
                for which in ("labels", "predictions"):
                    array = found.details.get(which, np.empty(0))
                    if info.num_classes is None or not array.size:
                        continue
                    if not 0 <= array.min() <= array.max() < info.num_classes:
                        raise ValueError(
                            f"'{task}' has {info.num_classes} classes, and a prediction is not "
                            "one of them"
                        )


def metric(info: MetricInfo) -> Metric:
    """Return the metric that a report names.

    Raises:
        FusionBenchError: a user's metric that may not be imported.
        ValueError: a metric that is not known.
    """
    found = METRICS.get(info.name) if info.source is None else find(info.source)()
    if not isinstance(found, Metric):
        raise ValueError(f"there is no metric '{info.source or info.name}'")
    return replace(
        found,
        unit=info.unit,
        higher_is_better=info.higher_is_better,
        normalise=info.normalise,
    )


def metric_info(metric: Metric) -> MetricInfo:
    """Return how a metric's values are read, for a report."""
    return MetricInfo(
        name=metric.name,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        normalise=metric.normalise,
        source=metric.source,
    )


def _answers(report: Path) -> Path:
    return report.with_name(f"{report.stem}.answers.safetensors")


def _joined(parts: tuple[str, ...]) -> str:
    return "/".join(quote(part, safe="") for part in parts)


def _parted(name: str) -> tuple[str, ...]:
    return tuple(map(unquote, name.split("/")))
