"""Generation: does a model write the expected text?"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError, check_between, within
from fusion_bench.results import ANSWERS, Example, Metric, SampleScores, text_array, with_ones
from fusion_bench.results.metrics import EXACT_MATCH
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.prompts import Prompt
from fusion_bench.taskpool.language.requests import Generation
from fusion_bench.taskpool.language.task import LanguageTask, marked
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.tuning import filled, next_logits, without_end
from fusion_bench.taskpool.task import Evaluation


@dataclass(frozen=True)
class Written:
    """A prompt, and the texts that are right."""

    prompt: str
    answers: tuple[str, ...]


class GenerationTask(LanguageTask[Written]):
    """Prompts and the texts that a model is to write after them: exact match.

    Decoding is greedy, whatever the model's ``generation_config`` says. Spaces around a text do not
    count.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        prompt: a column's name, or a template.
        answer: likewise; a column may hold a list of texts, of which each is right.
        max_new_tokens: where a text ends at the latest.
        stop: texts before which it ends.
        extract: a regular expression; its first group in the text, or the whole match, is compared.
        ignore_case: whether capitals count as small letters.
        apply_chat_template: put the prompt into the tokenizer's chat template.
        system_prompt: the system's message there.
    """

    kind = "generation"
    measured = (EXACT_MATCH,)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        prompt: str = "prompt",
        answer: str = "answer",
        max_new_tokens: int = 64,
        stop: Sequence[str] = ("\n",),
        extract: str | None = None,
        ignore_case: bool = False,
        apply_chat_template: bool = False,
        system_prompt: str | None = None,
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        self._prompt = Prompt(prompt, apply_chat_template, system_prompt)
        with within("answer"):
            self._answer = Template(answer)
        check_between("max_new_tokens", max_new_tokens, 1, 10**6)
        self._max_new_tokens = max_new_tokens
        self._stop = stop_texts(stop)
        self._extract = _pattern(extract)
        self._ignore_case = ignore_case
        templates = {"prompt": self._prompt.template, "answer": self._answer}
        super().__init__(dataset, templates, tokenizer, owner, max_length, metrics, name)

    @property
    def options(self) -> Mapping[str, Any]:
        """How a text is written and compared."""
        return {
            "max_new_tokens": self._max_new_tokens,
            "stop": self._stop,
            "extract": None if self._extract is None else self._extract.pattern,
            "ignore_case": self._ignore_case,
            **self._prompt.options,
        }

    def item(self, row: Mapping[str, Any]) -> Written:
        """Return the prompt and the right texts of a row.

        Raises:
            FusionBenchError: there is none, or it is empty.
        """
        found = self._answer.value(row)
        answers = [found] if isinstance(found, str) else list(found or ())
        if not answers or not all(isinstance(own, str) and own.strip() for own in answers):
            raise FusionBenchError(f"the answer {found!r} is no text.", "Leave the sample out.")
        return Written(self._prompt.text(row, lambda: self.tokenizer), tuple(answers))

    def scores(
        self, model: LanguageModel, items: Sequence[Written], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Let the model write."""
        contexts = model.encoder.texts([own.prompt for own in items])
        requests = [Generation(own, self._stop, self._max_new_tokens) for own in contexts]
        texts = model.generate(requests)
        right = [self.is_right(text, own) for text, own in zip(texts, items, strict=True)]
        return SampleScores(
            samples,
            {EXACT_MATCH.name: with_ones(np.array(right))},
            {
                ANSWERS: text_array(texts),
                "truncated": marked(model.truncated, range(len(items)), len(items)),
            },
        )

    def learned(self, items: Sequence[Written]) -> tuple[Tensor, Tensor]:
        """Return the prompts, and the first token of each one's first answer."""
        pairs = [(own.prompt, " " + own.answers[0].strip()) for own in items]
        first = self.encoder(seq2seq=True).likelihoods(pairs)
        labels = torch.tensor([own.continuation[0] for own in first])
        return filled([own.context for own in first]), labels

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from prompts to the logits of the next token."""
        end = self.encoder().end
        return lambda ids: next_logits(model, without_end(model, ids, end), how)

    def example(self, item: Written) -> Example:
        """Return what people read."""
        return Example(item.prompt, " / ".join(own.strip() for own in item.answers))

    def is_right(self, text: str, item: Written) -> bool:
        """Return whether a text is one of the right ones."""
        return self._compared(self._extracted(text)) in {self._compared(a) for a in item.answers}

    def _extracted(self, text: str) -> str:
        if self._extract is None:
            return text
        found = self._extract.search(text)
        if found is None:
            return ""
        return found.group(1 if self._extract.groups else 0) or ""

    def _compared(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self._ignore_case else text


def stop_texts(stop: Sequence[str]) -> tuple[str, ...]:
    """Return the texts before which what a model writes ends.

    Raises:
        FusionBenchError: one that is none, or empty.
    """
    texts = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise FusionBenchError(f"'{stop}' is not a list of texts.", place=("stop",))
    return tuple(texts)


def _pattern(pattern: str | None) -> "re.Pattern[str] | None":
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise FusionBenchError(
            f"'{pattern}' is not a valid pattern: {error}.", place=("extract",)
        ) from error
