from pathlib import Path

import numpy as np
import pytest
from fixtures_report import synthetic
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Scores
from fusion_bench.results import METRICS, SampleScores, with_ones

NAMES = st.text(min_size=1, max_size=8)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 9), min_size=1), max_size=3))
def test_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, found: dict) -> None:
    scores = Scores()
    for task, models in found.items():
        for model, answer in models.items():
            own = SampleScores.classified(numbers(3), numbers(4), numbers(answer))
            scores.add(task, model, own)
    report = tmp_path_factory.mktemp("scores") / "report.json"
    scores.save(report)
    back = Scores.load(report)
    assert {t: set(own) for t, own in back.tasks.items()} == {t: set(m) for t, m in found.items()}
    for task, models in found.items():
        for model, answer in models.items():
            own = back.tasks[task][model]
            assert own.samples.tolist() == [3]
            assert own.details["labels"].tolist() == [4]
            assert own.details["predictions"].tolist() == [answer]
            assert own.statistics["accuracy"].tolist() == [[answer == 4, 1]]


def test_every_number_comes_back(tmp_path: Path) -> None:
    scores = Scores()
    values = np.array([0.1, np.pi, 1e300, np.inf])
    for model in "ab":
        own = SampleScores(
            np.array([0, 2, 5, 2**40]),
            {"loss": with_ones(values), "mean_iou": np.arange(16.0).reshape(4, 4)},
            {"texts": np.arange(8, dtype=np.float32).reshape(4, 2)},
            np.array([7, 7, 8, 9]),
        )
        scores.add("t", model, own)
    scores.save(tmp_path / "r.json")
    back = Scores.load(tmp_path / "r.json").tasks["t"]["b"]
    assert back.samples.tolist() == own.samples.tolist() and back.clusters is not None
    assert back.clusters.tolist() == [7, 7, 8, 9]
    assert back.details["texts"].tolist() == own.details["texts"].tolist()
    for name, rows in own.statistics.items():
        assert back.statistics[name].dtype == np.float64
        assert back.statistics[name].tolist() == rows.tolist()
    # what both models share is there once
    assert sum("samples" in name for name in load_file(tmp_path / "r.scores.safetensors")) == 1


def test_they_lie_beside_the_report(tmp_path: Path) -> None:
    Scores().save(tmp_path / "r.json")
    assert [path.name for path in tmp_path.iterdir()] == ["r.scores.safetensors"]


def test_missing_scores_are_named(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"r\.scores\.safetensors' is missing.*'r\.json'"):
        Scores.load(tmp_path / "r.json")


@pytest.mark.parametrize("name", ["r.scores.safetensors", "r.answers.safetensors"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(FusionBenchError, match="cannot be read"):
        Scores.load(tmp_path / "r.json")


ONE = numbers(1)
STRANGE = {
    "no samples": {"t/m/model": numbers()},
    "samples twice": {"t/m/model": numbers(), "t/m/samples": numbers(1, 1)},
    "other length": {
        "t/m/model": numbers(),
        "t/m/samples": ONE,
        "t/m/statistics/accuracy": np.ones((2, 2)),
    },
    "no rows": {"t/m/model": numbers(), "t/m/samples": ONE, "t/m/statistics/accuracy": ONE},
    "no name": {"t/m/model": numbers(), "t/m/samples": ONE, "t/m/details": ONE},
    "fractions": {"t/m/model": numbers(), "t/m/samples": np.array([0.5])},
    "one word": {"t": ONE},
}
EARLIER = {
    "no samples": {"predictions/t/m": ONE},
    "no labels": {"samples/t": ONE, "predictions/t/m": ONE},
    "no model": {"samples/t": ONE, "labels/t": ONE, "predictions/t": ONE},
    "other length": {"samples/t": ONE, "labels/t": ONE, "predictions/t/m": numbers(1, 2)},
    "one word": {"predictions": ONE},
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_arrays_are_refused(tmp_path: Path, case: str) -> None:
    save_file(STRANGE[case], tmp_path / "r.scores.safetensors")
    with pytest.raises(FusionBenchError, match="does not contain the scores"):
        Scores.load(tmp_path / "r.json")


@pytest.mark.parametrize("case", EARLIER)
def test_strange_arrays_of_an_earlier_version_are_refused(tmp_path: Path, case: str) -> None:
    save_file(EARLIER[case], tmp_path / "r.answers.safetensors")
    with pytest.raises(FusionBenchError, match="does not contain the scores"):
        Scores.load(tmp_path / "r.json")


def test_scores_must_be_the_reports(tmp_path: Path) -> None:
    found, scores = synthetic({"a": 3, "b": 4})
    path = tmp_path / "report.json"
    scores.save(path)
    assert Scores.load(path, found).metrics["a"][0] == METRICS["accuracy"]
    found.tasks["a"].num_classes = 2
    with pytest.raises(FusionBenchError, match="'a' has 2 classes"):
        Scores.load(path, found)
    found.tasks["a"].num_classes = 3
    found.tasks["a"].metrics[0].name = "surprise"
    with pytest.raises(FusionBenchError, match="no metric 'surprise'"):
        Scores.load(path, found)
    del scores.tasks["b"]["merged"]
    scores.save(path)
    found.tasks["a"].metrics[0].name = "accuracy"
    with pytest.raises(FusionBenchError, match="merged"):
        Scores.load(path, found)


def test_models_of_a_task_must_have_the_same_samples(tmp_path: Path) -> None:
    found, scores = synthetic({"a": 3}, samples=5)
    own = scores.tasks["a"]["merged"]
    scores.add("a", "merged", own.at(own.samples != 2))
    scores.save(tmp_path / "report.json")
    with pytest.raises(FusionBenchError, match="other samples of 'a'"):
        Scores.load(tmp_path / "report.json", found)
