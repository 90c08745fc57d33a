"""What was typed is read in one place, whatever libraries are given to read."""

import ast
import sys
from pathlib import Path

import pytest

import fusion_bench
from fusion_bench.command import file_as_options, option, overrides, replaced, typed


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["method=ties", "++seed=1", "--config-path", "here", "--config-dir=there", "-cd"]
    monkeypatch.setattr(sys, "argv", ["fusion_bench", *words])


def test_overrides_and_options() -> None:
    assert typed()[:2] == ["fusion_bench", "method=ties"]
    assert overrides() == {"method": "ties", "seed": "1", "--config-dir": "there"}
    assert option("--config-path", "--config-dir") == ["here", "there"]
    assert option("-cd") == []


def test_what_libraries_read_is_not_what_was_typed() -> None:
    before = typed()
    with replaced(["seed=2"]):
        assert sys.argv == ["fusion_bench", "seed=2"]
        assert typed() == before
    assert sys.argv == before


def test_nobody_else_reads_it() -> None:
    package = Path(fusion_bench.__file__).parent
    readers = [
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "argv"
    ]
    assert set(readers) == {"command.py"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a/b.yaml", "x=1"], ["--config-path", "a", "--config-name", "b", "x=1"]),
        (["-m", "b.yml"], ["-m", "--config-path", ".", "--config-name", "b"]),
        (["x=1", "/b.yaml"], ["x=1", "--config-path", "/", "--config-name", "b"]),
        (["--config-name", "b.yaml"], ["--config-name", "b.yaml"]),
        (["report_save_path=b.yaml"], ["report_save_path=b.yaml"]),
        ([], []),
    ],
)
def test_a_config_file_stands_for_two_options(words: list[str], wanted: list[str]) -> None:
    assert file_as_options(words) == wanted
