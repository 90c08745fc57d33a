import math
from pathlib import Path

import pytest
from fixtures_report import model, report
from pydantic import ValidationError

from fusion_bench.report import Report, TaskResult, summarise


def test_figures_from_counts() -> None:
    result = TaskResult.from_counts(num_correct=90, loss_sum=25.0, num_samples=100)
    assert result.accuracy == 0.9
    assert result.loss == 0.25
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.9 * 0.1 / 100))


def test_normalised_by_the_tasks_own_model() -> None:
    models = {
        "_pretrained_": model("pretrained", a=40, b=30),
        "A": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=60, b=45),
    }
    summarise(models, {"a": "A", "b": "b"})
    merged = models["merged"]
    assert merged.tasks["a"].normalized_accuracy == pytest.approx(0.75)
    assert merged.average is not None
    assert merged.average.accuracy == pytest.approx(0.525)
    assert merged.average.loss == pytest.approx(0.5)
    assert merged.average.normalized_accuracy == pytest.approx(0.75)
    assert models["A"].tasks["a"].normalized_accuracy == 1
    assert models["_pretrained_"].tasks["b"].normalized_accuracy == pytest.approx(0.5)


def test_no_normalised_accuracy_without_an_individual_model() -> None:
    models = {"A": model("individual", a=0), "merged": model("merged", a=60, b=45)}
    summarise(models, {"a": "A", "b": "b"})
    assert models["merged"].tasks["a"].normalized_accuracy is None  # the individual has none right
    assert models["merged"].tasks["b"].normalized_accuracy is None
    assert models["merged"].average is not None
    assert models["merged"].average.normalized_accuracy is None


def test_a_saved_report_reads_back(tmp_path: Path) -> None:
    written = report({"merged": model("merged", a=60, b=45)})
    written.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({"schema_version": 1, "surprise": 1})
