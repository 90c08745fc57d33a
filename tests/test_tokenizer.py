"""The tokenizer of models is known by its files, once it was read."""

from pathlib import Path

import pytest
from fixtures_llm import write_tokenizer

from fusion_bench import tokenizer
from fusion_bench.problems import FusionBenchError
from fusion_bench.tokenizer import TokenizerSource, identity


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the folders that tokenizers are read from, in a list that grows."""
    folders: list[str] = []
    read_one = tokenizer.from_pretrained

    def noted(made: object, place: Path, **more: bool) -> object:
        folders.append(place.name)
        return read_one(made, place, **more)

    monkeypatch.setattr(tokenizer, "from_pretrained", noted)
    return folders


def test_the_same_files_are_read_once(tmp_path: Path, read: list[str]) -> None:
    for name in ("one", "same"):
        write_tokenizer(tmp_path / name)
    first = TokenizerSource.named(str(tmp_path / "one")).identity
    assert read == ["one"]
    assert TokenizerSource.named(str(tmp_path / "same")).identity == first
    assert read == ["one"]
    source = TokenizerSource.named(str(tmp_path / "same"))
    assert identity(source.tokenizer) == first and read == ["one", "same"]


def test_another_file_is_another_tokenizer(tmp_path: Path, read: list[str]) -> None:
    write_tokenizer(tmp_path / "one")
    first = TokenizerSource.named(str(tmp_path / "one")).identity
    file = tmp_path / "one" / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"cow"'))
    assert TokenizerSource.named(str(tmp_path / "one")).identity != first
    assert read == ["one", "one"]


def test_one_that_cannot_be_read_stays_so(tmp_path: Path, read: list[str]) -> None:
    write_tokenizer(tmp_path / "one")
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(FusionBenchError):
            _ = TokenizerSource.named(str(tmp_path / "one")).identity
    assert read == ["one", "one"]
