"""The rows and columns of the data sets, drawn in memory; the same ones on every call."""

from collections.abc import Callable, Hashable
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_bench.zoo.language.names import CLASS_NAMES, GENERATION, PROSE, SCORED
from fusion_bench.zoo.language.prose import tale
from fusion_bench.zoo.language.questions import QUESTIONS, Question, choices
from fusion_bench.zoo.language.sentences import SENTENCES, Row

if TYPE_CHECKING:
    from datasets import Features

T = TypeVar("T")

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
        return [{"text": text} for text in _drawn(name, tale, str, _TALES)[split]]
    if name in GENERATION:
        found, random = questions(name, split), Random(f"{name}/{split}/choices")
        return [_row(question, choices(question, found, random)) for question in found]

    def texts(row: Row) -> Hashable:
        return tuple(row[column] for column in text_columns(name))

    return _drawn(name, SENTENCES[name], texts, _SIZES)[split]


def questions(name: str, split: str) -> list[Question]:
    """Return the questions of a split of a generation task, with the answers in all styles."""
    return _drawn(name, QUESTIONS[name], lambda question: question.prompt, _SIZES)[split]


def _row(question: Question, offered: list[str]) -> dict[str, Any]:
    answer = question.answers[0]
    return {
        "prompt": question.prompt,
        "answer": answer,
        "choices": offered,
        "label": offered.index(answer),
    }


def _drawn(
    name: str, draw: Callable[[Random], T], identity: Callable[[T], Hashable], sizes: dict[str, int]
) -> dict[str, list[T]]:
    """Draw samples that all differ, and deal them to the splits in turn."""
    random, found, wanted = Random(name), dict[Hashable, T](), sum(sizes.values())
    for _ in range(_DRAWS):
        sample = draw(random)
        found.setdefault(identity(sample), sample)
        if len(found) == wanted:
            break
    samples = iter(found.values())
    return {split: list(islice(samples, size)) for split, size in sizes.items()}
