"""Multiple choice: which of some answers does a model find the likeliest?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.results import ACCURACY, LOSS, Example, Metric, SampleScores, with_ones
from fusion_bench.results.metrics import ACCURACY_PER_BYTE
from fusion_bench.taskpool.language.encoding import Encoder
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.prompts import Prompt
from fusion_bench.taskpool.language.requests import Likelihood
from fusion_bench.taskpool.language.task import LanguageTask, marked
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.tuning import NOTHING, by_length, filled, room
from fusion_bench.taskpool.task import Evaluation


@dataclass(frozen=True)
class Choices:
    """A question.

    Attributes:
        prompt: what the model reads.
        choices: the answers, each with what stands before it.
        label: the number of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int


class MultipleChoiceTask(LanguageTask[Choices]):
    """Questions with some answers, of which the likeliest by the model counts.

    An answer's likelihood is that of all its tokens, with no correction for its length; beside
    it, ``accuracy_per_byte`` divides the log-likelihood by the answer's bytes. The loss is the
    cross entropy of the right answer among the answers.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        prompt: a column's name, or a template.
        choices: a column of lists of texts, or a list of templates.
        label: a column's name or a template; it holds the right choice's number, counted from 0,
            its letter, or its text.
        delimiter: stands between prompt and answer; by default a space, and nothing in a chat.
        apply_chat_template: put the prompt into the tokenizer's chat template.
        system_prompt: the system's message there.
    """

    kind = "multiple_choice"
    measured = (ACCURACY, ACCURACY_PER_BYTE, LOSS)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        prompt: str = "prompt",
        choices: str | Sequence[str] = "choices",
        label: str = "label",
        delimiter: str | None = None,
        apply_chat_template: bool = False,
        system_prompt: str | None = None,
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        self._prompt = Prompt(prompt, apply_chat_template, system_prompt)
        default = "" if apply_chat_template else " "
        self._delimiter = default if delimiter is None else delimiter
        listed = [choices] if isinstance(choices, str) else list(choices)
        with within("choices"):
            self._choices = [Template(choice) for choice in listed]
            if not listed:
                raise FusionBenchError("there is no choice.", "Name a column.")
        self._is_column = isinstance(choices, str)
        with within("label"):
            self._label = Template(label)
        numbered = {f"choices[{i}]": own for i, own in enumerate(self._choices)}
        named = {"choices": self._choices[0]} if self._is_column else numbered
        templates = {"prompt": self._prompt.template, **named, "label": self._label}
        super().__init__(dataset, templates, tokenizer, owner, max_length, metrics, name)

    @property
    def options(self) -> Mapping[str, Any]:
        """What stands around prompt and answer."""
        return {"delimiter": self._delimiter, **self._prompt.options}

    def item(self, row: Mapping[str, Any]) -> Choices:
        """Return the question of a row.

        Raises:
            FusionBenchError: fewer than two answers, an empty one, or a label that is none.
        """
        if self._is_column:
            found = self._choices[0].value(row)
            if not isinstance(found, Sequence) or isinstance(found, str):
                raise FusionBenchError(f"'{self._choices[0].text}' holds no list of answers.")
            texts = list(found)
        else:
            texts = [choice.render(row) for choice in self._choices]
        for text in texts:
            if not isinstance(text, str) or not text:
                raise FusionBenchError(f"the answer {text!r} is no text.", "Leave the sample out.")
        if len(texts) < 2:
            raise FusionBenchError(f"it has {len(texts)} answers, which is no choice.")
        label = _label(self._label.value(row), texts)
        prompt = self._prompt.text(row, lambda: self.tokenizer)
        return Choices(prompt, tuple(self._delimiter + text for text in texts), label)

    def learned(self, items: Sequence[Choices]) -> tuple[Tensor, Tensor]:
        """Return each answer's tokens after those of the prompt, and the right one's number.

        The tokens have the shape (items, answers, 2, width): the tokens, and whether each is the
        answer's.
        """
        encoder = self.encoder()
        most = max(len(own.choices) for own in items)
        rows, marks = [], []
        for own in items:
            asked = encoder.likelihoods([(own.prompt, choice) for choice in own.choices])
            empty: list[tuple[int, ...]] = [()] * (most - len(asked))
            rows += [each.context + each.continuation for each in asked] + empty
            marks += [(0,) * len(e.context) + (1,) * len(e.continuation) for e in asked] + empty
        both = torch.stack([filled(rows), filled(marks)], dim=1)
        return both.unflatten(0, (len(items), most)), torch.tensor([own.label for own in items])

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function to the log-likelihoods of the answers; -inf where there is none."""
        module: Any = model
        if getattr(module.config, "is_encoder_decoder", False):
            raise FusionBenchError(
                "methods that learn from data cannot use multiple choice with an encoder-decoder.",
                "Use a GenerationTask.",
                place=self.settings,
            )

        def classify(inputs: Tensor) -> Tensor:
            ids, answers = inputs.flatten(0, 1).unbind(dim=1)
            found = torch.full((len(ids),), -torch.inf, device=ids.device)
            for rows, own in by_length(ids, room(model) + 1):
                with how.fabric.autocast():
                    logits = module(input_ids=own[:, :-1], use_cache=False).logits.float()
                each = logits.log_softmax(dim=-1).gather(2, own[:, 1:, None])[..., 0]
                # of the same tokens, whose beginnings may be left out
                length = int((ids[rows[0]] != NOTHING).sum())
                scored = answers[rows, 1 + length - own.shape[1] : length] == 1
                found = found.index_put((rows,), (each * scored).sum(dim=1))
            return found.unflatten(0, inputs.shape[:2])

        return classify

    def scores(
        self, model: LanguageModel, items: Sequence[Choices], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Ask for the likelihood of each answer."""
        owners = [i for i, own in enumerate(items) for _ in own.choices]
        asked = self.encoded(model.encoder, items, partial(_asked, model.encoder))
        found, _ = model.log_likelihoods([request for own in asked for request in own])
        cut = marked(model.truncated | model.overlong, owners, len(items))
        ends = np.cumsum([len(own.choices) for own in items])
        rows = np.split(found, ends[:-1])
        sizes = [np.array([len(c.encode()) - self._before for c in own.choices]) for own in items]
        labels = np.array([own.label for own in items])
        best = np.array([int(own.argmax()) for own in rows])
        by_size = [int((own / size).argmax()) for own, size in zip(rows, sizes, strict=True)]
        losses = [_loss(own, label) for own, label in zip(rows, labels, strict=True)]
        return SampleScores(
            samples,
            {
                ACCURACY.name: with_ones(best == labels),
                ACCURACY_PER_BYTE.name: with_ones(np.array(by_size) == labels),
                LOSS.name: with_ones(np.array(losses)),
            },
            {
                "labels": labels,
                "predictions": best,
                "tied": np.array([int((own == own.max()).sum() > 1) for own in rows]),
                "truncated": cut,
            },
        )

    def example(self, item: Choices) -> Example:
        """Return what people read."""
        choices = tuple(own.removeprefix(self._delimiter) for own in item.choices)
        return Example(item.prompt, choices[item.label], choices)

    @property
    def _before(self) -> int:
        return len(self._delimiter.encode())


def _asked(encoder: Encoder, items: Sequence[Choices]) -> list[list[Likelihood]]:
    """Return the requests of each question."""
    pairs = [(own.prompt, choice) for own in items for choice in own.choices]
    requests = iter(encoder.likelihoods(pairs))
    return [list(islice(requests, len(own.choices))) for own in items]


def _loss(values: NDArray[np.float64], label: int) -> float:
    return float(np.logaddexp.reduce(values) - values[label])


def _label(value: Any, choices: Sequence[str]) -> int:
    """Return the number of the right choice."""
    number = choices.index(value) if value in choices else None
    if number is None and isinstance(value, str):
        text = value.strip()
        if text.lstrip("-").isdecimal():
            number = int(text)
        elif len(text) == 1 and text.isalpha() and text.isascii():
            number = ord(text.upper()) - ord("A")
    if number is None and type(value) is int:
        number = value
    if number is None or not 0 <= number < len(choices):
        hint = " A label of -1 marks an unlabelled split." if number == -1 else ""
        raise FusionBenchError(
            f"the label {value!r} is none of its {len(choices)} choices.{hint}",
            "Name another column in 'label', or choose another split.",
        )
    return number
