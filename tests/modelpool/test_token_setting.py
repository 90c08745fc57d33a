from pathlib import Path
from typing import Any

import pytest

from fusion_bench.modelpool.token_setting import TokenRow, TokenSetting
from fusion_bench.problems import FusionBenchError

MODELS = ("_pretrained_", "a", "b")


def test_a_text_names_a_tokenizer() -> None:
    for text in ("union", "base", "a"):
        assert TokenSetting.read(text, MODELS) == TokenSetting(text, "_pretrained_")
    assert TokenSetting.read("union", ("a", "b")) == TokenSetting("union", None)


@pytest.mark.parametrize("given", [None, "path/to/tokenizer", {"_target_": "x"}, "c"])
def test_what_names_files_is_no_setting(given: object) -> None:
    assert TokenSetting.read(given, MODELS) is None


def test_a_slip_of_the_keyboard_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FusionBenchError, match=r"'unoin' is no tokenizer\. Did you mean 'union'"):
        TokenSetting.read("unoin", MODELS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unions").mkdir()
    assert TokenSetting.read("unions", MODELS) is None


def test_a_mapping_says_more() -> None:
    given = {
        "source": "base",
        "base": "a",
        "pad_to_multiple_of": 64,
        "tokens": {
            "<x>": {"source": "b", "force": True},
            "<y>": {"source": {"kind": "zero"}},
            "<z>": {"source": {"kind": "model_token", "model": "a", "token": "hi"}},
            "<n>": {"source": {"kind": "model_token", "model": "a", "token_id": 0}},
            "the": {"force": True},
        },
    }
    rows = {
        "<x>": TokenRow("b"),
        "<y>": TokenRow(None),
        "<z>": TokenRow("a", "hi"),
        "<n>": TokenRow("a", None, 0),
        "the": None,
    }
    expected = TokenSetting("base", "a", rows, frozenset({"<x>", "the"}), 64)
    assert TokenSetting.read(given, MODELS) == expected
    assert TokenSetting.read({"pad_to_multiple_of": 8}, MODELS) == TokenSetting(
        "union", "_pretrained_", multiple=8
    )


@pytest.mark.parametrize(
    ("given", "place", "words"),
    [
        ({"source": "union", "token": {}}, ("token",), "Did you mean 'tokens'"),
        ({"source": 3}, ("source",), "is no tokenizer"),
        ({"pad_to_multiple_of": -8}, ("pad_to_multiple_of",), "is no positive number"),
        ({"pad_to_multiple_of": 0}, ("pad_to_multiple_of",), "0 is no positive number"),
        ({"sorce": "union"}, ("sorce",), "Did you mean 'source'"),
        ({"pad_to_multiple_of": True}, ("pad_to_multiple_of",), "is no positive number"),
        ({"base": "c"}, ("base",), "is not in the pool"),
        ({"tokens": ["<x>"]}, ("tokens",), "is no mapping"),
        ({"tokens": {1: {"force": True}}}, ("tokens", "1"), 'Write "1" in quotes'),
        ({"tokens": {"<x>": "b"}}, ("tokens", "<x>"), "is no mapping"),
        ({"tokens": {"<x>": {}}}, ("tokens", "<x>", "source"), "there is neither"),
        ({"tokens": {"<x>": {"forced": True}}}, ("tokens", "<x>", "forced"), "'force'"),
        ({"tokens": {"<x>": {"force": "yes"}}}, ("tokens", "<x>", "force"), "neither true nor"),
        ({"tokens": {"<x>": {"source": "bb"}}}, ("tokens", "<x>", "source"), "not in the pool"),
        *(
            ({"tokens": {"<x>": {"source": source}}}, ("tokens", "<x>", "source", *place), words)
            for source, place, words in (
                ({"kind": "zeros"}, ("kind",), "Did you mean 'zero'"),
                ({"kind": "zero", "model": "a"}, ("model",), "no such key"),
                ({"kind": "model_token", "token": "x"}, ("model",), "'None' is not in the pool"),
                ({"kind": "model_token", "model": "a"}, ("token",), "either token or token_id"),
                (
                    {"kind": "model_token", "model": "a", "token": "x", "token_id": 1},
                    ("token",),
                    "either token or token_id",
                ),
                ({"kind": "model_token", "model": "a", "token": 5}, ("token",), "in quotes"),
                ({"kind": "model_token", "model": "a", "token_id": -1}, ("token_id",), "no id"),
            )
        ),
    ],
)
def test_a_mistake_is_named_by_its_own_key(
    given: dict[Any, Any], place: tuple[str, ...], words: str
) -> None:
    with pytest.raises(FusionBenchError) as error:
        TokenSetting.read(given, MODELS)
    (problem,) = error.value.problems
    assert problem.place == place
    assert words in f"{problem.reason} {problem.remedy}"


def test_all_mistakes_are_told() -> None:
    given = {"sources": "union", "pad_to_multiple_of": 0.5, "tokens": {"<x>": 1, "<y>": 2}}
    with pytest.raises(FusionBenchError) as error:
        TokenSetting.read(given, MODELS)
    assert len(error.value.problems) == 4
