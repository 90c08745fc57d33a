"""The page in a real browser."""

import base64
from pathlib import Path

import pytest
from browser import colours, console, open_page, requests
from fixtures_report import synthetic
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from fusion_bench.report.page import page

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
)
COMPARISON = "table.sortable"
OPEN_ALL = "for (const each of document.querySelectorAll('details')) each.open = true"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a page with everything on it, some of it hostile."""
    tasks = {HOSTILE: 4, "n" * 200: 13, "digits": 5, "{{7*7}}": 3, r"$\alpha$": 3, "مرحبا 😀": 3}
    found, scores = synthetic(tasks, samples=60, per_class=True, merged=["merged", "other"])
    for name, info in found.tasks.items():
        info.classes = [f"{name} {i}" for i in range(info.num_classes)]
    found.run.config["method"] = {"_target_": "x.Method", "option": HOSTILE}
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(found, scores), encoding="utf-8")
    return file


def header(browser: Chrome, name: str) -> WebElement:
    headers = browser.find_elements(By.CSS_SELECTOR, f"{COMPARISON} thead th")
    return next(found for found in headers if found.text.split() == [name])


def click(browser: Chrome, name: str) -> WebElement:
    found = header(browser, name)
    found.find_element(By.TAG_NAME, "button").click()
    return found


def first_column(browser: Chrome) -> list[str]:
    names = browser.find_elements(By.CSS_SELECTOR, f"{COMPARISON} tbody th bdi")
    table = browser.find_element(By.CSS_SELECTOR, COMPARISON)
    rows = len(table.find_elements(By.CSS_SELECTOR, "tbody tr"))
    return [name.text for name in names[:rows]]


def column(browser: Chrome, name: str) -> list[float]:
    """Return a column of the comparison, from top to bottom."""
    script = """
        const table = document.querySelector(arguments[0]);
        const place = [...table.tHead.rows[0].cells].indexOf(arguments[1]);
        return [...table.tBodies[0].rows].map((row) => Number(row.cells[place].dataset.value));
    """
    values: list[float] = browser.execute_script(script, COMPARISON, header(browser, name))
    return values


def test_it_opens_without_errors_and_asks_for_nothing(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    browser.execute_script(OPEN_ALL)
    assert console(browser) == []
    outside = [url for url in requests(browser) if not url.startswith("data:")]
    assert outside == [path.as_uri()]


def test_hostile_names_stay_text(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    assert browser.title == "6 models merged by Method"
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object") == []
    names = browser.find_elements(By.CSS_SELECTOR, "bdi")
    shown = {name.get_attribute("textContent") for name in names}
    assert {HOSTILE, f"{HOSTILE} 0", "{{7*7}}", r"$\alpha$", "مرحبا 😀"} <= shown
    drawn = {e.get_attribute("textContent") for e in browser.find_elements(By.CSS_SELECTOR, "text")}
    assert {HOSTILE[:21] + "…", "{{7*7}}", r"$\alpha$", "مرحبا 😀"} <= drawn


def test_the_policy_stops_what_would_slip_in(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    stopped = browser.execute_async_script(
        """
        const done = arguments[0], stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => {
            stopped.push(event.effectiveDirective);
            if (stopped.length === 2) done(stopped.sort());
        });
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        document.body.append(script, image);
        """
    )
    assert stopped == ["img-src", "script-src-elem"]
    assert browser.title != "owned"


def test_a_click_sorts_and_another_turns_round(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    before = column(browser, "average")
    assert before != sorted(before, reverse=True)
    found = click(browser, "average")
    assert column(browser, "average") == sorted(before, reverse=True)
    assert found.get_attribute("aria-sort") == "descending"
    click(browser, "average")
    assert column(browser, "average") == sorted(before)
    assert found.get_attribute("aria-sort") == "ascending"
    click(browser, "model")
    assert found.get_attribute("aria-sort") is None  # one column at a time
    assert first_column(browser) == ["individual", "merged", "other", "pretrained"]


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE], ids=["enter", "space"])
def test_the_keyboard_sorts_too(browser: Chrome, path: Path, key: str) -> None:
    open_page(browser, path)
    before = column(browser, "average")
    target = header(browser, "average").find_element(By.TAG_NAME, "button")
    for _ in range(20):  # the way there, by the tab key alone
        if browser.switch_to.active_element == target:
            break
        ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element == target
    ActionChains(browser).send_keys(key).perform()
    assert column(browser, "average") == sorted(before, reverse=True)


def test_missing_figures_come_last(browser: Chrome, tmp_path: Path) -> None:
    found, scores = synthetic({"a": 3, "b": 4}, samples=50)
    del found.models["_pretrained_"].tasks["b"]
    found.comparisons = []
    (tmp_path / "report.html").write_text(page(found, scores), encoding="utf-8")
    open_page(browser, tmp_path / "report.html")
    for _ in range(2):
        click(browser, "b")
        assert first_column(browser)[-1] == "pretrained"


def test_infinite_figures_are_numbers(browser: Chrome, tmp_path: Path) -> None:
    found, scores = synthetic({"a": 3}, samples=50)
    found.models["merged"].tasks["a"].main.value = float("inf")
    found.comparisons = []
    (tmp_path / "report.html").write_text(page(found, scores), encoding="utf-8")
    open_page(browser, tmp_path / "report.html")
    click(browser, "a")
    assert first_column(browser)[0] == "merged"
    click(browser, "a")
    assert first_column(browser)[-1] == "merged"


def test_a_phone_scrolls_in_one_direction_only(browser: Chrome, path: Path) -> None:
    open_page(browser, path, width=360)
    browser.execute_script(OPEN_ALL)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    wide = """return [...document.querySelectorAll(".scroll")]
        .filter((each) => each.scrollWidth > each.clientWidth).length"""
    assert browser.execute_script(wide) > 0  # what is wide scrolls within its place


CONTRAST = """
    const light = (element, property) => {
        const [r, g, b] = getComputedStyle(element)[property].match(/[\\d.]+/g).map((v) => {
            const part = v / 255;
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(document.body, "backgroundColor");
    return [paper, ...["body", "small", "summary", ".bad", "svg text"].map((selector) => {
        const element = document.querySelector(selector);
        const ink = light(element, element.closest("svg") ? "fill" : "color");
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    })];
"""


def test_light_and_dark_both_have_contrast(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    light, *contrasts = browser.execute_script(CONTRAST)
    assert light > 0.9 and min(contrasts) >= 4.5
    colours(browser, "dark")
    dark, *contrasts = browser.execute_script(CONTRAST)
    assert dark < 0.1 and min(contrasts) >= 4.5


def test_it_prints(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    media = {"media": "print", "features": features}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    paper, *_ = browser.execute_script(CONTRAST)
    assert paper > 0.9  # white, whatever the screen prefers
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF-") and pdf.count(b"/Type /Page\n") >= 2


def test_pictures_and_tables_have_names(browser: Chrome, path: Path) -> None:
    open_page(browser, path)
    pictures = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert [picture.accessible_name for picture in pictures] == [
        "Normalised accuracy",
        "Cosines of the task vectors",
        "Cosines in each part",
        "Norms of the task vectors, in each part",
    ]
    browser.execute_script(OPEN_ALL)
    regions = browser.find_elements(By.CSS_SELECTOR, ".scroll")
    names = [region.accessible_name for region in regions]
    assert all(names) and len(set(names)) == len(names) > 5
