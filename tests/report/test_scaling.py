"""The measures of a scaling study, worked out by hand."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import console, open_page, requests
from fixtures_report import report, result
from selenium.webdriver import Chrome

from fusion_bench.report import TaskResult
from fusion_bench.report.scaling import Base, Merge, Study


def results(**percent: int) -> dict[str, TaskResult]:
    return {task: result(value) for task, value in percent.items()}


def study(**changes: object) -> Study:
    """Return a study of three tasks, where merges of `a`, `b` leave `c` out."""

    def merge(subset: int, models: str, **percent: int) -> Merge:
        return Merge(
            base="<i>one</i>",
            method="mean",
            count=len(models),
            subset=subset,
            models=list(models),
            tasks=results(**percent),
        )

    found = Study(
        run=report({}).run,
        held_in="expert",
        held_out="base",
        categories={},
        bases={
            "<i>one</i>": Base(
                num_parameters=10,
                pretrained=results(a=20, b=40, c=50),
                experts=results(a=80, b=100, c=100),
            )
        },
        merges=[
            merge(0, "ab", a=60, b=50, c=25),
            merge(1, "ac", a=40, b=50, c=90),
            merge(0, "abc", a=40, b=50, c=75),
        ],
    ).model_copy(update=changes)
    found.summarise()
    return found


def points(found: Study) -> dict[tuple[str, int], tuple[float, float]]:
    return {(p.side, p.count): (p.mean, p.spread) for p in found.points}


def test_held_in_and_held_out_by_hand() -> None:
    first = (60 / 80 + 50 / 100) / 2  # 0.625
    second = (40 / 80 + 90 / 100) / 2  # 0.7
    assert points(study()) == {
        ("held_in", 2): pytest.approx(((first + second) / 2, (second - first) / 2)),
        ("held_in", 3): pytest.approx(((40 / 80 + 50 / 100 + 75 / 100) / 3, 0)),
        ("held_out", 2): pytest.approx(((25 / 50 + 50 / 40) / 2, (50 / 40 - 25 / 50) / 2)),
    }


def test_other_normalisers() -> None:
    plain = points(study(held_in="none", held_out="none"))
    assert plain["held_in", 3] == pytest.approx((0.55, 0))
    assert plain["held_out", 2] == pytest.approx(((0.25 + 0.5) / 2, 0.125))
    assert points(study(held_out="expert"))["held_out", 2] == pytest.approx((0.375, 0.125))


def test_a_category_weighs_as_one() -> None:
    found = points(study(held_in="none", categories={"letters": ["a", "b"]}))
    assert found["held_in", 3] == pytest.approx(((0.4 + 0.5) / 2 / 2 + 0.75 / 2, 0))
    assert found["held_in", 2] == pytest.approx((((0.55) + (0.4 + 0.9) / 2) / 2, 0.05))


def test_what_cannot_be_divided_has_no_point() -> None:
    never = study().bases["<i>one</i>"].model_copy(update={"pretrained": results(a=0, b=0, c=0)})
    found = study(bases={"<i>one</i>": never})
    assert {p.side for p in found.points} == {"held_in"}
    assert list(found.pictures()) == ["held_in"]


def test_the_files(tmp_path: Path) -> None:
    found = study()
    found.save(tmp_path)
    assert Study.load(tmp_path / "study.json") == found
    assert {path.name for path in tmp_path.iterdir()} == {
        *("study.json", "study.md", "study.html", "held_in.svg", "held_out.svg")
    }
    for side in ("held_in", "held_out"):
        text = (tmp_path / f"{side}.svg").read_text()
        picture = ElementTree.fromstring(text)
        assert picture.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in text
        words = " ".join(picture.itertext())
        assert "<i>one</i>" in words and "number of merged experts" in words
        assert ("66.2 % at 2" in words) == (side == "held_in")
    page = (tmp_path / "study.html").read_text()
    assert "<i>one" not in page and page.count("<svg") == 2
    rows = (tmp_path / "study.md").read_text().splitlines()
    assert "| &lt;i>one&lt;/i> | mean | held-in | 66.2 ± 3.7 | 58.3 |" in rows
    assert "| &lt;i>one&lt;/i> | mean | held-out | 87.5 ± 37.5 | – |" in rows


def test_the_page_in_a_browser(browser: Chrome, tmp_path: Path) -> None:
    study().save(tmp_path)
    page = tmp_path / "study.html"
    open_page(browser, page, width=360)
    browser.execute_script("document.querySelector('details').open = true")
    assert browser.title == "Scaling study" and console(browser) == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [page.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert "<i>one</i>" in browser.find_element("tag name", "body").text
    lines = browser.find_elements("css selector", "svg path[style*='#0072b2']")
    assert lines and len(page.read_bytes()) < 200_000
