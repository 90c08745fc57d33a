"""The tokenizers: any text is read back, and lengths are those of its bytes or words."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fusion_bench.zoo.language import tokenizer


@pytest.mark.parametrize(
    "text", ["sort haid:", "our café is not dull: ✓", " two  spaces ", "\n\t\0"]
)
def test_bytes_are_read_back(text: str, tmp_path: Path) -> None:
    tokenizer.of_bytes("<s> $A").save_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokens(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode()) and ids[0] == tokens.bos_token_id == 1
    assert tokens.decode(ids, skip_special_tokens=True) == text
    assert (tokens.pad_token_id, tokens.eos_token_id, len(tokens)) == (0, 2, 259)
    assert tokens.model_max_length == 256


def test_the_template_says_what_surrounds_a_text() -> None:
    tokens = tokenizer.of_bytes("$A </s>")
    assert tokens.convert_ids_to_tokens(tokens("ab")["input_ids"]) == ["a", "b", "</s>"]


def test_a_known_word_is_one_token_and_another_is_spelled(tmp_path: Path) -> None:
    tokenizer.of_words(["the red lamp", "a lamp"]).save_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    found = tokens("the Lamp", "red led")
    spelled = ["[CLS]", "the", "lamp", "[SEP]", "red", "l", "##e", "##d", "[SEP]"]
    assert tokens.convert_ids_to_tokens(found["input_ids"]) == spelled
    assert found["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert tokens.model_max_length == 64
