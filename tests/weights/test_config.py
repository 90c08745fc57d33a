"""What of a config decides what a model computes."""

from fusion_bench.weights.config import decides, deciding, vocabulary


def test_keys_of_generation_are_no_part_of_the_computation() -> None:
    assert {decides(key) for key in ("top_k", "top_p", "num_beams", "max_length")} == {"nothing"}


def test_what_a_model_is_called_decides_nothing_at_any_depth() -> None:
    config = {"_name_or_path": "a", "hidden_act": "gelu", "text": {"dtype": "x", "rope_theta": 1}}
    assert deciding(config) == {"hidden_act": "gelu", "text": {"rope_theta": 1}}


def test_the_number_of_tokens_may_be_said_of_the_part_that_reads() -> None:
    assert vocabulary({"vocab_size": 3}) == vocabulary({"text_config": {"vocab_size": 3}}) == 3
    assert vocabulary({"vocab_size": "3"}) is vocabulary({}) is vocabulary(None) is None
