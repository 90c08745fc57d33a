"""Tests in several processes give what they give in one."""

import re
from pathlib import Path

import pytest
from commandline import python

#: Runs pytest on the files here, in as many processes as are asked for.
RUN = """
import sys
import pytest, workers

class Several:
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        workers.run(session, int(sys.argv[1]))
        return True

words = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", *sys.argv[2:]]
sys.exit(pytest.main(words, [Several()] if sys.argv[1] != "0" else []))
"""
FILES = {
    "test_a.py": """
import warnings
import pytest

@pytest.fixture(scope="module")
def made():
    print("MADE")
    yield []

@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_object_for_a_file(made, number):
    made.append(number)
    assert made == [*range(1, number + 1)]

def test_it_warns():
    warnings.warn("look here")
""",
    "test_b.py": """
import pytest

def test_it_fails():
    print("what was printed")
    assert 1 + 1 == 3

@pytest.mark.skip(reason="it is night")
def test_it_is_skipped(): ...

def test_a_folder_of_its_own(tmp_path):
    assert not list(tmp_path.iterdir())
""",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def run(place: Path, count: int, *words: str) -> tuple[int, str]:
    """Return the exit code and what is printed, without what depends on time."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{RUN}"
    done = python(code, str(count), *words, cwd=place)
    return done.returncode, re.sub(r" in [\d.]+s", "", done.stdout + done.stderr)


def test_the_outcome_is_that_of_one_process(place: Path) -> None:
    alone, several = run(place, 0, "-q"), run(place, 2, "-q")
    assert alone[0] == several[0] == 1
    assert alone[1].splitlines()[-1] == several[1].splitlines()[-1]
    for _, told in (alone, several):
        assert "1 failed, 5 passed, 1 skipped" in told
        assert "assert (1 + 1) == 3" in told and "what was printed" in told
        assert "UserWarning: look here" in told
        assert "FAILED test_b.py::test_it_fails" in told


def test_a_process_that_dies_fails_its_test(place: Path) -> None:
    (place / "test_c.py").write_text(
        "import os, signal\n"
        "def test_it_dies(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_after_it(): ...\n"
    )
    code, told = run(place, 2, "-q")
    assert code == 1
    assert "2 failed, 5 passed, 1 skipped" in told
    assert "The process that ran test_c.py::test_it_dies ended" in told


def test_nothing_begins_after_the_first_failure(place: Path) -> None:
    code, told = run(place, 1, "-q", "-x")
    assert code == 1 and "stopping after 1 failures" in told
    assert "1 failed" in told and int(re.findall(r"(\d+) passed", told)[0]) < 24
