from fusion_bench.modelpool.token_config import for_tokens


def test_sizes_and_ids_change_at_any_depth() -> None:
    config = {
        "vocab_size": 10,
        "hidden_size": 10,
        "pad_token_id": None,
        "eos_token_id": [1, 2, 9],
        "image_token_index": 3,
        "suppress_tokens": [1, 9],
        "bad_words_ids": [[1, 2], [9]],
        "text_config": {"vocab_size": 10, "bos_token_id": 2, "pad_token_id": -1},
        "audio_config": {"vocab_size": 7},
        "mm_tokens_per_image": 2,
        "use_cache": True,
        "id2label": {0: "a"},
    }
    seen = []

    def moved(key: str, i: int) -> int | None:
        seen.append(key)
        return None if i == 9 else i + 100

    assert for_tokens(config, 10, 16, moved) == {
        "vocab_size": 16,
        "hidden_size": 10,
        "pad_token_id": None,
        "eos_token_id": [101, 102],
        "image_token_index": 103,
        "suppress_tokens": [101],
        "bad_words_ids": [[101, 102]],
        "text_config": {"vocab_size": 16, "bos_token_id": 102, "pad_token_id": -1},
        "audio_config": {"vocab_size": 7},
        "mm_tokens_per_image": 2,
        "use_cache": True,
        "id2label": {0: "a"},
    }
    assert "bos_token_id" in seen
    assert config["vocab_size"] == 10
