import pytest
from fixtures_tokens import COMMON, trained

from fusion_bench.modelpool.chat_templates import TEMPLATES, check_template, chosen
from fusion_bench.problems import ConfigError

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]
WRITTEN = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "alpaca": "Be kind.\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHello [/INST] Hi!</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_writes_a_conversation(name: str) -> None:
    tokenizer = trained("bpe", COMMON, 300)
    tokenizer.chat_template = chosen(name, [])
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == WRITTEN[name]


def test_the_most_frequent_is_chosen_and_of_equals_the_first() -> None:
    assert chosen("auto", [None, "a", "b ", "b", ""]) == "b"
    assert chosen("auto", ["a", "b"]) == "a"
    assert chosen("auto", [None, None]) is None
    assert chosen("{{ x }}", ["a"]) == "{{ x }}"


@pytest.mark.parametrize("given", [None, "auto", *TEMPLATES, "{{ messages }}", "{% generation %}x"])
def test_templates_that_are_taken(given: str | None) -> None:
    check_template(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("exaone", "Or give a text in Jinja"),
        ("llama", "Did you mean 'llama3'"),
        ("{{ x", "it is not Jinja"),
        (3, "'3' is no chat template"),
    ],
)
def test_what_is_no_template(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_template(given)
