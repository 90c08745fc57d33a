"""The page of all runs in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import colours, console, open_page, requests
from fixtures_report import model, report, synthetic
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from fusion_bench.report import summarise
from fusion_bench.report.index import index
from fusion_bench.report.index_page import save

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a page of five comparable runs, one on other tasks, and files that are none."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (method, right) in enumerate(
        [("ties", 84), ("ties", 82), ("slerp", 60), ("slerp", 58), ("linear", 30)]
    ):
        made = report(
            {
                "_pretrained_": model("pretrained", a=30, b=40),
                "a": model("individual", a=95),
                "b": model("individual", b=95),
                "merged": model("merged", a=right, b=right),
            }
        )
        summarise(made.models, made.tasks)
        made.run.method = method
        made.run.config["method"] = {"scaling_factor": number / 10}
        made.run.created_at = f"2026-01-0{number + 1}T00:00:00+00:00"
        made.save(folder / f"run{number}" / "report.json")
        (folder / f"run{number}" / "report.html").write_text("<title>the report</title>")
    made, _ = synthetic({HOSTILE: 3, "digits": 4}, samples=40)
    made.run.method = made.run.device = made.run.version = made.run.created_at = HOSTILE
    made.run.notes, made.run.config["method"] = [HOSTILE], {HOSTILE: HOSTILE}
    made.save(folder / HOSTILE.replace("/", "") / "report.json")
    (folder / "bad").mkdir()
    content = {**json.loads(made.model_dump_json()), HOSTILE: 1}
    (folder / "bad" / "report.json").write_text(json.dumps(content), encoding="utf-8")
    save(index(folder), folder / "index.html")
    return folder / "index.html"


def shown(browser: Chrome) -> list[str]:
    """Return the visible runs of the list."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#list tbody tr")
    return [row.find_element(By.TAG_NAME, "bdi").text for row in rows if row.is_displayed()]


def ranks(browser: Chrome, board: int = 1) -> dict[str, str]:
    """Return the visible lines of a leaderboard with their ranks."""
    rows = browser.find_elements(By.CSS_SELECTOR, f"#board{board} tbody tr[data-run]")
    return {
        row.find_element(By.CSS_SELECTOR, "th bdi").text: row.find_element(By.TAG_NAME, "td").text
        for row in rows
        if row.is_displayed()
    }


def select(browser: Chrome, *names: str) -> None:
    for name in names:
        browser.find_element(By.CSS_SELECTOR, f"input[aria-label='Select {name}']").click()


def beside(browser: Chrome) -> dict[str, list[str]]:
    """Return the cells of each line of the two runs side by side."""
    script = """return [...document.querySelectorAll("#pair tbody tr")].map(
        (row) => [...row.cells].map((cell) => cell.textContent.trim()))"""
    found: list[list[str]] = browser.execute_script(script)
    return {name: cells for name, *cells in found}


def test_it_opens_without_errors_and_asks_for_nothing(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    assert console(browser) == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [path.as_uri()]
    policy = browser.find_element(By.CSS_SELECTOR, "meta[http-equiv]").get_attribute("content")
    assert policy and policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src")
    assert policy.count("'sha256-") == 2 and "script-src 'unsafe" not in policy


def test_hostile_results_stay_text(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    browser.find_element(By.ID, "all").click()
    browser.find_element(By.ID, "none").click()
    select(browser, "run0")
    browser.find_elements(By.CSS_SELECTOR, "#list input")[0].click()  # the hostile one
    assert browser.title.startswith("All runs in")
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object") == []
    assert HOSTILE in browser.find_element(By.ID, "list").text
    assert (
        "<script>document"
        in browser.find_element(By.CSS_SELECTOR, "[aria-labelledby=unreadable]").text
    )
    note = browser.find_element(By.ID, "unlike").text
    assert note.startswith("The runs were evaluated differently") and "tasks" in note
    assert beside(browser)["device"] == ["cpu", f"{HOSTILE[:59]}…", ""]
    assert not browser.find_element(By.ID, "paired").is_displayed()


def test_the_policy_stops_what_would_slip_in(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    stopped = browser.execute_async_script(
        """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (e) => done(e.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        """
    )
    assert stopped == "script-src-elem" and browser.title != "owned"


def test_words_method_and_tasks_filter(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    assert len(shown(browser)) == 6
    words = browser.find_element(By.ID, "words")
    words.send_keys("TIES 0.1")
    assert shown(browser) == ["run1"]
    assert ranks(browser) == {"run1": "1"}  # of what is left
    assert browser.find_element(By.ID, "state").text.startswith("1 of 6 runs shown, 0 selected.")
    words.clear()
    words.send_keys(Keys.SPACE)
    Select(browser.find_element(By.ID, "method")).select_by_visible_text("slerp")
    assert shown(browser) == ["run3", "run2"]
    Select(browser.find_element(By.ID, "method")).select_by_visible_text("all")
    Select(browser.find_element(By.ID, "table")).select_by_value("1")
    assert len(shown(browser)) == 1
    assert not browser.find_element(By.ID, "board1").is_displayed()


def test_a_selection_has_its_own_leaderboard(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    everything = {"run0": "1", "run1": "1", "run2": "3", "run3": "3", "run4": "5"}
    assert ranks(browser) == everything
    assert browser.find_element(By.CSS_SELECTOR, "#board1 figure").is_displayed()
    select(browser, "run1", "run3", "run4")
    assert ranks(browser) == {"run1": "1", "run3": "2", "run4": "3"}
    assert browser.find_element(By.ID, "leaderboards").text == "Leaderboard of the selection"
    assert not browser.find_element(By.CSS_SELECTOR, "#board1 figure").is_displayed()
    assert not browser.find_element(By.ID, "pair").is_displayed()
    browser.find_element(By.ID, "none").click()
    assert ranks(browser) == everything


def test_two_runs_stand_side_by_side(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    select(browser, "run2", "run0")
    found = beside(browser)
    assert found["a"] == ["60.0 ±4.9", "84.0 ±3.7", "+24.0"]
    assert found["normalised, %"][2] == "+25.3"
    assert found["method"] == ["slerp scaling_factor=0.2", "ties scaling_factor=0.0", ""]
    command = browser.find_element(By.ID, "command").text
    assert command == "fusion_bench compare run2 run0"
    select(browser, "run2")
    assert not browser.find_element(By.ID, "pair").is_displayed()


def test_the_keyboard_reaches_and_selects(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    wanted = {"words", "method", "table", "all", "none", "Select run4"}
    seen: set[str] = set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        name = active.get_attribute("id") or active.get_attribute("aria-label") or ""
        seen.add(name)
        if name == "Select run4":
            ActionChains(browser).send_keys(Keys.SPACE).perform()
            break
    assert wanted <= seen
    assert "1 selected" in browser.find_element(By.ID, "state").text
    ActionChains(browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert browser.title == "the report"


def test_the_list_sorts(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    browser.find_element(By.CSS_SELECTOR, "#list thead th:nth-child(6) button").click()
    script = """return [...document.querySelectorAll("#list tbody tr")].map(
        (row) => Number(row.cells[5].dataset.value))"""
    values = browser.execute_script(script)
    assert values == sorted(values, reverse=True) and len(set(values)) == 6


@pytest.mark.parametrize("width", [360, 1200])
def test_a_phone_scrolls_in_one_direction_only(browser: Chrome, path: Path, width: int) -> None:
    open_page(browser, path, width=width)
    select(browser, "run2", "run0")
    across: Any = browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert across is True


def test_light_and_dark_both_have_contrast(browser: Chrome, path: Path) -> None:
    script = """
        const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => {
                const part = v / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return [paper, ...["#list th a", ".settings", "#state", ".filter label"].map((each) => {
            const ink = light(getComputedStyle(document.querySelector(each)).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        })];"""
    open_page(browser, path)
    paper, *contrasts = browser.execute_script(script)
    assert paper > 0.9 and min(contrasts) >= 4.5
    colours(browser, "dark")
    paper, *contrasts = browser.execute_script(script)
    assert paper < 0.1 and min(contrasts) >= 4.5


def test_without_scripts_the_tables_read(browser: Chrome, path: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(path.as_uri())
        assert len(shown(browser)) == 6
        assert ranks(browser) == {"run0": "1", "run1": "1", "run2": "3", "run3": "3", "run4": "5"}
        assert not browser.find_element(By.ID, "filter").is_displayed()
        assert not browser.find_element(By.ID, "pair").is_displayed()
        assert browser.find_element(By.CSS_SELECTOR, "[aria-labelledby=unreadable]").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_everything_has_a_name(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    fields = browser.find_elements(
        By.CSS_SELECTOR, "input, select, button, a, svg[role=img], .scroll"
    )
    assert all(each.accessible_name for each in fields if each.is_displayed())
