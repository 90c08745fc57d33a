import io

import pytest
from fixtures_report import model, report, synthetic
from rich.console import Console

from fusion_bench.report import Report, comparison, markdown, print_comparison, summarise
from fusion_bench.report.figures import comparison_sentence
from fusion_bench.report.table import Row


def values(row: Row) -> list[float | None]:
    return [None if cell is None else round(cell.value, 6) for cell in row.cells]


def evaluated() -> Report:
    models = {
        "_pretrained_": model("pretrained", a=40, b=30),
        "a": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=60, b=45),
    }
    found = report(models)
    summarise(models, found.tasks)
    return found


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(evaluated(), console)
    return console.file.getvalue()


def test_individual_models_share_a_row() -> None:
    rows = comparison(evaluated())
    assert [row.name for row in rows] == ["pretrained", "individual", "merged"]
    assert values(rows[1]) == [0.8, 0.6]
    assert rows[1].average is not None and rows[1].normalized == 1
    assert rows[1].average.value == pytest.approx(0.7)
    assert values(rows[2]) == [0.6, 0.45]


def test_the_full_matrix_has_a_row_a_model() -> None:
    models = {
        "a": model("individual", a=80, b=10),
        "b": model("individual", a=20, b=60),
        "merged": model("merged", a=60, b=45),
    }
    found = report(models)
    summarise(models, found.tasks)
    rows = comparison(found)
    assert [row.name for row in rows] == ["a", "b", "merged"]
    assert values(rows[0]) == [0.8, 0.1]


def test_models_evaluated_on_the_same_single_task_do_not_share_a_row() -> None:
    models = {"a": model("individual", a=80), "b": model("individual", a=20)}
    found = report(models)
    summarise(models, found.tasks)
    assert [row.name for row in comparison(found)] == ["a", "b"]


def test_printed_side_by_side_where_it_fits() -> None:
    lines = printed(100).splitlines()
    header = next(line for line in lines if "average" in line)
    assert header.split() == ["accuracy,", "%", "a", "b", "average", "normalised"]
    merged = next(line for line in lines if line.strip().startswith("merged"))
    assert merged.split() == ["merged", "60.0", "45.0", "52.5", "75.0"]


def test_printed_task_by_task_where_it_does_not_fit() -> None:
    text = printed(49)
    assert ["a", "40.0", "80.0", "60.0"] in [line.split() for line in text.splitlines()]
    assert "…" not in text


def test_markdown_escapes_names() -> None:
    models = {"x|<b>": model("merged", a=60, b=45)}
    found = report(models)
    summarise(models, found.tasks)
    page = markdown(found)
    assert "| x\\|&lt;b> | 60.0 ± 4.9 | 45.0 ± 5.0 | 52.5 ± 3.5 | – |" in page
    assert "SimpleAverageAlgorithm" in page


def test_markdown_says_what_the_test_sets_tell() -> None:
    found, _ = synthetic({"a": 3, "b": 4})
    lines = markdown(found).splitlines()
    sentences = [comparison_sentence(found, each) for each in found.main_comparisons()]
    assert len(sentences) == 2 and lines[-3::2] == sentences
