"""What benchmarks share: rows are kept, and times of other results are not compared."""

import json
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """The module, which is in no package."""
    spec = spec_from_file_location("measure", BENCHMARKS / "measure.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted(place: Path, small: bool = False) -> Namespace:
    return Namespace(json=place / "own.json", markdown=place / "own.md", small=small)


def test_a_run_that_was_stopped_goes_on(measure: ModuleType, tmp_path: Path) -> None:
    measure.Record(wanted(tmp_path), 3).row("sums", "one", {"seconds": 1})
    again = measure.Record(wanted(tmp_path), 3)
    assert again.has("sums", "one") and not again.has("sums", "two")
    again.row("sums", "two", {"seconds": 2, "MB": 5})
    lines = (tmp_path / "own.md").read_text().splitlines()
    assert lines[0].endswith("; medians of 3 rounds.") and lines[0].count("Measured by") == 1
    assert lines[2:] == [
        "| sums | seconds | MB |",
        "| --- | ---: | ---: |",
        "| one | 1 | – |",
        "| two | 2 | 5 |",
    ]


def test_figures_of_small_files_are_not_mixed_with_others(
    measure: ModuleType, tmp_path: Path
) -> None:
    measure.Record(wanted(tmp_path, small=True)).row("sums", "one", {"seconds": 1})
    with pytest.raises(SystemExit, match="small=True, this one has small=False"):
        measure.Record(wanted(tmp_path))


def test_rows_of_an_older_file_are_said_to_be_of_no_known_commit(
    measure: ModuleType, tmp_path: Path
) -> None:
    old = {"machine": "a machine", "rounds": None, "sums": {"one": {"seconds": 1}}}
    (tmp_path / "own.json").write_text(json.dumps(old))
    measure.Record(wanted(tmp_path)).row("sums", "two", {"seconds": 2})
    head = (tmp_path / "own.md").read_text().splitlines()[0]
    assert head.startswith("Measured by a command and commit that were not noted, on a machine, ")
    assert ", and by `python benchmarks/" in head


def test_a_command_is_told_without_paths(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["/there/benchmarks/fuse.py", "--small", "--json", "/a/b.json", "--workdir=/c"]
    words += ["--peer", "mergekit=/d/python", "--only", "slerp/slerp"]
    monkeypatch.setattr(sys, "argv", words)
    told = "python benchmarks/fuse.py --small --peer mergekit=… --only slerp/slerp"
    assert measure.command() == told


def test_times_of_other_results_are_not_compared(measure: ModuleType) -> None:
    ours = {"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    measure.same("one", ours, "two", {"a": torch.tensor([1.0, 2.0])})
    with pytest.raises(SystemExit, match=r"'one' and 'two' differ by up to 1\.0e-01 in 'a'"):
        measure.same("one", ours, "two", {"a": torch.tensor([1.1, 2.0])})
    with pytest.raises(SystemExit, match="'b' is in one of them only"):
        measure.same("one", ours, "two", {"a": ours["a"], "b": ours["a"]})


def test_the_memory_of_a_command_and_its_children_is_seen(measure: ModuleType) -> None:
    code = "import os, time; x = bytearray(50_000_000); os.fork(); time.sleep(0.3); print('end')"
    megabytes, _, said = measure.watched([sys.executable, "-S", "-c", code])
    assert megabytes > 100 and "end" in said
    with pytest.raises(measure.CommandError, match="no such"):
        measure.watched([sys.executable, "-S", "-c", "raise SystemExit('no such')"])
