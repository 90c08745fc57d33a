import numpy as np
import pytest
from fixtures_report import model, report, synthetic

from fusion_bench.report import Report, TaskAnswers, compare_contenders, summarise
from fusion_bench.report.losses import (
    class_losses,
    confusion_matrix,
    confusions,
    task_losses,
)

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2], np.int32)
ANSWERS = TaskAnswers(
    np.arange(8, dtype=np.int32),
    LABELS,
    {
        "own": np.array([0, 0, 0, 1, 1, 2, 2, 0], np.int32),
        "merged": np.array([0, 1, 1, 1, 1, 0, 2, 0], np.int32),
    },
)
NAMES = ["cat", "dog", "emu"]


def evaluated() -> Report:
    models = {
        "a": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=72, b=45),
    }
    summarise(models, {"a": "a", "b": "b"})
    return report(models)


def test_the_task_that_loses_most_comes_first() -> None:
    found = evaluated()
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    losses = task_losses(found, merged)
    assert [loss.task for loss in losses] == ["b", "a"]
    assert losses[0].change == pytest.approx(-0.15) and losses[1].change == pytest.approx(-0.08)
    assert losses[0].kept == pytest.approx(0.75)
    assert losses[0].interval is None  # nothing was compared


@pytest.mark.parametrize("full", [False, True], ids=["own tasks", "all tasks"])
def test_intervals_are_those_of_the_comparison_with_the_tasks_own_model(full: bool) -> None:
    found, answers = synthetic({"a": 3, "b": 4, "c": 5}, full=full)
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    comparisons = {c.other: c for c in compare_contenders(found, answers)}
    for loss in task_losses(found, merged):
        other = loss.task if full else "individual"
        assert loss.interval == comparisons[other].tasks[loss.task]
        assert loss.interval.estimate == pytest.approx(loss.change)


def test_a_task_without_an_individual_model_has_no_loss() -> None:
    found, _ = synthetic({"a": 3, "b": 4}, individual=False)
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    assert task_losses(found, merged) == []


def test_classes_that_lost_right_answers() -> None:
    losses = class_losses(NAMES, ANSWERS, "merged", "own")
    assert [(c.name, c.samples, c.individual, c.merged, c.lost) for c in losses] == [
        ("cat", 3, 3, 1, 2),
        ("emu", 3, 2, 1, 1),
    ]


def test_without_an_individual_model_wrong_answers_count() -> None:
    losses = class_losses(NAMES, ANSWERS, "merged", None)
    assert [(c.name, c.individual, c.lost) for c in losses] == [("cat", None, 2), ("emu", None, 2)]


def test_what_is_taken_for_what() -> None:
    matrix = confusion_matrix(ANSWERS, "merged", 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 2, 0], [2, 0, 1]]
    found = [(c.truth, c.answer, c.count, c.samples) for c in confusions(NAMES, matrix)]
    assert found == [("cat", "dog", 2, 3), ("emu", "cat", 2, 3)]
