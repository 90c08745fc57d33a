"""Published figures beside found ones."""

from pathlib import Path

import pytest
from browser import console, open_page, requests
from fixtures_report import model, report
from selenium.webdriver import Chrome

from fusion_bench.problems import FusionBenchError
from fusion_bench.report.reference import Reference
from fusion_bench.report.reproduction import Figure, Reproduction, check

HOSTILE = "<script>document.title = 'owned'</script>"
FOUND = report(
    {
        "_pretrained_": model("pretrained", a=40, b=20),
        "one": model("individual", a=80),
        "two": model("individual", b=90),
        "merged": model("merged", a=70, b=61),
    }
)


def reference(**rows: object) -> Reference:
    common = {"source": "x", "checkpoints": "y", "modelpool": "p", "taskpool": "t"}
    return Reference.model_validate(common | {"tasks": ["b", "a"], "tolerance": 1.0, "rows": rows})


def test_each_figure_is_compared_with_its_own_column() -> None:
    published = reference(
        pretrained={"accuracy": [20.0, 41.0], "average": 31.5},
        individual={"average": 85.0},
        mine={"overrides": ["x=1"], "accuracy": [61.0, 68.9], "tolerance": 1.5},
    )
    figures = check(published, ["mine", "individual", "pretrained"], {"mine": FOUND})
    assert [(f.row, f.column, f.published, f.found, f.passed) for f in figures] == [
        ("mine", "b", 61.0, 61.0, True),
        ("mine", "a", 68.9, 70.0, True),
        ("individual", "average", 85.0, 85.0, True),
        ("pretrained", "b", 20.0, 20.0, True),
        ("pretrained", "a", 41.0, 40.0, True),  # just within
        ("pretrained", "average", 31.5, 30.0, False),
    ]
    assert figures[-1].sentence() == (
        "pretrained on average: published 31.5, found 30.0 (-1.5, tolerance 1)"
    )


def test_averages_may_have_a_tolerance_of_their_own() -> None:
    rows = {"pretrained": {"accuracy": [20.0, 41.0], "average": 31.0}}
    rows |= {"mine": {"overrides": ["x=1"], "accuracy": [60.0, 69.0], "average": 64.0}}
    published = reference(**rows).model_copy(update={"average_tolerance": 0.5})
    published.rows["mine"].tolerance = 2.0
    figures = check(published, ["pretrained", "mine"], {"mine": FOUND})
    assert [(f.column, f.tolerance, f.passed) for f in figures] == [
        *[("b", 1.0, True), ("a", 1.0, True), ("average", 0.5, False)],
        *[("b", 2.0, True), ("a", 2.0, True), ("average", 2.0, True)],
    ]


def test_a_row_has_one_model() -> None:
    both = report({"merged/x": model("merged", a=1, b=2), "merged/y": model("merged", a=1, b=2)})
    published = reference(mine={"overrides": ["x=1"], "average": 1.0})
    with pytest.raises(FusionBenchError, match="has 2 merged models instead of one"):
        check(published, ["mine"], {"mine": both})


def test_the_page_in_a_browser(browser: Chrome, tmp_path: Path) -> None:
    row = {"overrides": ["x=1"], "average": 1.0}
    result = Reproduction(
        name=HOSTILE,
        version="0",
        created_at="now",
        reference=reference(**{HOSTILE: row}),
        figures=[Figure(row=HOSTILE, column="average", published=1, found=3, tolerance=1)],
        reports={HOSTILE: "rows/x/report.json"},
    )
    result.save(tmp_path)
    page = tmp_path / "reproduce.html"
    open_page(browser, page, width=360)
    assert browser.title == f"Reproduction of {HOSTILE}" and console(browser) == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [page.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    text = browser.find_element("tag name", "body").text
    assert "0 of 1 figures are within their tolerance." in text and "3.0 +2.0 !" in text
