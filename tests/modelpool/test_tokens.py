"""Rows of a vocabulary are merged only where they mean the same."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import WORDS, rewrite, write_bert, write_llama, write_lora, write_tokenizer

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.modelpool.agreement import compare_vocabularies
from fusion_bench.modelpool.tokens import Comparison, Vocabulary, compare_tokens
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import locate

Write = Callable[[Path, list[str]], None]


def sentencepiece(pieces: Iterable[str]) -> bytes:
    """Return a model as the library of that name writes it."""
    content = b""
    for piece in pieces:
        text = piece.encode()
        inner = (
            b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x02"
        )
        content += b"\x0a" + bytes([len(inner)]) + inner
    return content + b"\x12\x02\x08\x01" + b"\x1a\x00"


def _fast(place: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(words[:-1])}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": len(words) - 1, "content": words[-1], "special": True}],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (place / "tokenizer.json").write_text(json.dumps(content))


def _unigram(place: Path, words: list[str]) -> None:
    content = {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in words]}}
    (place / "tokenizer.json").write_text(json.dumps(content))


def _slow(place: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(words[:-1])}
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "added_tokens.json").write_text(json.dumps({words[-1]: len(words) - 1}))


def _word_pieces(place: Path, words: list[str]) -> None:
    (place / "vocab.txt").write_text("\n".join(words) + "\n")


def _pieces(place: Path, words: list[str]) -> None:
    (place / "tokenizer.model").write_bytes(sentencepiece(words[:-1]))
    decoder = {str(len(words) - 1): {"content": words[-1]}}
    (place / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


KINDS: list[Write] = [_fast, _unigram, _slow, _word_pieces, _pieces]


def compared(root: Path, write: Write, own: list[str], reference: list[str]) -> Comparison | None:
    vocabularies = []
    for name, words in (("own", own), ("reference", reference)):
        place = root / name
        place.mkdir()
        write(place, words)
        vocabulary = Vocabulary.of(locate(str(place)))
        assert vocabulary is not None
        vocabularies.append(vocabulary)
    return compare_tokens(*vocabularies)


@pytest.mark.parametrize("write", KINDS)
def test_all_kinds_of_files_tell_what_ids_mean(tmp_path: Path, write: Write) -> None:
    words = ["model", "b", "c", "d", "x\x1b", "<added>"]  # a token may be called like a key
    assert compared(tmp_path, write, words, words) == Comparison({}, {}, {})


@pytest.mark.parametrize("write", KINDS)
def test_other_strings_are_found_and_further_ones(tmp_path: Path, write: Write) -> None:
    found = compared(tmp_path, write, ["model", "c", "b", "d", "e"], ["model", "b", "c", "x"])
    assert found == Comparison({1: ("c", "b"), 2: ("b", "c"), 3: ("d", "x")}, {4: "e"}, {})


@pytest.mark.parametrize("write", [_fast, _slow, _pieces])
def test_added_tokens_that_share_an_id_are_found(tmp_path: Path, write: Write) -> None:
    found = compared(tmp_path, write, ["a", "b", "<mine>"], ["a", "b", "<yours>"])
    assert found == Comparison({2: ("<mine>", "<yours>")}, {}, {})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [1, 2]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": null}]}'),
        ("vocab.json", b'{"en": {"a": 1}}'),
        ("tokenizer.model", b"not a sentencepiece model"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        ("tokenizer.model", b"\x0a\x7f"),
        ("tekken.json", b'{"vocab": []}'),
        ("a.tiktoken", b"YQ== 0"),
    ],
)
def test_what_cannot_be_read_is_a_note(tmp_path: Path, file: str, content: bytes) -> None:
    for name, more in (("a", b""), ("b", b" ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content + more)
    vocabularies = {
        name: vocabulary
        for name in "ab"
        if (vocabulary := Vocabulary.of(locate(str(tmp_path / name))))
    }
    (note,) = compare_vocabularies(vocabularies).notes
    assert note.startswith("b: its tokenizer and that of a are in files that cannot be compared")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"tokenizer\.json' is not valid JSON"):
        compared(
            tmp_path, lambda p, w: (p / "tokenizer.json").write_text(w[0]) and None, ["{"], ["}"]
        )


def test_files_of_two_kinds_are_not_guessed_at(tmp_path: Path) -> None:
    for name, write in (("a", _fast), ("b", _pieces)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ["x", "y"])
    own, reference = (Vocabulary.of(locate(str(tmp_path / name))) for name in "ab")
    assert own and reference and compare_tokens(own, reference) is None


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Write `a` and `b` of one vocabulary, and `swapped`, of which two ids mean other words."""
    for seed, name in enumerate(("a", "b", "swapped")):
        write_llama(tmp_path / name, seed=seed, dtype=torch.float32)
    swap(tmp_path / "swapped")
    return tmp_path


def swap(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= {"cat": WORDS.index("dog"), "dog": WORDS.index("cat")}

    rewrite(folder, change, "tokenizer.json")


def pool(family: Path, *names: str, **policy: Any) -> CausalLMPool:
    return CausalLMPool({name: str(family / name) for name in names}, policy=policy)


def merge(pool: HFModelPool) -> None:
    SimpleAverageAlgorithm(show_pbar=False).run(pool)


def test_a_merge_of_other_tokens_is_refused_unless_the_policy_says_otherwise(family: Path) -> None:
    merge(pool(family, "a", "b"))
    with pytest.raises(FusionBenchError) as error:
        merge(pool(family, "a", "swapped", "b"))
    assert str(error.value).endswith(
        'swapped: 2 token ids mean other strings than in a: 5 is "dog", in a "cat"; '
        '6 is "cat", in a "dog"'
    )
    assert "policy.on_tokenizer=warn" in str(error.value)
    models = pool(family, "a", "swapped", on_tokenizer="warn")
    merge(models)
    (note,) = models.notes
    assert note.startswith("swapped: 2 token ids") and note.endswith("merged all the same.")


def test_two_added_tokens_are_not_averaged_into_one(tmp_path: Path) -> None:
    for seed, (name, token) in enumerate((("a", "<think>"), ("b", "<tool>"))):
        folder = tmp_path / name
        write_llama(folder, seed=seed, dtype=torch.float32, vocabulary=len(WORDS) + 1 + seed)
        added = {"id": len(WORDS), "content": token}
        rewrite(folder, lambda c, added=added: c["added_tokens"].append(added), "tokenizer.json")
    with pytest.raises(
        FusionBenchError, match=r'1 token id means .* 16 is "<tool>", in a "<think>"'
    ):
        merge(pool(tmp_path, "a", "b", on_vocabulary="common"))


def test_tokens_that_only_one_has_are_a_note(family: Path) -> None:
    added = {"id": len(WORDS), "content": "<tool>"}
    rewrite(family / "b", lambda content: content["added_tokens"].append(added), "tokenizer.json")
    for names in (("a", "b"), ("b", "a")):
        models = pool(family, *names)
        merge(models)
        assert models.notes == ['b: its tokenizer has 1 token that a lacks: 16 "<tool>".']


def test_the_tokenizer_that_goes_beside_the_merged_model_is_compared(family: Path) -> None:
    models = {name: str(family / name) for name in "ab"}
    with pytest.raises(FusionBenchError, match=r"the tokenizer of '.*swapped': 2 token ids"):
        merge(CausalLMPool(models, tokenizer=str(family / "swapped")))


def test_models_without_a_tokenizer_are_not_compared(family: Path) -> None:
    for name in ("a", "swapped"):
        for file in (family / name).glob("tokenizer*"):
            file.unlink()
    models = pool(family, "a", "swapped", "b")
    merge(models)
    assert models.notes == []


def test_an_adapters_own_tokenizer_counts(family: Path) -> None:
    base = dict(pool(family, "a").weights("a"))
    write_lora(family / "x", base, ["model.layers.0.self_attn.q_proj"])
    write_tokenizer(family / "x")
    models = {"_pretrained_": family / "a", "x": family / "x", "b": family / "b"}
    merge(CausalLMPool(models))
    swap(family / "x")
    with pytest.raises(FusionBenchError, match=r"x: 2 token ids .* in _pretrained_"):
        merge(CausalLMPool(models))


def test_word_pieces_beside_bert(tmp_path: Path) -> None:
    for name, words in (("a", WORDS), ("b", [*WORDS[:-2], "[new]", WORDS[-1]])):
        write_bert(tmp_path / name)
        for file in (tmp_path / name).glob("tokenizer*"):
            file.unlink()
        _word_pieces(tmp_path / name, words)
    with pytest.raises(FusionBenchError, match=r'14 is "\[new\]", in a "tree"'):
        merge(HFModelPool({name: tmp_path / name for name in "ab"}))


def test_a_large_tokenizer_is_compared(tmp_path: Path) -> None:
    words = [f"word-{i}" for i in range(50_000)]
    found = compared(tmp_path, _fast, words, [*words[:-5], *reversed(words[-5:])])
    assert found is not None and len(found.other) == 4
