"""The metrics that a config chooses for tasks."""

from collections.abc import Sequence
from dataclasses import replace

from fusion_bench.problems import FusionBenchError, did_you_mean, within
from fusion_bench.results import Metric
from fusion_bench.trust import find


def chosen_metrics(
    names: Sequence[str | Metric] | None, own: Sequence[Metric]
) -> tuple[Metric, ...]:
    """Return metrics by their names, the main one first.

    Args:
        names: of metrics of this package, such as ``accuracy``, or of a user's, such as
            ``my_metrics.balanced``, a function that returns a ``Metric``, in a package that may be
            called; ``None`` takes the task's own.
        own: what the task measures. Another metric must measure itself, of the samples' details.

    Raises:
        FusionBenchError: no list, or a metric that is not there or cannot be measured; places are
            relative to the list.
    """
    if names is None:
        return tuple(own)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise FusionBenchError(f"'{names}' is not a list.", f"Write it like '[{own[0].name}]'.")
    found: list[Metric] = []
    for index, name in enumerate(names):
        with within(index):
            metric = _metric(name, own)
            if metric.name in [known.name for known in found]:
                raise FusionBenchError(f"'{metric.name}' is listed twice.", "Remove one.")
            found.append(metric)
    return tuple(found)


def _metric(name: str | Metric, own: Sequence[Metric]) -> Metric:
    if isinstance(name, Metric):
        return name
    measured = {metric.name: metric for metric in own}
    if name in measured:
        return measured[name]
    if "." not in str(name):
        raise FusionBenchError(
            f"'{name}' is not measured by this task.",
            f"{did_you_mean(str(name), measured)} A metric of yours is named by its package, "
            "'my_metrics.name'.",
        )
    found = find(name)()
    if not isinstance(found, Metric) or (found.recompute is None and found.measure is None):
        raise FusionBenchError(
            f"'{name}' returns no metric that measures itself.",
            "Return a fusion_bench.results.Metric with 'measure' or 'recompute'.",
        )
    return replace(found, source=name)
