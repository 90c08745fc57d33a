from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save

from fusion_bench.results import ACCURACY, LOSS, SampleScores, store
from fusion_bench.results.store import ResultStore
from fusion_bench.sealed import write_sealed
from fusion_bench.storage import cache_dir

ARRAYS = {
    "samples": np.array([2, 3, 5, 8], np.int64),
    "labels": np.array([0, 1, 1, 3], np.int64),
    "predictions": np.array([0, 1, 2, 3], np.int64),
    "losses": np.array([0.5, 0.25, 2.0, 1e-8], np.float32),
}
SCORE = SampleScores.classified(**ARRAYS)
KEY = {"weights": "w", "images": ["d", "image", "p"], "labels": "l", "samples": "s"}


def kept() -> Path:
    (file,) = (f for f in (cache_dir() / "scores").rglob("*") if f.is_file())
    return file


def assert_same(found: SampleScores | None) -> None:
    assert found is not None
    assert {n: a.tolist() for n, a in found.arrays().items()} == {
        name: array.tolist() for name, array in SCORE.arrays().items()
    }
    assert found.samples.dtype == np.int64 and found.statistics["loss"].dtype == np.float64


def test_figures() -> None:
    assert SCORE.num_samples == 4
    assert SCORE.value(ACCURACY) == 3 / 4
    assert SCORE.value(LOSS) == (2.75 + float(np.float32(1e-8))) / 4


def test_losses_are_summed_in_float64() -> None:
    ones = np.ones(100, np.int64)
    losses = np.array([2**25] + [1] * 99, np.float32)
    score = SampleScores.classified(np.arange(100), ones, ones, losses)
    assert score.totals(LOSS).tolist() == [2**25 + 99, 100]


def test_parquet() -> None:
    table = parquet.read_table(pyarrow.BufferReader(SCORE.parquet()))
    assert table.column_names == ["sample", "label", "prediction", "accuracy", "loss"]
    frame: pandas.DataFrame = table.to_pandas()
    assert frame["sample"].tolist() == [2, 3, 5, 8]
    assert frame["prediction"].tolist() == [0, 1, 2, 3]
    assert frame["accuracy"].tolist() == [1, 1, 0, 1]
    assert frame["loss"].tolist() == ARRAYS["losses"].tolist()


def test_results_of_earlier_versions_count() -> None:
    """Their files hold these four arrays, under the same name in another directory."""
    ResultStore().save(KEY, SCORE)
    name = kept().relative_to(cache_dir() / "scores")
    kept().unlink()
    write_sealed(cache_dir() / "results" / name, save(ARRAYS))
    assert_same(ResultStore().load(KEY))


def test_a_score_is_found_again() -> None:
    assert ResultStore().load(KEY) is None
    ResultStore().save(KEY, SCORE)
    assert_same(ResultStore().load(dict(reversed(KEY.items()))))


@pytest.mark.parametrize("part", KEY)
def test_another_key_is_another_score(part: str) -> None:
    ResultStore().save(KEY, SCORE)
    changed: Any = {**KEY, part: "other"}
    assert ResultStore().load(changed) is None
    assert ResultStore().load({k: v for k, v in KEY.items() if k != part}) is None


def test_an_older_evaluation_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ResultStore().save(KEY, SCORE)
    monkeypatch.setattr(store, "EVALUATION_VERSION", store.EVALUATION_VERSION + 1)
    assert ResultStore().load(KEY) is None


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_file_counts_as_nothing(place: int) -> None:
    ResultStore().save(KEY, SCORE)
    content = bytearray(kept().read_bytes())
    content[place] ^= 1
    kept().write_bytes(content)
    assert ResultStore().load(KEY) is None
    ResultStore().save(KEY, SCORE)
    assert_same(ResultStore().load(KEY))


@pytest.mark.parametrize("length", [0, 8, 100])
def test_a_cut_file_counts_as_nothing(length: int) -> None:
    ResultStore().save(KEY, SCORE)
    kept().write_bytes(kept().read_bytes()[:length])
    assert ResultStore().load(KEY) is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file"))
    ResultStore().save(KEY, SCORE)
    assert "continues without" in caplog.text
    assert ResultStore().load(KEY) is None


@pytest.mark.parametrize("directory", ["scores", "results"])
def test_other_content_counts_as_nothing(directory: str) -> None:
    ResultStore().save(KEY, SCORE)
    name = kept().relative_to(cache_dir() / "scores")
    kept().unlink()
    write_sealed(cache_dir() / directory / name, save({"surprise": ARRAYS["samples"]}))
    assert ResultStore().load(KEY) is None
