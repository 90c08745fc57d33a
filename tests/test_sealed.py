from pathlib import Path

import pytest

from fusion_bench.sealed import read_sealed, write_sealed


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
