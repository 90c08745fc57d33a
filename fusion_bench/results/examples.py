"""What samples of texts look like to people."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.results.scores import SampleScores

#: The detail that holds the texts that a model wrote.
ANSWERS = "answers"


@dataclass(frozen=True)
class Example:
    """A sample as people read it.

    Attributes:
        prompt: what a model reads.
        expected: the right answer; empty where there is none.
        choices: the answers to choose from, in the order of the predictions.
    """

    prompt: str
    expected: str = ""
    choices: tuple[str, ...] = ()

    def answer(self, scores: SampleScores, row: int) -> str:
        """Return a model's answer; empty where it gave none.

        Args:
            scores: the model's scores.
            row: which of its samples this is.
        """
        if ANSWERS in scores.details:
            return array_texts(scores.details[ANSWERS][row : row + 1])[0]
        if self.choices and "predictions" in scores.details:
            chosen = int(scores.details["predictions"][row])
            return self.choices[chosen] if 0 <= chosen < len(self.choices) else ""
        return ""


def text_array(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return texts as UTF-8, a row each, filled up with zeros; ``array_texts`` reads them."""
    encoded = [text.encode() for text in texts]
    width = max([1, *map(len, encoded)])
    return np.array([list(own.ljust(width, b"\0")) for own in encoded], dtype=np.uint8)


def array_texts(array: NDArray[np.generic]) -> list[str]:
    """Return the texts of ``text_array``."""
    rows = array.astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
