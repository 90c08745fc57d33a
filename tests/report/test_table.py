import io

from fixtures_report import model, report, synthetic
from rich.console import Console

from fusion_bench.report import Report, comparison, markdown, print_comparison, summarise

OWN = {"a": "a", "b": "b"}


def evaluated() -> Report:
    models = {
        "_pretrained_": model("pretrained", a=40, b=30),
        "a": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=60, b=45),
    }
    summarise(models, OWN)
    return report(models)


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(evaluated(), console)
    return console.file.getvalue()


def test_individual_models_share_a_row() -> None:
    rows = comparison(evaluated())
    assert [row.name for row in rows] == ["pretrained", "individual", "merged"]
    assert rows[1].cells == [80, 60]
    assert rows[1].average == 70 and rows[1].normalized == 100
    assert rows[2].cells == [60, 45]


def test_the_full_matrix_has_a_row_a_model() -> None:
    models = {
        "a": model("individual", a=80, b=10),
        "b": model("individual", a=20, b=60),
        "merged": model("merged", a=60, b=45),
    }
    summarise(models, OWN)
    rows = comparison(report(models))
    assert [row.name for row in rows] == ["a", "b", "merged"]
    assert rows[0].cells == [80, 10]


def test_models_evaluated_on_the_same_single_task_do_not_share_a_row() -> None:
    models = {"a": model("individual", a=80), "b": model("individual", a=20)}
    summarise(models, OWN)
    assert [row.name for row in comparison(report(models))] == ["a", "b"]


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
    summarise(models, {})
    page = markdown(report(models))
    assert "| x\\|&lt;b> | 60.0 ± 4.9 | 45.0 ± 5.0 | 52.5 ± 3.5 | – |" in page
    assert "SimpleAverageAlgorithm" in page


def test_markdown_says_what_the_test_sets_tell() -> None:
    found, _ = synthetic({"a": 3, "b": 4})
    lines = markdown(found).splitlines()
    sentences = [comparison.sentence() for comparison in found.main_comparisons()]
    assert len(sentences) == 2 and lines[-3::2] == sentences
