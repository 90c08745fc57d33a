"""A run that was killed at any moment is started again, and ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Hundreds of runs, each of seconds. In an ordinary run a kill has its place in `test_storage.py`,
# `zoo/test_build.py`, `taskpool/test_pixels.py` and `scripts/test_sweep.py`.
pytestmark = [pytest.mark.exhaustive(only=True), pytest.mark.timeout(7200)]


@pytest.mark.processes
def test_every_restart_ends_right(tmp_path: Path, row: Any) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "210", "0", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for title, figures in found["rows"].items():
        row("kills", title=title, **figures)
    assert not found["wrong"], "\n".join(found["wrong"])
