"""What is counted of each text, for metrics of classes and of numbers."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import ACCURACY, Metric, with_ones
from fusion_bench.results.metrics import F1, MATTHEWS, PEARSON, SPEARMAN, Numbers

#: Metrics of two classes, of which 1 is the positive one.
TWO_CLASSES = (F1, MATTHEWS)
#: Metrics of numbers.
CORRELATIONS = (PEARSON, SPEARMAN)


def classes(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> dict[str, Numbers]:
    """Return the statistics of accuracy, F1 and Matthews; the latter two are for 0 and 1.

    A prediction that is no class is wrong for each label.
    """
    right, positive = predictions == labels, labels == 1
    counts = [right & positive, ~right & ~positive, ~right & positive, right & ~positive]
    columns = np.stack(counts, axis=1).astype(np.float64)
    return {
        ACCURACY.name: with_ones(right),
        F1.name: columns[:, :3],
        MATTHEWS.name: columns,
    }


def numbers(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> dict[str, Numbers]:
    """Return the statistics of Pearson's correlation; Spearman's is taken of the details."""
    x, y = predictions, labels
    return {PEARSON.name: np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)}


def fitting(
    given: Sequence[Metric], measured: Sequence[Metric], kind: str, *, chosen: bool
) -> tuple[Metric, ...]:
    """Return the metrics of a task that only its head or its labels tell the kind of.

    Args:
        given: the metrics.
        measured: those that fit.
        kind: what messages call the kind.
        chosen: whether the config names them; otherwise they are those that fit.

    Raises:
        FusionBenchError: one that does not fit; places are relative to the list.
    """
    if not chosen:
        return tuple(measured)
    for index, metric in enumerate(given):
        own = metric.measure is not None or metric.source is not None
        if not own and metric not in measured:
            names = ", ".join(one.name for one in measured)
            raise FusionBenchError(
                f"'{metric.name}' is not measured of {kind}.",
                f"Choose of: {names}.",
                place=(index,),
            )
    return tuple(given)


def class_label(value: object, names: Sequence[str]) -> int:
    """Return the number of a class, of which a dataset has the number or the name.

    Raises:
        FusionBenchError: there is no such class.
    """
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    if isinstance(value, str) and value.strip().isdecimal():  # a template writes texts
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return int(value)
    hint = " A label of -1 marks an unlabelled split." if value == -1 else ""
    raise FusionBenchError(
        f"the label {value!r} is none of the {len(names)} classes.{hint}",
        "Name another column in 'label', or choose another split.",
    )


def number(value: object) -> float:
    """Return the number that a dataset has as a label.

    Raises:
        FusionBenchError: it has none.
    """
    found = value
    if isinstance(value, str):  # a template writes texts
        with suppress(ValueError):
            found = float(value)
    if isinstance(found, int | float) and np.isfinite(found):
        return float(found)
    raise FusionBenchError(f"the label {value!r} is no number.", "Name another column in 'label'.")
