"""What is kept between runs is shown, and pruned by age."""

import os
import time
from pathlib import Path

import pytest

from fusion_bench.problems import FusionBenchError
from fusion_bench.scripts import verbs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path: Path, size: int, days: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    then = time.time() - 86_400 * days
    os.utime(path, (then, then))


def test_an_empty_one(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs.run("cache", [])
    assert capsys.readouterr().out == f"{cache}: nothing is kept yet.\n"
    verbs.run("cache", ["prune"])
    assert capsys.readouterr().out == "0 entries removed: 0 bytes.\n"


def test_what_was_used_lately_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(cache / "scores" / "ab" / "old", 1000, 40)
    put(cache / "scores" / "ab" / "new", 500, 1)
    put(cache / "images" / "half" / "a", 2000, 40)
    put(cache / "images" / "half" / "b", 2000, 1)
    put(cache / "images" / "gone" / "a", 3000, 40)
    put(cache / "mine" / "kept", 7, 400)
    for name in ("half", "gone"):
        then = time.time() - 86_400 * 40
        os.utime(cache / "images" / name, (then, then))
    verbs.run("cache", [])
    head, _, images, scores = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{cache}: ") and head.endswith(" kB")
    assert images.split()[:4] == ["images", "2", "7", "kB"] and scores.split()[1] == "2"
    verbs.run("cache", ["prune", "--dry-run"])
    out = capsys.readouterr().out.splitlines()
    assert out == ["images/gone", "scores/ab/old", "2 entries would be removed: 4 kB."]
    assert (cache / "images" / "gone").exists()
    verbs.run("cache", ["prune", "images"])
    assert capsys.readouterr().out == "1 entry removed: 3 kB.\n"
    left = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert left == {"scores/ab/old", "scores/ab/new", "images/half/a", "images/half/b", "mine/kept"}
    verbs.run("cache", ["prune", "--days", "0"])
    assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "mine" / "kept"]


def test_what_it_does_not_know(cache: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"no part 'image'. Did you mean 'images'"):
        verbs.run("cache", ["prune", "image"])
    with pytest.raises(FusionBenchError, match="is negative"):
        verbs.run("cache", ["prune", "--days", "-1"])
