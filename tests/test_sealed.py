from pathlib import Path

import numpy as np
import pytest

from fusion_bench.sealed import read_sealed, remembered, write_sealed
from fusion_bench.storage import cache_dir


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256))])
def test_it_reads_back(tmp_path: Path, content: bytes) -> None:
    write_sealed(tmp_path / "new" / "file", content)
    assert read_sealed(tmp_path / "new" / "file") == content


def test_no_file_is_nothing(tmp_path: Path) -> None:
    assert read_sealed(tmp_path / "file") is None


def test_any_flipped_byte_and_any_cut_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_sealed(file, b"content")
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_sealed(file) is None
        file.write_bytes(whole[:place])
        assert read_sealed(file) is None


def test_a_text_is_made_once_for_the_same_data() -> None:
    made: list[str] = []

    def text(about: object) -> str:
        def make() -> str:
            made.append(str(about))
            return f"text {len(made)}"

        return remembered("facts", about, make)

    values = np.array([[0.5, np.nan]])
    assert [text({"a": 1, "b": 2}), text({"a": 1, "b": 2})] == ["text 1", "text 1"]
    assert text({"b": 2, "a": 1}) == "text 2"  # order may matter
    assert [text([values]), text([values.copy()]), text([values + 1])] == ["text 3"] * 2 + [
        "text 4"
    ]


def test_a_damaged_text_is_made_again_and_a_mistake_is_not_kept() -> None:
    def fails() -> str:
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        remembered("facts", "x", fails)
    assert remembered("facts", "x", lambda: "é") == "é"
    assert remembered("facts", "x", fails) == "é"
    (file,) = (path for path in (cache_dir() / "facts").rglob("*") if path.is_file())
    file.write_bytes(b"damaged")
    assert remembered("facts", "x", lambda: "new") == "new"


def test_a_cache_that_cannot_be_written_to_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file"))
    assert remembered("facts", "x", lambda: "a") == "a"
    assert remembered("facts", "x", lambda: "b") == "b"
