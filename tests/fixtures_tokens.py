"""Tiny language models with tokenizers of their own, trained on a few words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from fixtures_llm import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["bpe", "unigram", "wordpiece"]
COMMON = ["the cat sat on the mat", "a dog ran under the tree", "birds flew and sang"]
CODE = ["def add(x, y): return x + y", "print(add(1, 2))", "for i in range(10): total += i"]
WIDTH = 12


def trained(
    kind: Kind, texts: Sequence[str], size: int, added: Sequence[str] = ()
) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of at most ``size`` tokens, and added ones after them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    common: dict[str, Any] = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "bpe":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        inner.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    else:
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    inner.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    made.add_tokens(list(added))
    return made


def write_model(
    folder: Path,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    seed: int = 0,
    rows: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """Write a Llama with a row for each token, or so many, and its tokenizer; return the Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: PreTrainedModel = seeded(lambda: LlamaForCausalLM(config), seed).to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
