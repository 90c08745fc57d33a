"""How many jobs of a sweep have ended, and how long the others will take."""

import pickle
from pathlib import Path

from fusion_bench.progress import Step
from fusion_bench.scripts.tally import Tally


def begun(directory: Path, total: int | None) -> Tally:
    tally = Tally()
    tally.begin(directory, total)
    tally.begun = 1000.0
    return tally


def test_the_time_that_is_left_is_told_by_the_jobs_that_took_any(tmp_path: Path) -> None:
    tally = begun(tmp_path, 12)
    tally.add(known=True)
    assert tally.text(1001) == "1 of 12 jobs"
    tally.add(known=False)
    assert tally.text(1060) == "2 of 12 jobs, about 10 min left"
    for _ in range(10):
        tally.add(known=False)
    assert tally.text(1700) == "12 of 12 jobs"


def test_all_processes_count_together(tmp_path: Path) -> None:
    tally = begun(tmp_path, 4)
    other: Tally = pickle.loads(pickle.dumps(tally))
    other.add(known=False)
    tally.add(known=True)
    other.add(known=False)
    assert tally.text(1060) == other.text(1060) == "3 of 4 jobs, about 30 s left"
    step = Step("Sweep", unit="jobs")
    tally.onto(step)
    assert (step.done, step.total, step.skipped) == (3, 4, 1)


def test_what_is_kept_is_told_with_its_place(tmp_path: Path) -> None:
    tally = begun(tmp_path, 3)
    tally.add(known=False)
    goes_on = "The same command goes on with the others."
    assert tally.what_is_kept() == f"1 of 3 jobs done: {tmp_path}. {goes_on}"
    tally.total = None  # an optimiser that does not say how much it will try
    assert tally.what_is_kept().startswith("1 jobs done: ")
    assert tally.text(2000) == "job 1"


def test_a_sweep_that_was_interrupted_is_counted_anew(tmp_path: Path) -> None:
    begun(tmp_path, 3).add(known=False)
    again = begun(tmp_path, 3)
    assert again.text(1000) == "0 of 3 jobs"
    again.add(known=True)
    again.end()
    assert list(tmp_path.iterdir()) == []
