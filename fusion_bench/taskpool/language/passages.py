"""Texts that a model reads as a whole: classifiers and embedding models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.language.model import read_at_most
from fusion_bench.taskpool.language.requests import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passage:
    """A text, or two.

    Attributes:
        tokens: their tokens, with those that the tokenizer puts around them; not empty.
        types: for each token the text that it is of, 0 or 1.
        truncated: whether the end was cut off.
    """

    tokens: Tokens
    types: Tokens
    truncated: bool = False


@dataclass(frozen=True)
class Batch:
    """Passages side by side, filled up at their ends; int64 of shape (rows, width).

    Attributes:
        ids: the tokens.
        types: their types.
        mask: 1 where there is a token, else 0.
    """

    ids: Tensor
    types: Tensor
    mask: Tensor

    @classmethod
    def of(cls, passages: Sequence[Passage], padding: int, device: torch.device) -> "Batch":
        """Put passages together; ``padding`` is a token for where nothing is read."""
        width = max(len(own.tokens) for own in passages)

        def filled(rows: Sequence[Tokens], fill: int) -> Tensor:
            return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows]).to(
                device
            )

        return cls(
            filled([own.tokens for own in passages], padding),
            filled([own.types for own in passages], 0),
            filled([(1,) * len(own.tokens) for own in passages], 0),
        )

    def arguments(self, config: Any) -> dict[str, Tensor]:
        """Return what a model with a config takes."""
        own = {"input_ids": self.ids, "attention_mask": self.mask}
        # Other models, such as GPT-2, would take the types for words.
        if (getattr(config, "type_vocab_size", None) or 0) > 1:
            own["token_type_ids"] = self.types
        return own

    def last(self, states: Tensor) -> Tensor:
        """Return what stands at each row's last token, of (rows, width, …)."""
        return states[torch.arange(len(states), device=states.device), self.mask.sum(dim=1) - 1]


def passages(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    longest: int,
) -> list[Passage]:
    """Encode texts, or pairs of them, and cut what is longer than ``longest`` tokens.

    Of a pair the longer text is cut.

    Raises:
        FusionBenchError: a text without a token.
    """
    whole = _encoded(tokenizer, texts, pairs)
    for i, own in enumerate(whole):
        if not own.tokens:
            raise FusionBenchError(
                f"the text {texts[i]!r} has no token.", "Leave the sample out of the dataset."
            )
    long = [i for i, own in enumerate(whole) if len(own.tokens) > longest]
    if long:
        own_pairs = None if pairs is None else [pairs[i] for i in long]
        cut = _encoded(tokenizer, [texts[i] for i in long], own_pairs, longest)
        for i, own in zip(long, cut, strict=True):
            whole[i] = Passage(own.tokens, own.types, truncated=True)
    return whole


def longest_text(module: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many tokens a model reads at once, by its positions, its config, its tokenizer."""
    at_most = read_at_most(getattr(module, "config", None), tokenizer.model_max_length)
    for name, own in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(own, nn.Embedding):
            # RoBERTa counts positions from the one after that of padding.
            at_most = own.num_embeddings - (0 if own.padding_idx is None else own.padding_idx + 1)
    return min(at_most, int(tokenizer.model_max_length))


def _encoded(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    longest: int | None = None,
) -> list[Passage]:
    both: dict[str, Any] = {} if pairs is None else {"text_pair": list(pairs)}
    if longest is not None:
        both |= {"truncation": True, "max_length": longest}
    found = tokenizer(list(texts), **both)
    types = found.get("token_type_ids") or [[0] * len(own) for own in found["input_ids"]]
    rows = zip(found["input_ids"], types, strict=True)
    return [Passage(tuple(ids), tuple(own)) for ids, own in rows]
