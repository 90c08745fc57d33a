"""Hundreds of damaged and crafted files of each kind; ``benchmarks/faults.py`` reads thousands."""

import itertools
from pathlib import Path

import pytest
from drawn import examples
from fixtures_fuzz import KINDS, Files, Watch, attempt, write_secrets
from hypothesis import HealthCheck, Phase, given, settings

CASES = {
    "safetensors": 200,
    "index of shards": 150,
    "config.json": 100,
    "LoRA adapter": 100,
    "pickled weights": 150,
    "report and answers, shown as a page": 20,
    "report and answers, compared": 15,
    "config": 40,
    "dataset card": 25,
    "metadata file": 25,
    "image bytes": 60,
    "tokenizer files": 40,
}
WATCH = Watch()


def test_all_kinds_are_tried() -> None:
    assert CASES.keys() == KINDS.keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_nothing_but_our_own_errors(name: str, tmp_path: Path) -> None:
    write_secrets(tmp_path)
    numbers = itertools.count()

    @settings(
        max_examples=examples(CASES[name]),
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[name].files)
    def try_all(files: Files) -> None:
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        attempt(KINDS[name], files, directory, WATCH)

    try_all()


def test_the_watch_sees_what_it_must(tmp_path: Path) -> None:
    write_secrets(tmp_path)
    inside = tmp_path / "inside"
    inside.mkdir()
    with WATCH.on(inside):
        (inside / "own").write_text("x")
    assert not WATCH.seen
    with WATCH.on(inside):
        (tmp_path / "secret.bin").read_bytes()
    assert WATCH.seen == [f"read {tmp_path / 'secret.bin'}"]
    with WATCH.on(inside), pytest.raises(OSError):
        Path("/proc/version").write_text("x")
    assert WATCH.seen == ["wrote /proc/version"]
