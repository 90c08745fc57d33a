import logging

import pytest

from fusion_bench.redact import Redacting, redacted, secret_keys

TOKEN = "hf_" + "a1B2c3D4" * 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"GET with {TOKEN} failed", "GET with *** failed"),
        ("https://me:hunter2@example.org/x", "https://***@example.org/x"),
        ("https://example.org/x?token=abc&b=1", "https://example.org/x?token=***&b=1"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
    ],
)
def test_tokens_are_hidden(text: str, kept: str) -> None:
    assert redacted(text) == kept


@pytest.mark.parametrize(
    "text", ["hf_model", "a/b-c_d", "https://example.org:80/x", "seed=1", "0" * 64, "mask"]
)
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text


def test_the_users_own_token_is_hidden_whatever_it_looks_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain words")
    assert redacted("with plain words in it") == "with *** in it"


def test_places_that_hold_secrets() -> None:
    config = {
        "token": "abc",
        "use_auth_token": True,
        "a": [{"api_key": "abc"}, {"x": TOKEN}],
        "pad_token": "<pad>",
        "tokenizer": "a/b",
        "password": None,
        "hub_token": "${oc.env:HF_TOKEN}",
    }
    assert list(secret_keys(config)) == ["token", "a[0].api_key", "a[1].x"]


def test_logs_and_tracebacks_are_rewritten(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(Redacting())
    try:
        try:
            raise ValueError(f"bad {TOKEN}")
        except ValueError:
            logging.getLogger("x").exception("with %s", TOKEN)
        assert TOKEN not in caplog.text and "ValueError: bad ***" in caplog.text
    finally:
        caplog.handler.filters.clear()


def test_a_token_of_a_vocabulary_is_no_secret() -> None:
    row = {"kind": "model_token", "model": "a", "token": "<|im_start|>"}
    assert not list(secret_keys({"tokens": {"<x>": {"source": row}}}))
    assert list(secret_keys({"source": {**row, "token": TOKEN}})) == ["source.token"]
    assert list(secret_keys({"source": {**row, "kind": "other"}})) == ["source.token"]
