from pathlib import Path

import pytest
from fixtures_tokens import CODE, COMMON, Kind, trained
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion_bench.modelpool.output_tokenizer import SAMPLE, Made, ModelTokens, check_saved, make
from fusion_bench.problems import FusionBenchError
from fusion_bench.tokenizer import TokenizerSource


def tokens(name: str, tokenizer: PreTrainedTokenizerFast, rows: int | None = None) -> ModelTokens:
    return ModelTokens(name, TokenizerSource(lambda: tokenizer), rows or len(tokenizer))


def united(*models: ModelTokens, extra: tuple[str, ...] = ()) -> Made:
    return make(models[0].source, models, extra, rows=None, union=True, template=None)


def test_special_tokens_keep_their_settings_and_the_first_definition_counts() -> None:
    first, second, third = (trained("bpe", COMMON, 300) for _ in range(3))
    second.add_tokens([AddedToken("<x>", special=True, lstrip=True)])
    third.add_tokens([AddedToken("<x>", rstrip=True), AddedToken("cat", special=True)])
    third.add_tokens(["dog"])
    made = united(*(tokens(n, t) for n, t in zip("abc", (first, second, third), strict=True)))
    found = {str(token.content): token for token in made.tokenizer.added_tokens_decoder.values()}
    assert (found["<x>"].special, found["<x>"].lstrip, found["<x>"].rstrip) == (True, True, False)
    size = len(first)
    assert made.ids["<x>"] == size
    assert (found["dog"].special, found["cat"].special) == (False, True)
    assert made.appended == {"b": 1, "c": len(made.ids) - size - 1}
    # Nobody else's tokenizer has changed.
    assert len(first) == size
    assert "<x>" not in first.get_vocab()


def test_a_token_that_all_have_and_one_added_stays_where_it_is() -> None:
    first, second = trained("bpe", COMMON, 300), trained("bpe", COMMON, 300)
    word = next(token for token in first.get_vocab() if token == "the")
    second.add_tokens([AddedToken(word, special=True, normalized=False)])
    made = united(tokens("a", first), tokens("b", second))
    assert made.ids == first.get_vocab()
    assert not made.appended
    i = made.ids[word]
    assert made.tokenizer.added_tokens_decoder[i].special


def test_tokens_without_a_row_are_not_appended() -> None:
    first, second = trained("bpe", COMMON, 300), trained("bpe", CODE, 290, ["<no row>"])
    second_tokens = tokens("b", second, rows=len(second) - 1)
    assert "<no row>" not in second_tokens.ids
    assert "<no row>" in second_tokens.everything
    assert "<no row>" not in united(tokens("a", first), second_tokens).ids


def test_extra_tokens_come_last_with_the_settings_of_the_model_that_has_them() -> None:
    first, second = trained("bpe", COMMON, 300), trained("bpe", COMMON, 300)
    second.add_tokens([AddedToken("<x>", special=True)])
    models = [tokens("a", first), tokens("b", second)]
    made = make(models[0].source, models, ["<y>", "<x>"], rows=None, union=False, template="{{1}}")
    assert (made.ids["<y>"], made.ids["<x>"]) == (len(first), len(first) + 1)
    assert made.appended == {"": 1, "b": 1}
    assert made.tokenizer.added_tokens_decoder[made.ids["<x>"]].special
    assert made.tokenizer.chat_template == "{{1}}"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_tokenizer_is_cut_at_its_rows(kind: Kind) -> None:
    whole = trained(kind, COMMON, 300)
    size = len(whole)
    whole.add_tokens(["<one>", "<two>"])
    whole.add_special_tokens({"mask_token": "<mask>"})
    assert len(whole) == size + 3
    for rows in (size + 1, size - 4):
        made = make(tokens("a", whole).source, [], [], rows=rows, union=False, template=None)
        assert made.ids == {token: i for token, i in whole.get_vocab().items() if i < rows}
        assert len(made.left_out) == size + 3 - rows
        assert made.tokenizer.mask_token is None
        ids = made.tokenizer.encode("the cat sat on the mat")
        assert max(ids) < rows
        assert made.tokenizer.pad_token == "<pad>"


def test_what_cannot_be_cut_stays_whole() -> None:
    whole = trained("bpe", COMMON, 300)
    made = make(tokens("a", whole).source, [], [], rows=len(whole), union=False, template=None)
    assert not made.left_out
    assert made.ids == whole.get_vocab()


def test_the_check_tells_what_differs(tmp_path: Path) -> None:
    first, second = trained("bpe", COMMON, 300), trained("bpe", [*CODE, *SAMPLE] * 5, 400)
    made = united(tokens("a", first), tokens("b", second)).tokenizer
    made.save_pretrained(tmp_path)
    (note,) = check_saved(tmp_path, made, first, len(made))
    counts = [sum(len(t.encode(text)) for text in SAMPLE) for t in (made, first)]
    assert note.startswith(f"A sample text has {counts[0]} tokens;")
    assert note.endswith(f"it has {counts[1]}.")
    assert check_saved(tmp_path, made, made, len(made)) == []


def test_ids_without_a_row_are_an_error(tmp_path: Path) -> None:
    tokenizer = trained("bpe", COMMON, 300)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FusionBenchError, match=r"for which there is no row: there are 50\."):
        check_saved(tmp_path, tokenizer, tokenizer, 50)


def test_another_tokenizer_on_disk_is_an_error(tmp_path: Path) -> None:
    first, second = trained("bpe", COMMON, 300), trained("bpe", CODE, 300)
    second.save_pretrained(tmp_path)
    with pytest.raises(FusionBenchError, match="it has other tokens"):
        check_saved(tmp_path, first, first, 1000)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == second.get_vocab()
