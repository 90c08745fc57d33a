"""What a model reads of requests: laid out by hand, and put together once."""

from typing import Any

import numpy as np
import pytest

from fusion_bench.taskpool.language import rows as module
from fusion_bench.taskpool.language.requests import Likelihood
from fusion_bench.taskpool.language.rows import Row, Rows

ASKED = [
    *(Likelihood((5, 6, 7), (1, 2, 3)), Likelihood((5, 6, 7), (4,))),
    *(Likelihood((8,), (1, 2)), Likelihood((5, 6, 7), (9, 8))),
]


def test_a_row_is_laid_out_as_by_hand() -> None:
    row = Row((5, 6, 7), [(1, 2, 3), (4,), (9, 8)], [0, 1, 3])
    assert row.length == 6 and not row.is_plain
    assert row.read.tolist() == [5, 6, 7, 1, 2, 9]  # the last of each is only predicted
    assert row.branch.tolist() == [0, 0, 0, 1, 1, 3]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 3]
    assert row.tokens.tolist() == [1, 2, 3, 4, 9, 8]
    assert row.at.tolist() == [2, 3, 4, 2, 2, 5]  # each after the token that stands before it
    assert row.counts.tolist() == [3, 1, 2]


def test_requests_of_a_context_are_put_together_where_the_model_can_read_them() -> None:
    todo = np.arange(4)
    together = Rows().of(ASKED, todo, longest=100)
    assert [row.places for row in together] == [[0, 1, 3], [2]]
    alone = Rows().of(ASKED, todo, longest=5)  # without a branch any length will do
    assert [row.places for row in alone] == [[0, 1], [2], [3]]
    assert [row.places for row in Rows().of(ASKED, todo[1:], longest=0)] == [[1, 3], [2]]


def test_the_next_model_that_is_asked_the_same_has_the_same_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    put_together: Any = module._together

    def noted(*asked: Any) -> list[Row]:
        made.append(asked)
        return list(put_together(*asked))

    monkeypatch.setattr(module, "_together", noted)
    rows, todo = Rows(), np.arange(4)
    first = rows.of(ASKED, todo, 100)
    assert rows.of([Likelihood(own.context, own.continuation) for own in ASKED], todo, 100) is first
    assert len(made) == 1
    assert rows.of(ASKED, todo[:3], 100) is not first  # some answers are known
    assert rows.of(ASKED, todo, 0) is not first  # a model that reads no branches
    assert len(made) == 3
