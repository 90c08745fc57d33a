"""The tokenizer of the zoo's captions."""

from fusion_bench.zoo import CLASS_NAMES, TASKS, TEMPLATES, tokenizer

CAPTIONS = [
    template.format(name) for task in TASKS for name in CLASS_NAMES[task] for template in TEMPLATES
]


def test_every_word_of_a_caption_is_one_token() -> None:
    tokens = tokenizer.train(CAPTIONS)
    words = tokens.convert_ids_to_tokens(tokens("A photo of the upside-down face.")["input_ids"])
    assert words[1:-1] == [f"{word}</w>" for word in "a photo of the upside - down face .".split()]  # noqa: SIM905
    assert (words[0], words[-1]) == (tokens.bos_token, tokens.eos_token)


def test_other_text_is_spelled_and_read_back() -> None:
    tokens = tokenizer.train(CAPTIONS)
    ids = tokens("zebra façade 7")["input_ids"]
    assert tokens.decode(ids, skip_special_tokens=True) == "zebra façade 7"
    assert max(ids) < len(tokens)


def test_the_vocabulary_does_not_depend_on_the_order_of_the_captions() -> None:
    assert tokenizer.train(CAPTIONS).get_vocab() == tokenizer.train(CAPTIONS[::-1]).get_vocab()


def test_merges_by_hand() -> None:
    tokens = tokenizer.train(["aab aab aac"])
    # "aa" is the most frequent pair; then "aab" twice, before "aac" once
    assert tokens.backend_tokenizer.get_vocab()["aab</w>"] == 513
    assert tokens.backend_tokenizer.get_vocab()["aac</w>"] == 514
