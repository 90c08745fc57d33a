"""From a task's files to the harness's object, with data that are loaded as all others are."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.sources import load, reading
from fusion_bench.taskpool.datasets import WHY_NOT_STREAMED, DatasetPlace, refuse_unusable
from fusion_bench.taskpool.language.harness.folder import Code, Definition
from fusion_bench.taskpool.language.harness.library import failure
from fusion_bench.trust import argument_problems

_LOADS = "datasets.load_dataset"
#: In the order of what models are evaluated on.
_EVALUATED = ("test_split", "validation_split")
_SPLITS = (*_EVALUATED, "training_split", "fewshot_split")


def dataset_node(task: Definition) -> dict[str, Any] | None:
    """Return the node of a task's dataset, with all its splits; None where code loads it.

    A file's name in a user's task may be relative to the task's own folder.

    Raises:
        FusionBenchError: there is no dataset, or one that must not be read.
    """
    config = task.config
    if "class" in config or config.get("custom_dataset") is not None:
        return None
    path = config.get("dataset_path")
    if not isinstance(path, str):
        raise FusionBenchError("names no dataset.", place=("dataset_path",))
    options = dict(config.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)  # no dataset runs code any more
    if options.pop("streaming", False):
        raise FusionBenchError(WHY_NOT_STREAMED, place=("dataset_kwargs", "streaming"))
    if task.users is not None:
        path = _beside(path, task.at) if "/" in path or path.startswith(".") else path
        for key in ("data_files", "data_dir"):
            if key in options:
                options[key] = _beside(options[key], task.at)
    if config.get("dataset_name") is not None:
        options["name"] = config["dataset_name"]
    node = {"_target_": _LOADS, "path": path, **options}
    for key, problem in argument_problems(_LOADS, node):
        place = ("dataset_path",) if key == "path" else ("dataset_kwargs", key)
        raise FusionBenchError(problem, place=place)
    return node


def evaluated_split(task: Definition) -> str:
    """Return the name of the split that models are evaluated on.

    Raises:
        FusionBenchError: there is none.
    """
    for key in _EVALUATED:
        if task.config.get(key) is not None:
            return str(task.config[key])
    raise FusionBenchError("names no split to evaluate on.", place=("test_split",))


def build(task: Definition) -> Any:
    """Return the harness's object; what ``check`` lets pass may run code here.

    Raises:
        FusionBenchError: data that cannot be read, have no such split or no sample.
    """
    config = _resolved(deepcopy(dict(task.config)))
    node = dataset_node(task)
    if node is not None:
        loaded = _loaded(task, node)
        config |= {"custom_dataset": lambda **_: loaded, "dataset_kwargs": None}
    with reading("dataset", task.name):
        try:
            made = _made(config)
        except (FusionBenchError, OSError):
            raise
        except Exception as error:  # of a template, of the task's code, or of its data
            raise failure("the task cannot be made", error) from error
    if made.config.num_fewshot is None:
        made.set_config("num_fewshot", 0)
    return made


def _made(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    if "class" not in config:
        return ConfigurableTask(config=config)
    made_by = config["class"]
    takes = inspect.signature(made_by).parameters
    made = made_by(config=config) if "config" in takes else made_by()
    made.config.task = config["task"]
    return made


def _loaded(task: Definition, node: Mapping[str, Any]) -> Any:
    place = DatasetPlace(("dataset_path",))
    evaluated = evaluated_split(task)
    with place.located():
        found = load("dataset", node)
    if not isinstance(found, Mapping):
        raise place.refusal("is a single split.", "Name its files by split in 'data_files'.")
    for key in _SPLITS:
        split = task.config.get(key)
        if split is None:
            continue
        if split not in found:
            raise FusionBenchError(
                f"the dataset has no split '{split}'.", did_you_mean(split, found), place=(key,)
            )
        refuse_unusable(found[split], place, Folders.of(node))
    if not len(found[evaluated]):
        raise place.refusal(f"'{evaluated}' has no sample.", "Choose another split.")
    return found


def _beside(value: Any, folder: Path) -> Any:
    """Return names of files with the folder before those that are in it."""
    if isinstance(value, Mapping):
        return {key: _beside(own, folder) for key, own in value.items()}
    if isinstance(value, list):
        return [_beside(own, folder) for own in value]
    there = isinstance(value, str) and "://" not in value and (folder / value).exists()
    return str(folder / value) if there else value


def _resolved(value: Any) -> Any:
    """Return a value with what its ``!function`` name, which is imported."""
    if isinstance(value, Code):
        from lm_eval.tasks._yaml_loader import _import_func_in_yml

        return _import_func_in_yml(str(value), value.folder)
    if isinstance(value, dict):
        return {key: _resolved(own) for key, own in value.items()}
    return [_resolved(own) for own in value] if isinstance(value, list) else value
