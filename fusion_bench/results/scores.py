"""Scores of single samples, from which every figure follows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fusion_bench.results.metrics import ACCURACY, LOSS, Metric, Numbers

Array = NDArray[np.generic]
#: The dtypes of files, smallest first, for whole numbers and for others.
_WHOLE = (np.uint8, np.int32)
_FLOATS = (np.float32,)


@dataclass(frozen=True, eq=False)
class SampleScores:
    """How a model did on each sample of a task.

    Attributes:
        samples: which of the dataset's samples were evaluated, in ascending order.
        statistics: a metric's name to float64 of shape ``(samples, m)``; their sums give its value.
        details: other arrays with an entry per sample, such as ``labels`` and ``predictions``.
        clusters: the document that each sample belongs to, where one gives several samples.

    Raises:
        ValueError: arrays that do not fit each other.
    """

    samples: NDArray[np.int64]
    statistics: Mapping[str, Numbers]
    details: Mapping[str, Array] = field(default_factory=dict)
    clusters: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or len(np.unique(self.samples)) != self.samples.size:
            raise ValueError("the samples are not a list of different numbers")
        for name, own in self.statistics.items():
            if own.ndim != 2 or len(own) != len(self.samples):
                raise ValueError(f"'{name}' does not have a row per sample")
        others = dict(self.details)
        if self.clusters is not None:
            others["clusters"] = self.clusters
        for name, entries in others.items():
            if entries.shape[:1] != self.samples.shape:
                raise ValueError(f"'{name}' does not have an entry per sample")

    @classmethod
    def classified(
        cls,
        samples: NDArray[np.integer],
        labels: NDArray[np.integer],
        predictions: NDArray[np.integer],
        losses: NDArray[np.floating] | None = None,
    ) -> Self:
        """Return the scores of a classifier, from classes and cross entropies in nats."""
        statistics = {ACCURACY.name: with_ones(predictions == labels)}
        if losses is not None:
            statistics[LOSS.name] = with_ones(losses)
        whole = (array.astype(np.int64) for array in (samples, labels, predictions))
        numbers, truth, answers = whole
        return cls(numbers, statistics, {"labels": truth, "predictions": answers})

    @property
    def num_samples(self) -> int:
        """How many samples were evaluated."""
        return len(self.samples)

    def has(self, metric: Metric) -> bool:
        """Return whether the scores give a value of a metric."""
        return metric.recompute is not None or metric.name in self.statistics

    def value(self, metric: Metric) -> float:
        """Return the value of a metric; ``nan`` where there is none."""
        if metric.value is None:
            assert metric.recompute is not None
            return float(metric.recompute(self.details, np.arange(self.num_samples)))
        return float(metric.value(self.totals(metric)))

    def totals(self, metric: Metric) -> Numbers:
        """Return the sums that a metric's value is a function of."""
        return np.ascontiguousarray(self.statistics[metric.name].T).sum(axis=1)

    def measured(self, metrics: Iterable[Metric]) -> "SampleScores":
        """Return the scores with what metrics measure of the details.

        Raises:
            ValueError: a metric that finds no such detail, or has no row per sample.
        """
        own = dict(self.statistics)
        for metric in metrics:
            if metric.measure is not None:
                try:
                    rows = np.asarray(metric.measure(self.details), dtype=np.float64)
                except KeyError as error:
                    raise ValueError(f"'{metric.name}' needs {error} of each sample") from error
                except Exception as error:  # a user's function
                    what = f"{type(error).__name__}: {error}"
                    raise ValueError(f"'{metric.name}' cannot be measured: {what}") from error
                own[metric.name] = rows
        return replace(self, statistics=own)

    def at(self, keep: NDArray[np.bool_]) -> "SampleScores":
        """Return the scores of some samples alone."""
        return SampleScores(
            self.samples[keep],
            {name: own[keep] for name, own in self.statistics.items()},
            {name: own[keep] for name, own in self.details.items()},
            None if self.clusters is None else self.clusters[keep],
        )

    def joined(self, other: "SampleScores") -> "SampleScores":
        """Return the scores of both, in the samples' order.

        Raises:
            ValueError: scores of the same samples, or of other kinds.
        """
        if self.statistics.keys() != other.statistics.keys():
            raise ValueError("the scores have other statistics")
        if self.details.keys() != other.details.keys():
            raise ValueError("the scores have other details")
        if (self.clusters is None) != (other.clusters is None):
            raise ValueError("only some of the scores have documents")
        samples = np.concatenate([self.samples, other.samples])
        order = np.argsort(samples, kind="stable")
        clusters = None
        if self.clusters is not None and other.clusters is not None:
            clusters = np.concatenate([self.clusters, other.clusters])[order]
        return SampleScores(
            samples[order],
            {
                k: np.concatenate([own, other.statistics[k]])[order]
                for k, own in self.statistics.items()
            },
            {k: _stacked(own, other.details[k])[order] for k, own in self.details.items()},
            clusters,
        )

    def parquet(self) -> bytes:
        """Return a parquet file with a row per sample: the details and the statistics.

        The statistics of a mean, values and ones, are the values alone.
        """
        import pyarrow
        from pyarrow import parquet

        columns: dict[str, Array | list[str]] = {"sample": self.samples}
        if self.clusters is not None:
            columns["cluster"] = self.clusters
        columns |= {name.removesuffix("s"): _column(own) for name, own in self.details.items()}
        for name, rows in self.statistics.items():
            if rows.shape[1] == 2 and (rows[:, 1] == 1).all():
                columns[name] = rows[:, 0]
            else:
                columns |= {f"{name}.{i}": rows[:, i] for i in range(rows.shape[1])}
        content = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(columns), content)
        return content.getvalue().to_pybytes()

    def arrays(self) -> dict[tuple[str, ...], Array]:
        """Return the content for a file; ``from_arrays`` reads it."""
        found: dict[tuple[str, ...], Array] = {("samples",): compact(self.samples, _WHOLE)}
        if self.clusters is not None:
            found["clusters",] = compact(self.clusters, _WHOLE)
        for name, rows in self.statistics.items():
            found["statistics", name] = compact(rows, (*_WHOLE, *_FLOATS))
        for name, own in self.details.items():
            found["details", name] = compact(own, _FLOATS if own.dtype.kind == "f" else _WHOLE)
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[tuple[str, ...], Array]) -> Self:
        """Read what ``arrays`` returned.

        Raises:
            LookupError, ValueError: arrays that are no scores.
        """
        parts: dict[str, dict[str, Array]] = {"statistics": {}, "details": {}}
        for (kind, *name), array in sorted(arrays.items(), key=lambda item: item[0]):
            if kind in parts:
                parts[kind][name[0]] = array
        clusters = arrays.get(("clusters",))
        return cls(
            _whole(arrays["samples",]),
            {name: array.astype(np.float64) for name, array in parts["statistics"].items()},
            {
                name: _whole(array) if array.dtype.kind in "iu" else array
                for name, array in parts["details"].items()
            },
            None if clusters is None else _whole(clusters),
        )


def with_ones(values: NDArray[np.generic]) -> Numbers:
    """Return the statistics of a mean over samples: each value, and 1."""
    return np.stack([values.astype(np.float64), np.ones(len(values))], axis=1)


def compact(array: Array, dtypes: Sequence[type[np.generic]]) -> Array:
    """Return the array in the first of some dtypes that is smaller and holds the same values."""
    for dtype in dtypes:
        if array.dtype.kind in "iuf" and np.dtype(dtype).itemsize < array.dtype.itemsize:
            with np.errstate(invalid="ignore", over="ignore"):
                small = array.astype(dtype)
                back = small.astype(array.dtype)
            if np.array_equal(back, array, equal_nan=array.dtype.kind == "f"):
                return np.ascontiguousarray(small)
    return np.ascontiguousarray(array)


def _stacked(one: Array, other: Array) -> Array:
    """Return the rows of both; those of texts, which end with zeros, get the same width."""
    if one.ndim == 2 and one.shape[1] != other.shape[1]:
        width = max(one.shape[1], other.shape[1])
        one, other = (np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (one, other))
    return np.concatenate([one, other])


def _column(own: Array) -> Array | list[str]:
    """Return what a table takes; rows of bytes, filled up with zeros, are texts."""
    if own.ndim == 1:
        return own
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in own.astype(np.uint8)]


def _whole(array: Array) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu":
        raise ValueError("these are not whole numbers")
    return array.astype(np.int64)
