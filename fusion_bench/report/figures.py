"""How figures are shown: fractions in percent, others with three digits; sentences about them."""

import math
from collections.abc import Iterable

from fusion_bench.report.schema import (
    NORMALIZED,
    Comparison,
    MetricInfo,
    Report,
    Search,
    same_metric,
)

PERCENT = "%"
#: From here on whole numbers say enough.
_LARGE = 1000
LOWER = "↓ lower is better"


def shown(value: float | None, unit: str = PERCENT) -> str:
    """Return a figure without its unit, or a dash where there is none."""
    if value is None:
        return "–"
    if unit == PERCENT:
        return f"{100 * value:.1f}"
    if not math.isfinite(value):
        return str(value).replace("inf", "∞")
    return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:#.3g}".rstrip(".")


def signed(difference: float | None, unit: str = PERCENT) -> str:
    """Return a difference with its sign; that of fractions in percentage points."""
    if difference is None:
        return "–"
    if unit == PERCENT:
        return f"{100 * difference:+.1f}"
    return shown(difference, unit) if difference < 0 else f"+{shown(difference, unit)}"


def with_stderr(value: float | None, stderr: float | None, unit: str = PERCENT) -> str:
    """Return a figure, with its standard error if there is one."""
    if value is None or stderr is None:
        return shown(value, unit)
    return f"{shown(value, unit)} ± {shown_error(stderr, value, unit)}"


def shown_error(stderr: float, value: float, unit: str = PERCENT) -> str:
    """Return a value's standard error, with as many decimals as the value has; one digit at least.

    So ``0.250 ± 0.003``.
    """
    if unit == PERCENT or not math.isfinite(stderr):
        return shown(stderr, unit)
    decimals = len(shown(value, unit).partition(".")[2])
    text = f"{stderr:,.{decimals}f}"
    return text if float(text.replace(",", "")) or not stderr else f"{stderr:.1g}"


def sentence_case(text: str) -> str:
    """Return a text with a capital letter at its start; the rest stays."""
    return text[:1].upper() + text[1:]


def metric_label(metric: MetricInfo) -> str:
    """Return a metric's name, unit and direction: ``accuracy, %``, or ``rmse, m ↓``."""
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.label}{unit}{'' if metric.higher_is_better else ' ↓'}"


def task_labels(report: Report) -> list[str]:
    """Return the tasks' names, each with its main metric where they have different ones."""
    if report.main_metric is not None:
        return list(report.tasks)
    return [f"{task}: {metric_label(info.main_metric)}" for task, info in report.tasks.items()]


def legend(metrics: Iterable[MetricInfo]) -> str | None:
    """Return what the arrow means, if one of the metrics has it."""
    return None if all(metric.higher_is_better for metric in metrics) else LOWER


def comparison_sentence(report: Report, comparison: Comparison) -> str:
    """Return a comparison in words."""
    beside = comparison.beside
    average, verdict = comparison.average, comparison.verdict
    if average is None or verdict is None:
        return (
            f"{comparison.of} and {beside} have no average: a value is missing, or the tasks have "
            "different metrics and not all can be normalised."
        )
    what = {
        "better": f"is better than {beside}",
        "worse": f"is worse than {beside}",
        "not distinguishable": f"and {beside} are not distinguishable",
    }[verdict]
    tasks = f"{len(comparison.tasks)} test sets" if len(comparison.tasks) > 1 else "this test set"
    metric = same_metric(report.tasks[task] for task in comparison.tasks)
    unit = PERCENT if metric is None else metric.unit
    estimate, low, high = (
        signed(value, unit) for value in (average.difference, average.low, average.high)
    )
    label = "normalised values" if metric is None else metric.label
    size = f"{estimate} points of {label}" if unit == PERCENT else f"{label} {estimate} {unit}"
    return f"{comparison.of} {what} on {tasks}: {size.rstrip()} (95 % interval {low} to {high})."


def search_metric(search: Search) -> str:
    """Return in words what a search compared settings by."""
    return "normalised value" if search.metric == NORMALIZED else search.metric.replace("_", " ")


def search_sentence(search: Search) -> str:
    """Return a search in words."""
    best = search.best
    found = (
        f"{best.text()} won the race of {len(search.candidates)} settings"
        if search.race is not None
        else f"{best.text()} is the best of {len(search.candidates)} settings"
        if len(search.candidates) > 1
        else f"one setting, {best.text()}, was evaluated"
    )
    score = with_stderr(best.score, best.score_stderr, search.unit)
    unit = f" {search.unit}" if search.unit not in ("", PERCENT) else ""
    found += f" on the {search.split} split ({search_metric(search)} {score}{unit}"
    if (race := search.race) is not None:
        share = f"{100 * race.num_samples / race.whole:.1f} % of a full search"
        found += f" on {best.num_samples:,} samples; {race.num_samples:,} samples in all, {share}"
    found += ")"
    if search.test_split:
        return f"{found}, where the models are evaluated: the figures do not apply to new data"
    if not search.judge_test:
        return f"{found}; the test split was not used"
    return f"{found}; only this setting was evaluated on the test split, once"
