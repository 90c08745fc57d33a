"""The harness's values of single samples as our statistics, and its aggregates as our metrics."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api import metrics as theirs
from numpy.typing import NDArray

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.results import Metric, array_texts, text_array
from fusion_bench.results.metrics import BITS_PER_BYTE, PERPLEXITY, Details, Numbers, mean
from fusion_bench.taskpool.language.harness.library import failure
from fusion_bench.taskpool.language.harness.requests import is_plain

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

#: Metrics of which each sample has a value from 0 to 1; only these are shown in percent.
_SHARES = {
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "em", "f1"),
    *("prompt_level_strict_acc", "prompt_level_loose_acc", "mc1", "mc2", "pass@1"),
}
#: What a filter is called that changes nothing.
_UNFILTERED = "none"
#: A metric of this name measures nothing.
_NOTHING = "bypass"

#: A sample's value to its terms of the sums; ``None`` where it has none.
Terms = Callable[[Any], tuple[float, float] | None]


@dataclass(frozen=True)
class Measured:
    """A metric of the harness behind a filter.

    Attributes:
        name: as in the harness's records.
        filter: the filter's name.
        metric: ours.
        terms: makes a sample's statistics of its value; None for a metric that is computed anew of
            all values, which are kept as details under ``kept``.
    """

    name: str
    filter: str
    metric: Metric
    terms: Terms | None

    @property
    def kept(self) -> str:
        """The name of the values among the details."""
        return f"{self.metric.name} values"

    def statistics(self, values: Mapping[int, Any], samples: NDArray[np.int64]) -> Numbers:
        """Return each sample's terms of the sums; those of a sample without a value are 0.

        Raises:
            FusionBenchError: a value that is no number.
        """
        assert self.terms is not None
        rows = np.zeros((len(samples), 2))
        for row, sample in zip(rows, samples.tolist(), strict=True):
            if sample not in values:
                continue
            try:
                found = self.terms(values[sample])
                row[:] = (0.0, 0.0) if found is None else found
            except (TypeError, ValueError) as error:
                raise self._no_number(sample, values[sample]) from error
            if not np.isfinite(row).all():
                raise self._no_number(sample, values[sample])
        return rows

    def details(self, values: Mapping[int, Any], samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the values as texts; that of a sample without one is empty."""
        texts = (
            json.dumps(values[sample], default=_plain) if sample in values else ""
            for sample in samples.tolist()
        )
        return text_array(list(texts))

    def _no_number(self, sample: int, value: Any) -> FusionBenchError:
        return FusionBenchError(f"sample {sample}: '{self.name}' is {value!r}, which is no number.")


def measured(task: "Task", first: "Sequence[Instance]") -> list[Measured]:
    """Return what a task measures, the main metric first.

    What its code names is found out by a trial with made-up answers.

    Args:
        task: the task.
        first: the requests of its first document.

    Raises:
        FusionBenchError: a metric that such a task does not measure.
    """
    declared = [name for name in task.aggregation() if name != _NOTHING]
    runs_code = not is_plain(task)
    try:
        found = _trial(task, first)
    except Exception as error:  # of a task's code, of its metrics or filters
        if not runs_code:
            raise failure("the task cannot be scored", error) from error
        found = {own.name: dict.fromkeys(declared) for own in task._filters}
    for name in declared if not runs_code else ():
        if not any(name in names for names in found.values()):
            raise FusionBenchError(
                f"'{name}' is not measured of a task with 'output_type: {task.OUTPUT_TYPE}'.",
                did_you_mean(name, {own for names in found.values() for own in names}),
                place=("metric_list",),
            )
    measures = [
        _measured(task, name, own)
        for own, names in found.items()
        for name in sorted(names, key=lambda n: declared.index(n) if n in declared else 10**6)
        if name != _NOTHING
    ]
    if not measures:
        raise FusionBenchError("the task measures nothing.", "Give it a 'metric_list'.")
    for own in measures:
        if own.terms is None:
            _try_aggregation(task, own.name, found[own.filter][own.name])
    return measures


def _try_aggregation(task: "Task", name: str, value: Any) -> None:
    """Refuse what is missing before anything is computed; one made-up value may be too few."""
    try:
        task.aggregation()[name]([value])
    except FusionBenchError:
        raise
    except ModuleNotFoundError as error:
        raise failure(f"'{name}' cannot be computed", error) from error
    except Exception:
        return


def _trial(task: "Task", first: "Sequence[Instance]") -> dict[str, dict[str, Any]]:
    """Return the values of metrics behind each filter, for made-up answers."""
    made_up: dict[str, Callable[[int], Any]] = {
        "loglikelihood": lambda number: (-1.0 - number, False),
        "loglikelihood_rolling": lambda number: -1.0,
        "generate_until": lambda number: "",
    }
    tried = [
        replace(
            own,
            resps=[made_up[own.request_type](number)] * (own.repeats or 1),
            filtered_resps={},
        )
        for number, own in enumerate(first)
    ]
    for ensemble in task._filters:
        ensemble.apply(tried)
    return {
        name: dict(task.process_results(tried[0].doc, [own.filtered_resps[name] for own in tried]))
        for name in tried[0].filtered_resps
    }


def _measured(task: "Task", name: str, behind: str) -> Measured:
    aggregation = task.aggregation().get(name, theirs.mean)
    label = name if behind == _UNFILTERED else f"{name} ({behind})"
    metric, terms = _closed(aggregation)
    if metric is None:
        metric = Metric(label, "", True, recompute=_Recomputed(f"{label} values", aggregation))
    unit = "%" if name in _SHARES else metric.unit
    better = task.higher_is_better().get(name)
    better = metric.higher_is_better if better is None else bool(better)
    # The names of stored arrays are parted by slashes.
    label = label.replace("/", "_")
    return Measured(
        name, behind, replace(metric, name=label, unit=unit, higher_is_better=better), terms
    )


def _closed(aggregation: Any) -> tuple[Metric | None, Terms | None]:
    """Return the metric that is a function of sums, and a sample's terms, where there is one."""
    kinds: dict[Any, tuple[Metric, Terms]] = {
        theirs.mean: (Metric("", "", True, value=mean), lambda v: (_number(v), 1.0)),
        theirs.nanmean: (Metric("", "", True, value=mean), _unless_nan),
        theirs.perplexity: (PERPLEXITY, lambda v: (-_number(v), 1.0)),
        theirs.weighted_perplexity: (PERPLEXITY, lambda v: (-_number(v[0]), float(v[1]))),
        theirs.bits_per_byte: (BITS_PER_BYTE, lambda v: (-_number(v[0]), float(v[1]))),
        theirs.brier_score: (
            Metric("", "", False, value=mean),
            lambda v: (_number(theirs.brier_score([v])), 1.0),
        ),
    }
    return kinds.get(aggregation, (None, None))


def _number(value: Any) -> float:
    if value is None or isinstance(value, str):
        raise TypeError
    return float(value)


def _unless_nan(value: Any) -> tuple[float, float] | None:
    number = _number(value)
    return None if np.isnan(number) else (number, 1.0)


class _Recomputed:
    """Aggregates kept values anew with the harness's own function.

    Args:
        kept: the name of the values among the details.
        aggregation: the function.
    """

    def __init__(self, kept: str, aggregation: Callable[[list[Any]], Any]):
        self._kept = kept.replace("/", "_")
        self._aggregation = aggregation
        self._read: tuple[Any, list[Any]] = (None, [])

    def __call__(self, details: Details, indices: NDArray[np.int64]) -> float:
        texts = details[self._kept]
        if self._read[0] is not texts:  # asked again for each resample
            read = [
                json.loads(own) if own else None
                for own in array_texts(np.asarray(texts, dtype=np.uint8))
            ]
            self._read = texts, read
        items = [self._read[1][i] for i in indices.tolist()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of resamples with one class alone
            return float(self._aggregation([own for own in items if own is not None]))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set):
        return sorted(value, key=str)
    return str(value)
