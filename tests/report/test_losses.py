import numpy as np
import pytest
from fixtures_report import model, report, synthetic

from fusion_bench.report import Report, compare_contenders, summarise
from fusion_bench.report.losses import (
    class_losses,
    confusion_matrix,
    confusions,
    per_class_accuracy,
    task_losses,
)
from fusion_bench.results import SampleScores

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2], np.int32)
SCORES = {
    name: SampleScores.classified(np.arange(8), LABELS, np.array(predictions))
    for name, predictions in {
        "own": [0, 0, 0, 1, 1, 2, 2, 0],
        "merged": [0, 1, 1, 1, 1, 0, 2, 0],
    }.items()
}
NAMES = ["cat", "dog", "emu"]


def evaluated() -> Report:
    models = {
        "a": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=72, b=45),
    }
    found = report(models)
    summarise(models, found.tasks)
    return found


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
    found, scores = synthetic({"a": 3, "b": 4, "c": 5}, full=full)
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    comparisons = {c.beside: c for c in compare_contenders(found, scores)}
    for loss in task_losses(found, merged):
        other = loss.task if full else "individual"
        assert loss.interval == comparisons[other].on(loss.task)
        assert loss.interval.difference == pytest.approx(loss.change)


def test_a_task_without_an_individual_model_has_no_loss() -> None:
    found, _ = synthetic({"a": 3, "b": 4}, individual=False)
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    assert task_losses(found, merged) == []


def test_classes_that_lost_right_answers() -> None:
    losses = class_losses(NAMES, SCORES["merged"], SCORES["own"])
    assert [(c.name, c.samples, c.individual, c.merged, c.lost) for c in losses] == [
        ("cat", 3, 3, 1, 2),
        ("emu", 3, 2, 1, 1),
    ]


def test_without_an_individual_model_wrong_answers_count() -> None:
    losses = class_losses(NAMES, SCORES["merged"], None)
    assert [(c.name, c.individual, c.lost) for c in losses] == [("cat", None, 2), ("emu", None, 2)]


def test_what_is_taken_for_what() -> None:
    matrix = confusion_matrix(SCORES["merged"], 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 2, 0], [2, 0, 1]]
    found = [(c.truth, c.answer, c.count, c.samples) for c in confusions(NAMES, matrix)]
    assert found == [("cat", "dog", 2, 3), ("emu", "cat", 2, 3)]


def test_each_classs_accuracy() -> None:
    assert per_class_accuracy(SCORES["merged"], 4) == [1 / 3, 1.0, 1 / 3, None]
