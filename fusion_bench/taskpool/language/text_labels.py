"""Classification by writing: a model writes the text of a label, or a number."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError, check_between, within
from fusion_bench.results import ACCURACY, ANSWERS, Example, Metric, SampleScores, text_array
from fusion_bench.taskpool.language.generation import stop_texts
from fusion_bench.taskpool.language.measures import (
    CORRELATIONS,
    TWO_CLASSES,
    class_label,
    classes,
    fitting,
    number,
    numbers,
)
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.prompts import Prompt
from fusion_bench.taskpool.language.requests import Generation
from fusion_bench.taskpool.language.task import LanguageTask, marked
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.tuning import (
    filled,
    label_likelihoods,
    next_logits,
    without_end,
)
from fusion_bench.taskpool.task import Evaluation, TaskDescription

#: The class of an answer that is no label's text.
_NONE = -1


@dataclass(frozen=True)
class Asked:
    """A prompt, and the label: a class's number, or any number."""

    prompt: str
    label: float


class TextLabelTask(LanguageTask[Asked]):
    """Prompts, after which a model writes the text of a class, or a number.

    Decoding is greedy. Spaces around an answer do not count. An answer that is the text of no class
    is wrong, whatever the label; one that is no number counts as 0. The report tells how many there
    are. Of two classes 1 is the positive one. Methods that learn from data learn from the
    likelihoods of the classes' texts, and where there are numbers from that of the first token.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        prompt: a column's name, or a template.
        labels: the texts of the classes, in the order of their numbers.
        number: a number is written instead.
        label: the column that holds the class, as a number or as its text, or the number.
        max_new_tokens: where an answer ends at the latest.
        stop: texts before which it ends.
        apply_chat_template: put the prompt into the tokenizer's chat template.
        system_prompt: the system's message there.
    """

    kind = "text_labels"
    measured = (ACCURACY, *TWO_CLASSES, *CORRELATIONS)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        prompt: str = "prompt",
        labels: Sequence[str] | None = None,
        number: bool = False,
        label: str = "label",
        max_new_tokens: int = 10,
        stop: Sequence[str] = ("\n",),
        apply_chat_template: bool = False,
        system_prompt: str | None = None,
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        self._prompt = Prompt(prompt, apply_chat_template, system_prompt)
        with within("label"):
            self._label = Template(label)
        check_between("max_new_tokens", max_new_tokens, 1, 10**6)
        with within("labels"):
            self._labels = _texts(labels, number)
        self._settings = stop_texts(stop), max_new_tokens
        templates = {"prompt": self._prompt.template, "label": self._label}
        super().__init__(dataset, templates, tokenizer, owner, max_length, metrics, name)
        two = TWO_CLASSES if len(self._labels) == 2 else ()
        own = CORRELATIONS if number else (ACCURACY, *two)
        kind = "numbers" if number else f"{len(self._labels)} classes"
        with within("metrics"):
            self.metrics = fitting(self.metrics, own, kind, chosen=metrics is not None)

    @property
    def options(self) -> Mapping[str, Any]:
        """The texts, and how an answer is written."""
        return {"labels": self._labels, "settings": self._settings, **self._prompt.options}

    def describe(self) -> TaskDescription:
        """Return what the task measures."""
        return replace(super().describe(), num_classes=len(self._labels) or None)

    def item(self, row: Mapping[str, Any]) -> Asked:
        """Return a row's prompt and label.

        Raises:
            FusionBenchError: no text, or a label that is none.
        """
        prompt = self._prompt.text(row, lambda: self.tokenizer)
        if not prompt.strip():
            raise FusionBenchError("the prompt is empty.", "Leave the sample out.")
        value = self._label.value(row)
        return Asked(prompt, class_label(value, self._labels) if self._labels else number(value))

    def example(self, item: Asked) -> Example:
        """Return what people read."""
        expected = self._labels[int(item.label)] if self._labels else f"{item.label:g}"
        return Example(item.prompt, expected)

    def learned(self, items: Sequence[Asked]) -> tuple[Tensor, Tensor]:
        """Return the prompts, and the classes or the first tokens of the numbers."""
        contexts = self.encoder(seq2seq=True).texts([own.prompt for own in items])
        longest = min(self._max_length or 10**9, self.tokenizer.model_max_length)
        prompts = filled([own[-longest:] for own in contexts])
        if self._labels:
            return prompts, torch.tensor([int(own.label) for own in items])
        written = self.encoder().plain([f" {own.label:.1f}" for own in items])
        return prompts, torch.tensor([tokens[0] for tokens in written])

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from prompts to the labels' log-likelihoods, or to tokens' logits."""
        encoder = self.encoder()
        if not self._labels:
            return lambda ids: next_logits(model, without_end(model, ids, encoder.end), how)
        # An encoder-decoder ends its answer, so that one is not the beginning of another.
        config: Any = getattr(model, "config", None)
        ends = getattr(config, "is_encoder_decoder", False) and encoder.eos is not None
        end = (encoder.eos,) if ends and encoder.eos is not None else ()
        texts = [tokens + end for tokens in encoder.plain([f" {own}" for own in self._labels])]
        return lambda ids: label_likelihoods(
            model, without_end(model, ids, encoder.end), texts, how
        )

    def scores(
        self, model: LanguageModel, items: Sequence[Asked], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Let the model write."""
        contexts = model.encoder.texts([own.prompt for own in items])
        texts = model.generate([Generation(own, *self._settings) for own in contexts])
        found = [self._read(text.strip()) for text in texts]
        details = {
            ANSWERS: text_array(texts),
            "unread": np.array([int(own is None) for own in found]),
            "truncated": marked(model.truncated, range(len(items)), len(items)),
        }
        labels = np.array([own.label for own in items])
        if not self._labels:
            values = np.array([own or 0.0 for own in found])
            details |= {"labels": labels, "predictions": values}
            return SampleScores(samples, numbers(labels, values), details)
        truth = labels.astype(np.int64)
        best = np.array([_NONE if own is None else int(own) for own in found])
        statistics = classes(truth, best)
        if len(self._labels) != 2:
            statistics = {ACCURACY.name: statistics[ACCURACY.name]}
        return SampleScores(samples, statistics, details | {"labels": truth, "predictions": best})

    def notes(self, model: str, scores: SampleScores) -> list[str]:
        """Return how many answers are no label's, too."""
        notes = super().notes(model, scores)
        if unread := int(scores.details["unread"].astype(np.int64).sum()):
            what = "the text of no class" if self._labels else "no number"
            how = "are wrong" if self._labels else "count as 0"
            notes.append(
                f"'{model}' on '{self.name}': {unread} of {scores.num_samples} answers are {what}, "
                f"and {how}."
            )
        return notes

    def _read(self, text: str) -> float | None:
        """Return the class or the number that a text stands for."""
        if self._labels:
            return self._labels.index(text) if text in self._labels else None
        try:
            value = float(text)
        except ValueError:
            return None
        return value if math.isfinite(value) else None


def _texts(labels: Sequence[str] | None, is_number: bool) -> tuple[str, ...]:
    """Return the texts of classes; none where a number is written."""
    if (labels is None) != is_number:
        raise FusionBenchError(
            "give either these, the classes' texts, or 'number: true'.",
            "Write them like '[no, yes]'.",
        )
    texts = tuple(labels or ())
    if isinstance(labels, str) or not all(isinstance(own, str) and own.strip() for own in texts):
        raise FusionBenchError(
            f"'{labels}' is not a list of texts.", "Quote 'no' and 'yes', which else are booleans."
        )
    if labels is not None and len({own.strip() for own in texts}) < max(2, len(texts)):
        raise FusionBenchError(f"'{list(texts)}' are not two or more different texts.")
    return tuple(own.strip() for own in texts)
