"""Takes the pictures of the documentation: runs the demo and a sweep, and photographs their pages.

    .venv/bin/python tools/take_pictures.py

It needs Chromium with its driver, and the packages of ``dev``. Without the embedded models in the
cache it builds them first, which takes minutes.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
#: Words of the command line, the page that is written, and the size of the picture in pixels.
PICTURES = {
    "report.png": (["method=task_arithmetic"], "report.html", (1000, 1130)),
    "leaderboard.png": (
        [
            *("-m", "hydra.sweep.dir=four methods"),
            "method=simple_average,task_arithmetic,ties_merging,isotropic_merging/iso_c",
        ],
        "leaderboard.html",
        (1380, 630),
    ),
}


def page_of(words: list[str], name: str, folder: Path) -> Path:
    """Run the command line in a folder; return the page that it writes."""
    command = [Path(sys.executable).with_name("fusion_bench"), *words]
    subprocess.run(command, cwd=folder, check=True)
    return max(folder.rglob(name), key=lambda page: page.stat().st_mtime)


def photograph(page: Path, size: tuple[int, int]) -> Image.Image:
    """Return the upper part of a page, in light colours."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options, Service(shutil.which("chromedriver"))) as browser:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.as_uri())
        return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for picture, (words, name, size) in PICTURES.items():
            image = photograph(page_of(words, name, Path(directory)), size)
            image.quantize(64).save(IMAGES / picture, optimize=True)
