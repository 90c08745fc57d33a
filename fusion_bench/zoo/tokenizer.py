"""A CLIP tokenizer trained on the zoo's captions.

The trainer of the ``tokenizers`` library breaks ties differently from process to process; this
one breaks them by the alphabet, so that every build has the same vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
MAX_LENGTH = 32
"""Longest text, in tokens."""


def train(captions: Iterable[str]) -> "CLIPTokenizer":
    """Merge frequent pairs of symbols until every word of ``captions`` is one token.

    Any other text is spelled in bytes, as with every CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    words = Counter(
        word for text in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower())
    )
    merges = _learn_merges(words)
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(x + _WORD_END for x in letters), *map("".join, merges), *_SPECIAL]
    return CLIPTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent pair, again and again."""
    spelled = {word: [*word[:-1], word[-1] + _WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            for i in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[i : i + 2]) == best:
                    symbols[i : i + 2] = ["".join(best)]
