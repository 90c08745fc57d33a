"""The site, built and looked at in a browser that reaches nothing but it."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import browser as chromium
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[2]
#: What is copied, what the build itself writes, and what no page includes.
_NOT = ("docs", "mkdocs.yml", "site", ".cache", ".git", ".venv", "outputs", "multirun")

# The build takes 15 seconds.
pytestmark = [pytest.mark.browser, pytest.mark.cold]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as people do, strictly, in a place of its own; `.ci/run` builds no other."""
    if not os.environ.get("CI"):
        pytest.importorskip("zensical", reason="the extra docs is not installed")
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", place / "docs")
    shutil.copy(ROOT / "mkdocs.yml", place)  # the site is written beside it, through links too
    for path in ROOT.iterdir():
        if path.name not in _NOT:
            (place / path.name).symlink_to(path)
    # what is installed is not looked at
    command = ["make", "docs", "--old-file=.venv/installed-dev"]
    command += [f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return place / "site"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the site on this machine; return its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Return a browser that opens no address but this machine's."""
    for driver in chromium.start(tmp_path_factory.mktemp("chromium")):
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["https://*"]})
        yield driver


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(\w+:)?//", page.read_text())
        assert not loaded, page


def test_formulas_are_set_without_a_script(address: str, driver: webdriver.Chrome) -> None:
    driver.get(f"{address}/methods/task_singular_vector.html")
    formulas = driver.find_elements(By.TAG_NAME, "math")
    assert len(formulas) > 5
    assert all(formula.size["width"] > 5 for formula in formulas)
    text = driver.find_element(By.TAG_NAME, "article").text
    assert "\\" not in text and "θ" in text
    fraction = driver.find_element(By.TAG_NAME, "mfrac")
    above, below = fraction.find_elements(By.XPATH, "*")
    assert above.location["y"] < below.location["y"]


def test_the_search_finds_a_page(address: str, driver: webdriver.Chrome) -> None:
    driver.set_window_size(1200, 900)
    driver.get(f"{address}/index.html")
    driver.find_element(By.CSS_SELECTOR, ".md-search__button").click()
    wait = WebDriverWait(driver, 60)
    wait.until(lambda driver: driver.execute_script(_DEEP, "input", ""))
    for _ in range(10):  # until the field has the focus
        ActionChains(driver).send_keys("slerp").pause(0.5).perform()
        if driver.execute_script(_DEEP, "input", "slerp"):
            break
    wait.until(lambda driver: driver.execute_script(_DEEP, "a", "SLERP"))


#: Finds an element by its tag and text, also in shadow roots, where the search has its own.
_DEEP = """
const look = (root, tag, text) => {
  for (const node of root.querySelectorAll('*')) {
    const own = node.value ?? node.textContent ?? '';
    if (node.localName === tag && own.includes(text) && node.checkVisibility()) return true;
    if (node.shadowRoot && look(node.shadowRoot, tag, text)) return true;
  }
  return false;
};
return look(document, arguments[0], arguments[1]);
"""


def test_a_page_fits_on_a_phone(address: str, driver: webdriver.Chrome) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for page in ("index", "choose", "from_mergekit", "own_method", "methods/wudi"):
        driver.get(f"{address}/{page}.html")
        width = driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390, page
