"""A real browser without a window, and what it says of a page."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def start(profile: Path) -> Iterator[webdriver.Chrome]:
    """Yield a Chromium of its own; without one the tests skip, or fail where ``CI`` is set."""
    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in places:
        reason = "needs Chromium: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(places[0])
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(places[1])))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(browser: webdriver.Chrome, page: Path, width: int = 1200) -> None:
    """Open a file in light colours, as if nothing had been open before."""
    browser.get("about:blank")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    colours(browser, "light")
    console(browser), requests(browser)  # what came before is none of its business
    browser.get(page.as_uri())


def colours(browser: webdriver.Chrome, scheme: str) -> None:
    """Prefer ``light`` or ``dark`` colours."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def console(browser: webdriver.Chrome) -> list[str]:
    """Return what was written to the console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: webdriver.Chrome) -> list[str]:
    """Return which addresses were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
