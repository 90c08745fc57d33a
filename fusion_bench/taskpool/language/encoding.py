"""From texts to tokens, as a kind of language model takes them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.language.requests import Likelihood, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes texts with a tokenizer, which stays as it is.

    Args:
        tokenizer: the tokenizer.
        seq2seq: whether an encoder reads the contexts.

    Attributes:
        seq2seq: likewise.
        eos: the token of a text's end, if there is one.
        begin: the token that the tokenizer puts before each text, if it does.
        end: the one that it puts after each, likewise.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seq2seq: bool):
        self._tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.eos: int | None = tokenizer.eos_token_id
        before, after = self._around()
        self.begin = before[-1] if before else None
        self.end = after[0] if after else None
        self._after = len(after)

    @property
    def prefix(self) -> int | None:
        """The token that stands before a text's first: that of a beginning, or else of an end."""
        bos: int | None = self._tokenizer.bos_token_id
        return next((own for own in (bos, self.begin, self.eos) if own is not None), None)

    @property
    def padding(self) -> int:
        """A token for where nothing is read; which one does not matter."""
        pad: int | None = self._tokenizer.pad_token_id
        return next((own for own in (pad, self.eos, self.prefix) if own is not None), 0)

    def texts(self, texts: Iterable[str]) -> list[Tokens]:
        """Encode texts with the special tokens that the tokenizer puts around them.

        A text that begins with the token of a beginning, as a chat template writes it, gets no
        second one, and for a model without an encoder no text gets an end.

        Raises:
            FusionBenchError: a text without any token.
        """
        texts = list(texts)
        begin = self._tokenizer.bos_token
        different = dict.fromkeys(texts)
        written = [text for text in different if begin and text.startswith(begin)]
        known = self._encoded(written, False)
        known |= self._encoded([text for text in different if text not in known], True)
        if nothing := [text for text, tokens in known.items() if not tokens]:
            raise FusionBenchError(
                f"the prompt {nothing[0]!r} has no token.", "Leave the sample out."
            )
        return [known[text] for text in texts]

    def plain(self, texts: Sequence[str]) -> list[Tokens]:
        """Encode texts without special tokens."""
        known = self._encoded(list(dict.fromkeys(texts)), False)
        return [known[text] for text in texts]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Encode contexts with their continuations.

        Both are encoded as one text, and the tokens after those of the context are the
        continuation's. Spaces at a context's end go over to it, for tokens begin with a space. An
        empty context is the token that stands before a text.

        Raises:
            FusionBenchError: a continuation that is empty, or has no token.
        """
        if any(not continuation for _, continuation in pairs):
            raise FusionBenchError("an answer is empty.", "Leave the sample out.")
        moved = [_spaces_moved(*pair) for pair in pairs]
        if self.seq2seq:
            answers = self.plain([continuation for _, continuation in moved])
            contexts = self.texts([context for context, _ in moved])
            for (_, answer), tokens in zip(pairs, answers, strict=True):
                _refuse_nothing(answer, tokens)
            return [Likelihood(*own) for own in zip(contexts, answers, strict=True)]
        whole = self.texts([c + follows for c, follows in moved if c])
        contexts = self.texts([context for context, _ in moved if context])
        both = iter(zip(whole, contexts, strict=True))
        alone = iter(self.plain([follows for c, follows in moved if not c]))
        return [
            self._split(*next(both), own) if context else self._after_nothing(next(alone), own)
            for (context, _), (_, own) in zip(moved, pairs, strict=True)
        ]

    def document(self, text: str) -> tuple[Tokens, bool]:
        """Encode a document; return it with the token before it, and whether there is one.

        The tokenizer's own first token is not a part of the text.
        """
        (tokens,) = self.plain([text])
        if self.prefix is None:
            return tokens, False
        return (self.prefix, *tokens), True

    def decoded(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _split(self, whole: Tokens, context: Tokens, continuation: str) -> Likelihood:
        if len(context) < len(whole):
            return Likelihood(context, whole[len(context) :])
        _refuse_nothing(continuation, self.plain([continuation])[0])
        return Likelihood(whole[:-1], whole[-1:])  # tokens run across the border

    def _after_nothing(self, tokens: Tokens, continuation: str) -> Likelihood:
        _refuse_nothing(continuation, tokens)
        if self.prefix is not None and tokens[0] != self.prefix:
            return Likelihood((self.prefix,), tokens)
        if len(tokens) < 2:
            raise FusionBenchError(
                "there is nothing before an answer of one token.",
                "Give a prompt, or use a tokenizer with a token for the beginning of a text.",
            )
        return Likelihood(tokens[:1], tokens[1:])

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        whole: list[int] = self._tokenizer("a")["input_ids"]
        plain: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            stop = start + len(plain)
            if whole[start:stop] == plain:
                return whole[:start], whole[stop:]
        return [], []

    def _encoded(self, texts: list[str], special: bool) -> dict[str, Tokens]:
        if not texts:
            return {}
        found = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        if special and self._after and not self.seq2seq:
            found = [ids[: -self._after] for ids in found]
        return dict(zip(texts, map(tuple, found), strict=True))


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _refuse_nothing(continuation: str, tokens: Tokens) -> None:
    if not tokens:
        raise FusionBenchError(
            f"the answer {continuation!r} has no token.", "Leave the sample out."
        )
