"""What is done to a library when somebody imports it."""

import importlib
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from fusion_bench.imports import when_imported


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a package that nobody has imported."""
    package = tmp_path / "quiet_library"
    package.mkdir()
    (package / "__init__.py").write_text("said = []\n")
    (package / "table.txt").write_text("rows")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    return package.name


def said(library: str, *words: str) -> None:
    sys.modules[library].said.extend(words)


def test_a_library_is_changed_when_it_is_imported_and_once(library: str) -> None:
    before = [*sys.meta_path]
    for _ in range(2):
        when_imported(library, lambda: said(library, "then"))
    assert library not in sys.modules
    assert importlib.import_module(library).said == ["then"]
    assert sys.meta_path == before
    when_imported(library, lambda: said(library, "at once"))
    assert sys.modules[library].said == ["then", "at once"]


def test_it_knows_its_own_files(library: str) -> None:
    when_imported(library, lambda: said(library, "then"))
    module = importlib.import_module(library)
    assert files(library).joinpath("table.txt").read_text() == "rows"
    assert module.__loader__ is module.__spec__.loader
    assert importlib.reload(module).said == []


def test_what_is_not_there_is_not_there(library: str) -> None:
    when_imported("no_such_library", lambda: said("no_such_library"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library")
