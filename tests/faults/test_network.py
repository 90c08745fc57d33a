"""Whatever the Hub does, a file is read whole or refused in one line.

All of it takes most of an hour, waiting for answers that do not come. In an ordinary run
`test_network.py` and `weights/test_hub_weights.py` try each kind of fault on one thing.
"""

from pathlib import Path
from typing import Any

import pytest
from faults.network import (
    LIMIT,
    READ_WHOLE,
    SUBJECTS,
    Trial,
    attempt,
    fill,
    trials,
    write_repositories,
)

pytestmark = [pytest.mark.exhaustive(only=True), pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the repositories, and a cache that holds them."""
    place = tmp_path_factory.mktemp("network")
    write_repositories(place / "hub")
    fill(place / "hub", place / "warm")
    return place / "hub", place / "warm"


@pytest.fixture(scope="module")
def truth(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what is read of each thing where nothing fails."""
    caches = {subject: tmp_path_factory.mktemp("cache") for subject in SUBJECTS}
    return {
        subject: attempt(Trial("", subject, ()), *places, cache)["result"]
        for subject, cache in caches.items()
    }


@pytest.mark.parametrize(
    "trial", list(trials()), ids=lambda trial: f"{trial.fault}: {trial.subject}"
)
def test_it_is_read_whole_or_refused(
    trial: Trial, places: tuple[Path, Path], truth: dict[str, Any], tmp_path: Path, row: Any
) -> None:
    found = attempt(trial, *places, tmp_path)
    if found["outcome"] == READ_WHOLE and found["result"] != truth[trial.subject]:
        found["outcome"] = "read wrong"
    found.pop("result", None)
    right = found["outcome"] in trial.expected
    row("network", fault=trial.fault, subject=trial.subject, right=right, **found)
    assert right, (trial.expected, found)
