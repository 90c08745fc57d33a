"""Files of schema 1, which knew accuracy and loss of image classifiers alone."""

from collections.abc import Callable
from typing import Any

from fusion_bench.results import ACCURACY, LOSS
from fusion_bench.tasks import canonical_name

Node = dict[str, Any]

_METRICS: list[Node] = [
    {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    for metric in (ACCURACY, LOSS)
]
#: What a task's identity consists of, and its key in schema 1.
IDENTITY = {
    "dataset": "fingerprint",
    "classes, prompts or text tower": "head_sha256",
    "image preprocessing": "images_sha256",
}


def lifted_report(report: Any) -> Any:
    """Return a report of schema 1 as one of schema 2; anything else is returned as it is.

    Raises:
        ValueError: a report that lacks what schema 1 has.
    """
    return _lifted(report, _report)


def lifted_study(study: Any) -> Any:
    """Likewise, for a scaling study."""
    return _lifted(study, _study)


def _lifted(content: Any, lift: Callable[[Node], Node]) -> Any:
    if not isinstance(content, dict) or content.get("schema_version") != 1:
        return content
    try:
        return {**content, "schema_version": 2, **lift(content)}
    except KeyError as error:
        raise ValueError(f"it lacks {error}, which schema 1 has") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a part is not what schema 1 has there: {error}") from error


def _report(report: Node) -> Node:
    names = [*report["run"].get("inputs", ()), *report["models"]]
    owners = {canonical_name(name): name for name in names}
    return {
        "run": _run(report["run"]),
        "tasks": {
            task: _task(info, owners.get(canonical_name(task)))
            for task, info in report["tasks"].items()
        },
        "models": {name: _model(model) for name, model in report["models"].items()},
        "comparisons": [_comparison(each) for each in report.get("comparisons", [])],
    }


def _study(study: Node) -> Node:
    return {
        "run": _run(study["run"]),
        "bases": {
            name: {**base, **{key: _results(base[key]) for key in ("pretrained", "experts")}}
            for name, base in study["bases"].items()
        },
        "merges": [{**merge, "tasks": _results(merge["tasks"])} for merge in study["merges"]],
    }


def _run(run: Node) -> Node:
    search = run.get("search")
    if search is None:
        return run
    metric = "normalized" if search["metric"] == "normalized_accuracy" else search["metric"]
    candidates = [
        {**candidate, "tasks": _results(candidate["tasks"])} for candidate in search["candidates"]
    ]
    return {**run, "search": {**search, "metric": metric, "candidates": candidates}}


def _task(info: Node, owner: str | None) -> Node:
    return {
        "kind": "image_classification",
        "main": ACCURACY.name,
        "metrics": _METRICS,
        "num_samples": info["num_samples"],
        "identity": {what: info.get(key) for what, key in IDENTITY.items()},
        "owner": owner,
        "num_classes": info["num_classes"],
        "classes": info.get("class_names"),
    }


def _model(model: Node) -> Node:
    average = model.get("average")
    return {
        **{key: model[key] for key in ("role", "num_parameters")},
        "identity": model["weights_sha256"],
        "tasks": _results(model["tasks"]),
        "average": average
        and {"metrics": _values(average), "normalized": average.get("normalized_accuracy")},
    }


def _results(results: Node) -> Node:
    return {
        task: {
            "num_samples": result["num_samples"],
            "metrics": _values(result),
            "per_class": result.get("per_class_accuracy"),
        }
        for task, result in results.items()
    }


def _values(result: Node) -> Node:
    accuracy = {
        "value": result["accuracy"],
        "stderr": result["accuracy_stderr"],
        "normalized": result.get("normalized_accuracy"),
    }
    return {ACCURACY.name: accuracy, LOSS.name: {"value": result["loss"]}}


def _comparison(comparison: Node) -> Node:
    normalized = comparison.get("normalized_accuracy")
    return {
        "of": comparison["model"],
        "beside": comparison["other"],
        "tasks": {
            task: {ACCURACY.name: _difference(found)} for task, found in comparison["tasks"].items()
        },
        "metrics": {ACCURACY.name: _difference(comparison["accuracy"])},
        "normalized": normalized and _difference(normalized),
        "verdict": comparison["verdict"],
    }


def _difference(difference: Node) -> Node:
    return {
        "difference": difference["estimate"],
        "interval": [difference["low"], difference["high"]],
    }
