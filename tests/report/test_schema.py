import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_report import model, report, task_info
from pydantic import ValidationError

from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report, TaskResult, summarise
from fusion_bench.results import ACCURACY, LOSS, SampleScores


def test_figures_from_scores() -> None:
    labels = np.arange(100) % 10
    predictions = np.where(np.arange(100) < 90, labels, 10)
    losses = np.full(100, 0.25, np.float32)
    scores = SampleScores.classified(np.arange(100), labels, predictions, losses)
    result = TaskResult.of(scores, [ACCURACY, LOSS])
    assert result.main.value == 0.9 and list(result.metrics) == ["accuracy", "loss"]
    assert result.metrics["loss"].value == 0.25
    assert result.main.stderr == pytest.approx(math.sqrt(0.9 * 0.1 / 100))


def test_normalised_by_the_tasks_own_model() -> None:
    models = {
        "_pretrained_": model("pretrained", a=40, b=30),
        "A": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=60, b=45),
    }
    summarise(models, {"a": task_info("a", "A"), "b": task_info("b", "b")})
    merged = models["merged"]
    assert merged.tasks["a"].main.normalized == pytest.approx(0.75)
    assert merged.average is not None
    assert merged.average.main.value == pytest.approx(0.525)
    assert merged.average.metrics["loss"].value == pytest.approx(0.5)
    assert merged.average.normalized == pytest.approx(0.75)
    assert models["A"].tasks["a"].main.normalized == 1
    assert models["_pretrained_"].tasks["b"].main.normalized == pytest.approx(0.5)


def test_no_normalised_accuracy_without_an_individual_model() -> None:
    models = {"A": model("individual", a=0), "merged": model("merged", a=60, b=45)}
    summarise(models, {"a": task_info("a", "A"), "b": task_info("b", "b")})
    assert models["merged"].tasks["a"].main.normalized is None  # the individual has none right
    assert models["merged"].tasks["b"].main.normalized is None
    assert models["merged"].average is not None
    assert models["merged"].average.normalized is None


def test_a_saved_report_reads_back(tmp_path: Path) -> None:
    written = report({"merged": model("merged", a=60, b=45)})
    written.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({"schema_version": 1, "surprise": 1})


def test_figures_for_pandas() -> None:
    models = {"a": model("individual", a=80), "merged": model("merged", a=60, b=45)}
    summarise(models, {"a": task_info("a", "a"), "b": task_info("b")})
    made = report(models)
    frame = made.to_pandas()
    assert len(frame) == 2 * 3  # accuracy and loss
    row = frame.set_index(["model", "task", "metric"]).loc["merged", "a", "accuracy"]
    assert row["value"] == 0.6 and row["normalized"] == pytest.approx(0.75)
    assert (row["role"], row["relation"], row["unit"], row["num_samples"]) == (
        *("merged", "own", "%"),
        100,
    )
    empty = report({}).to_pandas()
    assert len(empty) == 0 and list(empty.columns) == list(frame.columns)


def test_without_pandas_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FusionBenchError, match="pip install pandas"):
        report({}).to_pandas()


def test_a_notebook_shows_it() -> None:
    evil = "<script>alert(1)</script>"
    made = report({"merged": model("merged", **{evil: 60, "b": 45})})
    made.run.notes.append(evil)
    html = made._repr_html_()
    assert "<script" not in html and html.count("&lt;script&gt;") >= 2
    assert not re.search(r"(src|href)=.?(http|//)|url\((?!#)|@import", html)
    assert "60.0" in html and "<svg" in html
    nothing = made.model_copy(update={"tasks": {}, "models": {}})
    assert "Nothing was evaluated" in nothing._repr_html_()
    assert len(repr(made)) < 200 and repr(made) == str(made)
