"""Requests put together to rows, as a model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fusion_bench.taskpool.language.requests import Likelihood, Tokens

#: A context is read once for several continuations that are not much longer together.
_TOGETHER = 256


@dataclass(frozen=True)
class Row:
    """A context, and continuations that share it.

    What it becomes in a batch is found once, for all models that are asked.

    Attributes:
        context: its tokens.
        continuations: their tokens; none of them is empty.
        places: of the continuations among all requests.
    """

    context: Tokens
    continuations: list[Tokens]
    places: list[int]

    @cached_property
    def length(self) -> int:
        """How many tokens are read; the last of a continuation is only predicted."""
        return len(self.context) + sum(len(own) - 1 for own in self.continuations)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is one sequence, without branches."""
        return sum(len(own) > 1 for own in self.continuations) <= 1

    @cached_property
    def read(self) -> NDArray[np.int32]:
        """The tokens that are read: the context's, and those of all continuations."""
        branches = (token for own in self.continuations for token in own[:-1])
        return np.array([*self.context, *branches], dtype=np.int32)

    @cached_property
    def branch(self) -> NDArray[np.int32]:
        """The number of each token's continuation, counted from 1; 0 in the context."""
        numbers = np.arange(1, 1 + len(self.continuations), dtype=np.int32)
        context = np.zeros(len(self.context), dtype=np.int32)
        return np.concatenate([context, np.repeat(numbers, self.counts - 1)])

    @cached_property
    def position(self) -> NDArray[np.int32]:
        """The position of each token, which continuations count from the context's end."""
        first = len(self.context)
        parts = [np.arange(first), *(first + np.arange(count - 1) for count in self.counts)]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How many tokens each continuation has."""
        return np.array([len(own) for own in self.continuations])

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens that are predicted: those of all continuations."""
        return np.array([token for own in self.continuations for token in own], dtype=np.int64)

    @cached_property
    def at(self) -> NDArray[np.int64]:
        """Where each of them is predicted, in what is read."""
        # The context's last token predicts the first of each continuation.
        firsts = np.concatenate([[0], np.cumsum(self.counts - 1)[:-1]]) + len(self.context)
        found = np.arange(len(self.tokens)) - np.repeat(_before(self.counts), self.counts) - 1
        found += np.repeat(firsts, self.counts)
        found[_before(self.counts)] = len(self.context) - 1
        return found

    def takes(self, continuation: Tokens) -> bool:
        """Return whether one more continuation is worth its place in the same row."""
        longest = max(map(len, self.continuations))
        room = len(self.context) + longest + max(len(self.context), _TOGETHER)
        return self.length + len(continuation) - 1 <= room

    def alone(self) -> "list[Row]":
        """Return a row for each of the continuations."""
        both = zip(self.continuations, self.places, strict=True)
        return [Row(self.context, [own], [place]) for own, place in both]


class Rows:
    """The rows of the last requests, kept for the next model that is asked the same."""

    def __init__(self) -> None:
        self._asked: tuple[int, list[int], list[Likelihood]] | None = None
        self._rows: list[Row] = []

    def of(
        self, requests: Sequence[Likelihood], todo: NDArray[np.int64], longest: int
    ) -> list[Row]:
        """Put continuations of the same context together, where the model can read them so.

        Args:
            requests: all requests.
            todo: the numbers of those to put together.
            longest: how many tokens a row with branches may have.
        """
        asked = (longest, todo.tolist(), list(requests))
        if asked != self._asked:
            self._asked, self._rows = asked, _together(*asked)
        return self._rows


def _together(longest: int, todo: list[int], requests: list[Likelihood]) -> list[Row]:
    open_rows: dict[Tokens, int] = {}
    rows: list[Row] = []
    for place in todo:
        context, continuation = requests[place].context, requests[place].continuation
        number = open_rows.get(context)
        if number is not None and (row := rows[number]).takes(continuation):
            more = Row(context, [*row.continuations, continuation], [*row.places, place])
            if more.is_plain or more.length <= longest:
                rows[number] = more
                continue
        open_rows[context] = len(rows)
        rows.append(Row(context, [continuation], [place]))
    return rows


def _before(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many come before each of some parts, whose sizes are given."""
    return np.cumsum(counts) - counts
