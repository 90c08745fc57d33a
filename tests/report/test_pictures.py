import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from fusion_bench.report import pictures
from fusion_bench.report.pictures import accuracies, heat_map, label

TASKS = [f"task {i}" for i in range(5)]
SERIES = {"merged": [0.9, 0.8, 0.7, 0.6, 1.1], "pretrained": [0.5, 0.4, 0.3, 0.2, 0.1]}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def bars(svg: str) -> bool:
    return any(text.endswith(", %") for text in texts(svg))  # they have an axis, a radar has none


def matrix(rows: int, columns: int, limit: float | None = 1.0) -> str:
    values = np.linspace(-1, 1, rows * columns).reshape(rows, columns)
    names = [f"column {i}" for i in range(columns)]
    return heat_map([f"row {i}" for i in range(rows)], names, values, "Title", "Words", limit)


@pytest.mark.parametrize(
    ("count", "as_bars"), [(1, True), (2, True), (3, False), (12, False), (13, True)]
)
def test_a_radar_for_some_tasks_and_bars_for_few_or_many(count: int, as_bars: bool) -> None:
    tasks = [f"task {i}" for i in range(count)]
    svg = accuracies(tasks, {"merged": [0.5] * count}, "Accuracy")
    assert bars(svg) == as_bars
    assert set(tasks) <= set(texts(svg))


def test_a_task_that_a_model_was_not_evaluated_on_has_no_place_in_a_radar() -> None:
    assert bars(accuracies(TASKS, SERIES | {"pretrained": [0.5, None, 0.3, 0.2, 0.1]}, "Accuracy"))


def test_a_picture_says_what_it_shows() -> None:
    svg = ElementTree.fromstring(accuracies(TASKS, SERIES, "Accuracy", "individual model"))
    assert svg.get("role") == "img"
    assert svg.findtext("title") == "Accuracy"
    assert "merged: task 0 90.0 %, task 1 80.0 %" in (svg.findtext("desc") or "")
    assert {"merged", "pretrained", "individual model"} <= {t.text for t in svg.iter("text")}


def test_its_colours_and_fonts_are_the_pages() -> None:
    for svg in (accuracies(TASKS, SERIES, "Accuracy", "whole"), matrix(3, 3)):
        assert "#0101" not in svg and "font-family" not in svg
        assert "var(--ink)" in svg
    assert "<style" not in svg and "<metadata" not in svg


HOSTILE = [
    "<script>alert(1)</script>",
    "\"'&",
    r"$\alpha$ $x",
    "😀 مرحبا",
    "a\x00b\nc\u202e",
    "n" * 300,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_whatever_it_is(name: str) -> None:
    pictures = [
        accuracies([name, "b", "c"], {name: [0.5, 0.4, 0.3]}, "Accuracy"),
        accuracies([name], {name: [0.5]}, "Accuracy"),
        heat_map([name], [name], np.array([[0.5]]), name, name, 1.0),
    ]
    for svg in pictures:
        assert label(name) in texts(svg)
        tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
        assert tags <= {
            *("svg", "title", "desc", "g", "path", "text"),
            *("defs", "clipPath", "rect", "use", "image"),
        }


def test_labels() -> None:
    assert label("digits") == "digits"
    assert label("a\nb\u202ec\x00") == "a b c"
    assert label("👨\u200d👩") == "👨\u200d👩"  # one figure of two, which a joiner joins
    assert label("n" * 300) == "n" * 21 + "…"


def test_the_same_each_time_whatever_the_users_settings() -> None:
    first = accuracies(TASKS, SERIES, "Accuracy"), matrix(4, 4)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert (accuracies(TASKS, SERIES, "Accuracy"), matrix(4, 4)) == first
        assert dict(matplotlib.rcParams) == before  # and it leaves them alone


def test_ids_of_pictures_on_one_page_do_not_meet() -> None:
    found = [
        re.findall(r' id="([^"]+)"', accuracies(TASKS, SERIES, title)) for title in ("One", "Two")
    ]
    assert found[0] and not set(found[0]) & set(found[1])
    for ids in found:
        assert len(ids) == len(set(ids))


def test_a_heat_map_shows_its_figures_where_there_is_room() -> None:
    assert {"−1.00", "0.00", "1.00"} <= set(texts(matrix(3, 3)))
    assert "−1.00" not in texts(matrix(20, 31))
    assert len(matrix(20, 31)) < 30_000


def test_a_cell_without_a_figure_stays_empty() -> None:
    values = np.array([[np.nan, 0.004], [-0.004, np.nan]])
    shown = texts(heat_map(["a", "b"], ["a", "b"], values, "Title", "Words", 0.1))
    assert shown.count("0.00") == 2 and not any("nan" in text for text in shown)


def test_all_zeros_are_drawn_too() -> None:
    assert "0.00" in texts(heat_map(["a"], ["b"], np.zeros((1, 1)), "Title", "Words"))


def test_a_picture_of_the_same_figures_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = pictures._svg

    def noted(figure: Any, title: str, description: str) -> str:
        drawn.append(title)
        return draw(figure, title, description)

    monkeypatch.setattr(pictures, "_svg", noted)
    series = {"merged": [0.25, 0.5, 0.75], "pretrained": [0.1, 0.2, 0.3]}
    first = accuracies(TASKS[:3], series, "Once")
    assert accuracies(TASKS[:3], dict(series), "Once") == first and drawn == ["Once"]
    turned = accuracies(TASKS[:3], dict(reversed(series.items())), "Once")
    assert turned != first and drawn == ["Once"] * 2  # colours go by the order
    assert accuracies(TASKS[:3], series, "Once", "individual model") != first
