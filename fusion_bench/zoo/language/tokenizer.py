"""Tokenizers of a fixed vocabulary: a token for each byte, or for each word."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertTokenizer, PreTrainedTokenizerFast

MAX_LENGTH = 256
"""Longest text of the models that read bytes."""
MAX_WORDS = 64
"""Longest text of the models that read words."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def of_bytes(template: str) -> "PreTrainedTokenizerFast":
    """Return a tokenizer with a token for each byte of UTF-8.

    Args:
        template: what surrounds a text, as in ``<s> $A``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {name: number for number, name in enumerate(names)}
    tokens = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    special = [(name, ids[name]) for name in (BOS, EOS)]
    tokens.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def of_words(texts: Iterable[str]) -> "BertTokenizer":
    """Return a tokenizer with a token for each word of ``texts``; it spells all others."""
    from transformers import BertTokenizer

    words = {word for text in texts for word in text.split()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
    pieces = [*letters, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    return BertTokenizer(vocab=vocabulary, model_max_length=MAX_WORDS)
