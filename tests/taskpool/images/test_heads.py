from pathlib import Path

import pytest
import torch

from fusion_bench.storage import cache_dir
from fusion_bench.taskpool.images.heads import HeadStore
from fusion_bench.zero_shot import ZeroShotHead


def made() -> ZeroShotHead:
    random = torch.Generator().manual_seed(0)
    return ZeroShotHead(torch.randn(4, 6, generator=random), torch.randn(3, 4, generator=random))


def kept() -> Path:
    (file,) = (f for f in (cache_dir() / "heads").rglob("*") if f.is_file())
    return file


def test_a_head_is_found_again() -> None:
    assert HeadStore().load("name") is None
    HeadStore().save("name", made())
    found = HeadStore().load("name")
    assert found is not None
    assert torch.equal(found.projection, made().projection)
    assert torch.equal(found.classes, made().classes)
    assert HeadStore().load("other") is None


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_head_counts_as_none(place: int) -> None:
    HeadStore().save("name", made())
    content = bytearray(kept().read_bytes())
    content[place] ^= 1
    kept().write_bytes(content)
    assert HeadStore().load("name") is None


@pytest.mark.parametrize("length", [0, 8, 100])
def test_a_cut_head_counts_as_none(length: int) -> None:
    HeadStore().save("name", made())
    kept().write_bytes(kept().read_bytes()[:length])
    assert HeadStore().load("name") is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file"))
    HeadStore().save("name", made())
    assert "continues without" in caplog.text
