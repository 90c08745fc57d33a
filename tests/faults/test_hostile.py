"""A stranger's config runs nothing."""

from pathlib import Path
from typing import Any

import pytest
from faults.hostile import Hostile, attempt, cases

#: Every how many-th is tried in an ordinary run; all of them take minutes. What refuses them has
#: tests of its own: `test_trust.py`, `scripts/test_checked.py`.
SHARE = 17
ALL = list(cases())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.exhaustive(only=bool(number % SHARE)), id=case.name)
        for number, case in enumerate(ALL)
    ],
)
def test_it_is_refused(case: Hostile, tmp_path: Path, row: Any) -> None:
    outcome = attempt(case, tmp_path)
    message = outcome.message.replace(f"{tmp_path}/", "")
    row("hostile", case=outcome.case, refused=outcome.refused, message=message)
    assert outcome.refused, outcome
