"""The rows and columns of the data sets, drawn in memory; the same ones on every call."""

from collections.abc import Callable, Hashable
from functools import cache
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from fusion_bench.zoo.language.names import CLASS_NAMES, GENERATION, PROSE, SCORED
from fusion_bench.zoo.language.prose import tale
from fusion_bench.zoo.language.questions import QUESTIONS, Question, choices
from fusion_bench.zoo.language.sentences import SENTENCES

if TYPE_CHECKING:
    from datasets import Features

#: Samples of each split, at most: some tasks do not have so many.
_SIZES = {"test": 200, "validation": 100, "train": 3000}
_TALES = {"test": 200, "validation": 100, "train": 400}
_DRAWS = 20_000  # in search of new samples


def columns(name: str) -> "Features":
    """Return the columns of a data set."""
    from datasets import ClassLabel, Features, List, Value

    text = Value("string")
    if name == PROSE:
        return Features({"text": text})
    if name in GENERATION:
        label = Value("int64")
        return Features({"prompt": text, "answer": text, "choices": List(text), "label": label})
    kept = Value("float32") if name == SCORED else ClassLabel(names=list(CLASS_NAMES[name]))
    return Features({**dict.fromkeys(text_columns(name), text), target_column(name): kept})


def text_columns(name: str) -> tuple[str, ...]:
    """Return the columns that an encoder reads."""
    pairs = {"entailment": ("premise", "hypothesis"), SCORED: ("text1", "text2")}
    return pairs.get(name, ("text",))


def target_column(name: str) -> str:
    """Return the column that an encoder predicts."""
    return "score" if name == SCORED else "label"


def rows(name: str, split: str) -> list[dict[str, Any]]:
    """Return the samples of a split."""
    if name == PROSE:
        return [{"text": text} for text in _drawn(name)[split]]
    if name in GENERATION:
        found, random = questions(name, split), Random(f"{name}/{split}/choices")
        return [_row(question, choices(question, found, random)) for question in found]
    return _drawn(name)[split]


def questions(name: str, split: str) -> list[Question]:
    """Return the questions of a split of a generation task, with the answers in all styles."""
    return _drawn(name)[split]


def _row(question: Question, offered: list[str]) -> dict[str, Any]:
    answer = question.answers[0]
    return {
        "prompt": question.prompt,
        "answer": answer,
        "choices": offered,
        "label": offered.index(answer),
    }


@cache
def _drawn(name: str) -> dict[str, list[Any]]:
    """Draw samples that all differ, and deal them to the splits in turn."""
    draw: Callable[[Random], Any] = tale if name == PROSE else {**QUESTIONS, **SENTENCES}[name]
    sizes = _TALES if name == PROSE else _SIZES
    random, found, wanted = Random(name), dict[Hashable, Any](), sum(sizes.values())
    for _ in range(_DRAWS):
        sample = draw(random)
        found.setdefault(_text(name, sample), sample)
        if len(found) == wanted:
            break
    samples = iter(found.values())
    return {split: list(islice(samples, size)) for split, size in sizes.items()}


def _text(name: str, sample: Any) -> Hashable:
    """Return what tells a sample from others: all that a model reads of it."""
    if name == PROSE:
        return str(sample)
    if name in GENERATION:
        return str(sample.prompt)
    return tuple(sample[column] for column in text_columns(name))
