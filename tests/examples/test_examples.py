from pathlib import Path

import pytest
from commandline import REPOSITORY, python

SCRIPTS = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs(script: Path) -> None:
    done = python(script.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout
