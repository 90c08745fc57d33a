"""Files that the version with schema 1 wrote: they are read for ever."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import CompareProgram
from fusion_bench.report import Report, Scores, compare_contenders, markdown
from fusion_bench.report.page import page
from fusion_bench.report.scaling import Study

PLACE = Path(__file__).parent / "schema_1"
RUNS = ["small", "tall", "search", "compare"]


def old(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PLACE / run / "report.json").read_text())
    assert found["schema_version"] == 1
    return found


def read(run: str) -> tuple[Report, Scores]:
    path = PLACE / run / "report.json"
    report = Report.load(path)
    return report, Scores.load(path, report)


@pytest.mark.parametrize("run", RUNS)
def test_every_figure_is_the_same(run: str) -> None:
    before, (now, _) = old(run), read(run)
    assert now.schema_version == 2 and list(now.models) == list(before["models"])
    for name, model in before["models"].items():
        assert now.models[name].identity == model["weights_sha256"]
        for task, result in model["tasks"].items():
            found = now.models[name].tasks[task]
            accuracy, loss = found.metrics["accuracy"], found.metrics["loss"]
            assert found.main == accuracy and loss.value == result["loss"]
            assert (accuracy.value, accuracy.stderr, accuracy.normalized) == (
                *(result["accuracy"], result["accuracy_stderr"]),
                result["normalized_accuracy"],
            )
            assert found.per_class == result["per_class_accuracy"]
        average = now.models[name].average
        assert (average is None) == (model["average"] is None)
        if average is not None:
            assert average.main is not None
            assert average.main.value == model["average"]["accuracy"]
            assert average.normalized == model["average"]["normalized_accuracy"]
    for task, info in before["tasks"].items():
        assert now.tasks[task].identity["dataset"] == info["fingerprint"]
        assert now.tasks[task].num_classes == info["num_classes"]
        assert now.tasks[task].owner == task
    for comparison, made in zip(before["comparisons"], now.comparisons, strict=True):
        assert (made.of, made.beside) == (comparison["model"], comparison["other"])
        assert made.average is not None and made.verdict == comparison["verdict"]
        ends = (made.average.difference, made.average.low, made.average.high)
        assert ends == tuple(comparison["accuracy"].values())


@pytest.mark.parametrize("run", RUNS)
def test_the_intervals_are_computed_again_to_the_last_digit(run: str) -> None:
    report, scores = read(run)
    assert compare_contenders(report, scores) == report.comparisons


def test_relations_follow_from_the_names() -> None:
    report, _ = read("small")
    relations = {n: {r.relation for r in m.tasks.values()} for n, m in report.models.items()}
    assert relations == {"_pretrained_": {"other"}, "merged": {"own"}} | {
        task: {"own"} for task in report.tasks
    }
    tall, _ = read("tall")
    assert all(
        result.relation == "own"
        for name, model in tall.models.items()
        if name.startswith("merged/")
        for result in model.tasks.values()
    )


@pytest.mark.parametrize("run", RUNS)
def test_it_is_shown_and_saved_as_any_other(run: str, tmp_path: Path) -> None:
    report, scores = read(run)
    assert "accuracy" in markdown(report) and "Accuracy in percent" in page(report, scores)
    report.save(tmp_path / "report.json")
    scores.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 2
    assert Report.load(tmp_path / "report.json") == report
    again = Scores.load(tmp_path / "report.json", report)
    assert compare_contenders(report, again) == report.comparisons


def test_it_is_compared_with_one_of_today(tmp_path: Path) -> None:
    report, scores = read("small")
    report.save(tmp_path / "now" / "report.json")
    scores.save(tmp_path / "now" / "report.json")
    shutil.copytree(PLACE / "search", tmp_path / "before")
    found = CompareProgram([str(tmp_path / "now"), str(tmp_path / "before")]).run()
    before, _ = read("compare")
    assert found is not None
    theirs = {(c.of, c.beside): c.average for c in before.comparisons}
    assert [c.average for c in found.main_comparisons()] == [theirs["search", "small"]]


def test_a_study() -> None:
    before = json.loads((PLACE / "study" / "study.json").read_text())
    now = Study.load(PLACE / "study" / "study.json")
    assert [point.model_dump() for point in now.points] == before["points"]
    now.summarise()
    assert [point.mean for point in now.points] == [p["mean"] for p in before["points"]]


@pytest.mark.parametrize("lost", ["run", "tasks", "models"])
def test_what_lacks_a_part_is_refused(lost: str, tmp_path: Path) -> None:
    report = old("small")
    for broken in ({k: v for k, v in report.items() if k != lost}, {**report, lost: [1]}):
        (tmp_path / "report.json").write_text(json.dumps(broken))
        with pytest.raises(FusionBenchError, match="is not a report of this version"):
            Report.load(tmp_path / "report.json")


def test_scores_lack_the_losses_that_were_not_kept() -> None:
    report, scores = read("small")
    own = scores.tasks["digits"]["merged"]
    assert list(own.statistics) == ["accuracy"]
    share = own.statistics["accuracy"][:, 0].mean()
    assert np.isclose(share, report.models["merged"].tasks["digits"].main.value)
