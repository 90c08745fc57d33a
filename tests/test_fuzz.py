"""Hundreds of damaged and crafted files of each kind; ``-m exhaustive`` reads thousands."""

import itertools
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "report and scores, shown as a page": 20,
    "report and scores, compared": 15,
    "config": 40,
    "dataset card": 25,
    "metadata file": 25,
    "image bytes": 60,
    "tokenizer files": 40,
}
WATCH = Watch()
#: Bytes of addresses that reading may take beside what is taken before.
MEMORY = 4 * 2**30
#: Seconds of the processor for one file.
BUSY = 60


@pytest.fixture
def bounded() -> Iterator[None]:
    """Refuse this process more memory than ``MEMORY``."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_all_kinds_are_tried() -> None:
    assert CASES.keys() == KINDS.keys()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", CASES)
def test_nothing_but_our_own_errors(name: str, tmp_path: Path, row: Any) -> None:
    write_secrets(tmp_path)
    numbers = itertools.count()
    outcomes: Counter[str] = Counter()
    seconds: list[float] = []

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
        begun = time.process_time()
        outcomes[attempt(KINDS[name], files, directory, WATCH)] += 1
        seconds.append(time.process_time() - begun)
        shutil.rmtree(directory)

    try_all()
    assert max(seconds) < BUSY
    read, cases = outcomes["read"], outcomes.total()
    figures = {"cases": cases, "refused": cases - read, "read, for nothing was wrong": read}
    slowest = {"slowest, s": round(max(seconds), 1)}
    row("fuzz", title=name, **figures, **{"ended otherwise": 0}, **slowest)


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
