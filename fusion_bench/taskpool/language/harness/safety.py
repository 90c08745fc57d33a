"""What a task may hold: a stranger's plain data and registered parts, and no task what is unknown.

The harness itself imports and calls what its files name. Only those that are installed with it may
do so, and a user's where the user says so outside of any config; ``SECURITY.md`` states the rules.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fusion_bench.problems import FusionBenchError, did_you_mean, within
from fusion_bench.taskpool.language.harness.folder import Code, Definition
from fusion_bench.trust import (
    RUN_UNSAFE_CODE,
    TASK_CODE,
    TRUST_REMOTE_CODE,
    runs_unsafe_code,
    trusts_remote_code,
    trusts_task_code,
)

#: Their values are called, whatever they are.
_CALLED = ("class", "custom_dataset", "process_docs", "process_results")
#: For models that see or hear.
_OTHER_SENSES = ("doc_to_image", "doc_to_audio")


def check(task: Definition) -> None:
    """Refuse a task before anything of it is run; places are relative to it.

    Raises:
        FusionBenchError: code that is not allowed, or parts that the harness does not have.
    """
    if task.users is not None and not trusts_task_code():
        _refuse_code(task)
        _refuse_unknown_keys(task.config)
    for key in _OTHER_SENSES:
        if task.config.get(key):
            raise FusionBenchError("needs a model that takes more than texts.", place=(key,))
    if task.config.get("unsafe_code", False) is not False and not runs_unsafe_code():
        raise FusionBenchError(
            f"'{task.name}' runs what the model has written.",
            "If this machine may run it, allow it outside the config: --run-unsafe-code, or "
            f"{RUN_UNSAFE_CODE}=1 in the environment.",
            place=("unsafe_code",),
        )
    if "class" not in task.config:
        _check_parts(task.config)


def _refuse_code(task: Definition) -> None:
    for place, value in _values(task.config):
        if isinstance(value, Code) and not value.is_shipped:
            module = str(value).rpartition(".")[0]
            raise _code(f"'!function {value}' would run '{module}' of '{value.folder}'.", place)
    shots = task.config.get("fewshot_config")
    called: dict[tuple[str, ...], Any] = {(key,): task.config.get(key) for key in _CALLED}
    if isinstance(shots, Mapping):
        called["fewshot_config", "process_docs"] = shots.get("process_docs")
    for place, value in called.items():
        if value is not None and not isinstance(value, Code):
            raise _code("would be called.", place)
    prompt = task.config.get("use_prompt")
    if prompt is not None and not str(prompt).startswith("qa-basic:"):
        raise FusionBenchError(
            f"'{prompt}' is read from another file.",
            "Write the template into 'doc_to_text'.",
            place=("use_prompt",),
        )


def _code(reason: str, place: tuple[str | int, ...]) -> FusionBenchError:
    return FusionBenchError(
        reason,
        f"If you trust the folder's code, allow it outside the config: --allow {TASK_CODE}, or "
        f"FUSION_BENCH_ALLOW={TASK_CODE} in the environment.",
        place=place,
    )


def _values(value: Any, *place: str | int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield place, key
            yield from _values(part, *place, str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _values(part, *place, index)
    else:
        yield place, value


def _refuse_unknown_keys(config: Mapping[str, Any]) -> None:
    from lm_eval.config.task import TaskConfig

    known = [field.name for field in fields(TaskConfig)]
    for key in config:
        if key not in (*known, "class"):
            raise FusionBenchError(
                "is no key of a task.", did_you_mean(str(key), known), place=(str(key),)
            )


def _check_parts(config: Mapping[str, Any]) -> None:
    """Refuse what the harness would look for elsewhere, or only complain of in its log."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401  (both fill the registries)
    from lm_eval.api import registry
    from lm_eval.api.samplers import SAMPLER_REGISTRY
    from lm_eval.api.task import ALL_OUTPUT_TYPES

    output = config.get("output_type", "generate_until")
    _refuse_other(output, ALL_OUTPUT_TYPES, "type of output", "output_type")
    for index, entry in enumerate(_mappings(config, "metric_list")):
        with within("metric_list", index):
            _check_metric(entry, config.get("process_results") is not None)
            if isinstance(entry.get("aggregation"), str):
                known = registry.aggregation_registry.keys()
                _refuse_other(entry["aggregation"], known, "aggregation", "aggregation")
    for index, entry in enumerate(_mappings(config, "filter_list")):
        with within("filter_list", index):
            if not isinstance(entry.get("name"), str):
                raise FusionBenchError("has no 'name'.")
            for step, part in enumerate(_mappings(entry, "filter")):
                known = registry.filter_registry.keys()
                with within("filter", step):
                    _refuse_other(part.get("function"), known, "filter", "function")
    shots = config.get("fewshot_config")
    if isinstance(shots, Mapping):
        with within("fewshot_config"):
            _refuse_other(shots.get("sampler", "default"), SAMPLER_REGISTRY, "sampler", "sampler")


def _mappings(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(own, Mapping) for own in found):
        raise FusionBenchError("is no list of keys and values.", place=(key,))
    return found


def _refuse_other(value: Any, known: Any, what: str, key: str) -> None:
    if not isinstance(value, Code) and value not in known:
        raise FusionBenchError(
            f"lm-eval has no {what} '{value}'.", did_you_mean(str(value), known), place=(key,)
        )


def _check_metric(entry: Mapping[str, Any], processed: bool) -> None:
    from lm_eval.api.registry import metric_registry

    name = entry.get("metric")
    if name is None:
        raise FusionBenchError("names no 'metric'.")
    if isinstance(name, Code) or processed or trusts_remote_code():
        return
    if entry.get("hf_evaluate"):
        raise FusionBenchError(
            f"'{name}' would be run from a folder or the Hub.",
            "If you trust it, allow it outside the config: --trust-remote-code, or "
            f"{TRUST_REMOTE_CODE}=1 in the environment.",
            place=("hf_evaluate",),
        )
    _refuse_other(name, metric_registry.keys(), "metric", "metric")
