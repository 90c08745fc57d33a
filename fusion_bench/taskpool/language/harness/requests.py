"""What the harness asks of a document, and what of a model's answers is kept beside scores."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import Example, text_array

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

    from fusion_bench.results.scores import Array

_CHOICE = "multiple_choice"


def chat_template(
    tokenizer: "PreTrainedTokenizerBase", wanted: bool | str
) -> Callable[..., str] | None:
    """Return what makes a prompt of a chat; None without one.

    A template that takes no system's message gets the chat without it.

    Args:
        tokenizer: the models' tokenizer.
        wanted: whether there is one, or its name among several.

    Raises:
        FusionBenchError: the tokenizer has no chat template.
    """
    if not wanted:
        return None
    if not tokenizer.chat_template:
        raise FusionBenchError(
            "has no chat template.", "Remove 'apply_chat_template'.", place=("tokenizer",)
        )

    def prompt(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def rendered(messages: list[dict[str, str]]) -> str:
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    chat_template=wanted if isinstance(wanted, str) else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(chat)
        except TemplateError:
            without = [own for own in chat if own["role"] != "system"]
            if len(without) == len(chat):
                raise
            return rendered(without)

    return prompt


def is_plain(task: "Task") -> bool:
    """Return whether the harness itself scores a task's answers, and no code of the task."""
    from lm_eval.api.task import ConfigurableTask

    return type(task) is ConfigurableTask and not callable(task.config.process_results)


def refuse_unusable(task: "Task", documents: "Sequence[Sequence[Instance]]") -> None:
    """Refuse documents that the harness would count as wrong, or fail on in the end.

    Raises:
        FusionBenchError: nothing to read or to score, or a label that is none of the choices.
    """
    for number, requests in enumerate(documents):
        try:
            if _has_labels(task):
                _refuse_label(task, requests[0].doc)
            for own in requests:
                _refuse_empty(own)
        except FusionBenchError as error:
            problem = error.problems[0]
            raise FusionBenchError(f"sample {number}: {problem.reason}", problem.remedy) from error


def example(task: "Task", requests: "Sequence[Instance]") -> Example:
    """Return a document as people read it."""
    *prompt, last = [own for own in requests[0].args if isinstance(own, str)]
    text = prompt[0] if prompt else last
    if not _has_labels(task):
        expected = _gold(task, requests[0].doc) if is_plain(task) else ""
        return Example(text, expected.strip() if isinstance(expected, str) else "")
    choices = tuple(task.doc_to_choice(requests[0].doc))
    labels = _labels(task, requests[0].doc)
    return Example(text, " / ".join(choices[label].strip() for label in labels), choices)


def digest(documents: "Sequence[Sequence[Instance]]") -> str:
    """Return the hash of documents and of what is asked of them."""
    found = hashlib.sha256()
    for requests in documents:
        asked = [requests[0].doc, [[own.request_type, own.args, own.repeats] for own in requests]]
        found.update(json.dumps(asked, default=str).encode())
    return found.hexdigest()


def answers(task: "Task", samples: NDArray[np.int64]) -> "Mapping[str, Array]":
    """Return what a model has answered to documents, as details.

    Args:
        task: the task with its answered requests.
        samples: the documents' numbers.
    """
    given: dict[int, list[Any]] = {sample: [] for sample in samples.tolist()}
    documents: dict[int, Any] = {}
    for own in task.instances:
        given[own.doc_id].append(own.resps[0])
        documents[own.doc_id] = own.doc
    if task.OUTPUT_TYPE == "generate_until":
        return {"answers": text_array([str(own[0]) for own in given.values()])}
    if not _has_labels(task):
        return {}
    counts = [len(task.doc_to_choice(documents[i])) for i in given]
    found = [[own[0] for own in row[:n]] for row, n in zip(given.values(), counts, strict=True)]
    details: dict[str, Array] = {
        "predictions": np.array([int(np.argmax(row)) for row in found]),
        "tied": np.array([int(row.count(max(row)) > 1) for row in found]),
    }
    labels = [_labels(task, documents[i]) for i in given]
    if all(len(own) == 1 for own in labels):
        details["labels"] = np.array([own[0] for own in labels])
    return details


def _has_labels(task: "Task") -> bool:
    """Return whether the harness itself compares the likeliest choice with a label."""
    return is_plain(task) and task.OUTPUT_TYPE == _CHOICE


def _refuse_empty(request: "Instance") -> None:
    scored = 2 if request.request_type == "loglikelihood" else 1
    *contexts, text = request.args[:scored]
    for own in (*contexts, text):
        if not isinstance(own, str):
            raise FusionBenchError(f"{own!r} is no text.")
    if not text and request.request_type != "generate_until":
        raise FusionBenchError("the text to score is empty.", "Leave the sample out.")


def _refuse_label(task: "Task", document: Any) -> None:
    choices = task.doc_to_choice(document)
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise FusionBenchError(f"the choice {choice!r} is no text.", "Leave the sample out.")
    if not choices:
        raise FusionBenchError("there is no choice.", "Leave the sample out.")
    for label in _labels(task, document):
        if not 0 <= label < len(choices):
            raise FusionBenchError(
                f"the label {_gold(task, document)!r} is none of its {len(choices)} choices.",
                "Correct 'doc_to_target', or choose another split.",
            )


def _labels(task: "Task", document: Any) -> list[int]:
    """Return the numbers of the right choices; -1 for what is none."""
    gold = _gold(task, document)
    choices = task.doc_to_choice(document)
    found: Iterable[Any] = gold if isinstance(gold, list) else [gold]
    return [
        choices.index(own)
        if isinstance(own, str) and own in choices
        else own
        if isinstance(own, int)
        else -1
        for own in found
    ] or [-1]


def _gold(task: "Task", document: Any) -> Any:
    if task.multiple_input:
        return task.doc_to_text(document)
    return task.doc_to_target(document)
