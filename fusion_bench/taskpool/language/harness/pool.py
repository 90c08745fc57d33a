"""The pool of the harness's tasks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import (
    FusionBenchError,
    Problems,
    check_between,
    did_you_mean,
    within,
)
from fusion_bench.taskpool.language.harness.folder import Definition, TaskFiles
from fusion_bench.taskpool.language.harness.library import require
from fusion_bench.taskpool.language.harness.task import HarnessTask, Options
from fusion_bench.taskpool.pool import TaskPool
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.trust import trusts_task_code

log = logging.getLogger(__name__)

#: What may differ from task to task.
_OF_TASKS = ("num_fewshot", "owner")
_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


class LMEvalHarnessTaskPool(TaskPool):
    """Tasks of the Language Model Evaluation Harness, asked with our model.

    Args:
        tasks: names of tasks, groups or tags, as a list or with commas between them; or a name to
            what differs for it: ``num_fewshot``, and ``owner``, the model trained for the task.
        apply_chat_template: put prompts into the tokenizer's chat template, or into the one of
            this name.
        include_path: a folder with YAML files of own tasks, or several.
        batch_size: how many requests at once; by default, or with ``auto``, what suits.
        metadata: given to each task, for those that make their data of it.
        verbosity: from which level on the harness's messages are shown.
        output_path: not needed, for results are in the report.
        log_samples: the same as ``save_predictions``.
        num_fewshot: examples before each question; tasks that say 0 keep it.
        limit: evaluate the first documents of each task alone: so many, or below 1 this share.
        system_instruction: the system's message, or what stands before the prompt without a chat.
        fewshot_as_multiturn: make each example a turn of its own; by default, as the harness does,
            where there is a chat template.
        cluster_by: a column, such as ``passage``; documents with the same value in it belong
            together in standard errors. By default those with the same prompt do.
        max_length: the most tokens that a model is given at once; by default what it says.
        tokenizer: a folder, a repository on the Hub, a config node or a tokenizer; by default that
            of the models.
        dataloader_kwargs: as in ``TaskPool``; so are the next arguments.
        max_samples: evaluate no more than so many samples of each task, a random subset.
        save_predictions: write each model's scores of single samples beside the report.
        cache: keep results on disk and use what is there.
        compile: compile the models with ``torch.compile``.

    Raises:
        FusionBenchError: the harness is not installed, or there is no such task.
    """

    @keeps_arguments
    def __init__(
        self,
        tasks: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
        apply_chat_template: bool | str = False,
        include_path: str | Sequence[str] | None = None,
        batch_size: int | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        verbosity: str | None = None,
        output_path: str | None = None,
        log_samples: bool = False,
        num_fewshot: int | None = None,
        limit: int | float | None = None,
        system_instruction: str | None = None,
        fewshot_as_multiturn: bool | None = None,
        cluster_by: str | None = None,
        max_length: int | None = None,
        tokenizer: Any = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        max_samples: int | None = None,
        save_predictions: bool = False,
        cache: bool = True,
        compile: bool = False,
    ):
        require()
        if max_length is not None:
            check_between("max_length", max_length, 2, 10**9)
        _check_shots(num_fewshot)
        if output_path is not None:
            log.warning("'output_path' is not used: results are in the report.")
        options = Options(
            limit=_limit(limit),
            chat=apply_chat_template,
            system=system_instruction,
            multiturn=_multiturn(fewshot_as_multiturn, apply_chat_template),
            max_length=max_length,
            cluster_by=cluster_by,
        )
        files = TaskFiles(_folders(include_path), metadata, trusts_task_code())
        given = None if tokenizer is None else TokenizerSource.named(tokenizer)
        found: dict[str, HarnessTask] = {}
        problems = Problems()
        for name, own in _named(tasks).items():
            with problems.collect("tasks", name):
                for definition in files.find(name):
                    task = _with_shots(definition, num_fewshot, own.get("num_fewshot"))
                    found[task.name] = HarnessTask(
                        task.name, task, options, given, own.get("owner"), _level(verbosity)
                    )
        problems.raise_all()
        super().__init__(
            found,
            _loading(dataloader_kwargs, batch_size),
            max_samples,
            save_predictions or log_samples,
            cache,
            compile,
        )


def _named(
    tasks: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Mapping[str, Any]]:
    """Return each name with what differs for it."""
    if isinstance(tasks, Mapping):
        named: dict[str, Mapping[str, Any]] = {str(name): own or {} for name, own in tasks.items()}
    else:
        listed = tasks.split(",") if isinstance(tasks, str) else tasks
        named = {str(name).strip(): {} for name in listed if str(name).strip()}
    if not named:
        raise FusionBenchError("there is no task.", "Name at least one.", place=("tasks",))
    for name, own in named.items():
        for key in own:
            if key not in _OF_TASKS:
                raise FusionBenchError(
                    "is no key of a task.", did_you_mean(key, _OF_TASKS), place=("tasks", name, key)
                )
        with within("tasks", name):
            _check_shots(own.get("num_fewshot"))
    return named


def _with_shots(task: Definition, common: int | None, own: int | None) -> Definition:
    """Return the task with so many examples; one that says 0 takes its own number alone."""
    shots = own if own is not None else None if task.config.get("num_fewshot") == 0 else common
    return task if shots is None else replace(task, config={**task.config, "num_fewshot": shots})


def _check_shots(shots: Any) -> None:
    if shots is not None:
        check_between("num_fewshot", shots, 0, 10**6)


def _limit(limit: Any) -> int | float | None:
    if limit is None:
        return None
    whole = isinstance(limit, int | float) and (limit == int(limit) and limit >= 1)
    if isinstance(limit, bool) or not (whole or (isinstance(limit, float) and 0 < limit < 1)):
        raise FusionBenchError(
            f"'{limit}' is neither a number of samples nor a share below 1.", place=("limit",)
        )
    return int(limit) if whole else float(limit)


def _multiturn(wanted: bool | None, chat: bool | str) -> bool:
    if wanted and not chat:
        raise FusionBenchError(
            "needs a chat template.",
            "Add 'apply_chat_template: true'.",
            place=("fewshot_as_multiturn",),
        )
    return bool(chat) if wanted is None else wanted


def _folders(paths: str | Sequence[str] | None) -> list[Path]:
    listed = [paths] if isinstance(paths, str) else list(paths or ())
    return [Path(path).expanduser() for path in listed]


def _level(verbosity: str | None) -> int:
    if verbosity is None:
        return logging.ERROR
    if str(verbosity).upper() not in _LEVELS:
        hint = did_you_mean(str(verbosity).upper(), _LEVELS)
        raise FusionBenchError(f"'{verbosity}' is no level.", hint, place=("verbosity",))
    return logging.getLevelNamesMapping()[str(verbosity).upper()]


def _loading(given: Mapping[str, Any] | None, batch_size: int | str | None) -> dict[str, Any]:
    """Return the arguments for loading; the harness's ``auto`` is what suits."""
    loading = dict(given or {})
    if batch_size is not None and not str(batch_size).startswith("auto"):
        loading["batch_size"] = batch_size
    return loading
