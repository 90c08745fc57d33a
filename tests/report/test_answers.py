from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Answers, TaskAnswers

NAMES = st.text(min_size=1, max_size=8)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_answers_by_task_and_model() -> None:
    answers = Answers()
    samples, labels = numbers(0, 2, 5), numbers(1, 0, 1)
    for model, predictions in {"a": (1, 1, 1), "b": (0, 0, 1)}.items():
        answers.add("t", model, TaskAnswers(samples, labels, {model: numbers(*predictions)}))
    assert answers.tasks["t"].right("a").tolist() == [True, False, True]
    assert answers.tasks["t"].right("b").tolist() == [False, True, True]


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 9), min_size=1), max_size=3))
def test_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, found: dict) -> None:
    answers = Answers()
    for task, models in found.items():
        for model, answer in models.items():
            own = TaskAnswers(numbers(3), numbers(4), {model: numbers(answer)})
            answers.add(task, model, own)
    report = tmp_path_factory.mktemp("answers") / "report.json"
    answers.save(report)
    back = Answers.load(report)
    assert {t: set(a.predictions) for t, a in back.tasks.items()} == {
        task: set(models) for task, models in found.items()
    }
    for task, models in found.items():
        assert back.tasks[task].samples.tolist() == [3]
        assert back.tasks[task].labels.tolist() == [4]
        for model, answer in models.items():
            assert back.tasks[task].predictions[model].tolist() == [answer]


def test_they_lie_beside_the_report(tmp_path: Path) -> None:
    Answers().save(tmp_path / "r.json")
    assert [path.name for path in tmp_path.iterdir()] == ["r.answers.safetensors"]


def test_missing_answers_are_named(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"r\.answers\.safetensors' is missing.*'r\.json'"):
        Answers.load(tmp_path / "r.json")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.answers.safetensors").write_bytes(b"no such thing")
    with pytest.raises(FusionBenchError, match="cannot be read"):
        Answers.load(tmp_path / "r.json")
    one = numbers(1)
    for arrays in (
        {"predictions/t/m": one},
        {"samples/t": one},
        {"samples": one},
        {"predictions/t": one},
        {"samples/t": one, "labels/t": one, "predictions/t/m": numbers(1, 2)},
    ):
        save_file(arrays, tmp_path / "r.answers.safetensors")
        with pytest.raises(FusionBenchError, match="does not contain the predictions"):
            Answers.load(tmp_path / "r.json")
