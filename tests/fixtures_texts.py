"""Small classifiers, encoder-decoders and embedding models of texts, each with a tokenizer."""

from pathlib import Path
from typing import Any

import torch
from fixtures_llm import seeded
from lightning.fabric import Fabric

from fusion_bench.taskpool import Task, TaskPool

CPU = Fabric(accelerator="cpu", devices=1)
WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *("the", "a", "cat", "dog", "bird", "sat", "ran", "flew"),
    *("on", "under", "mat", "yes", "no", "1", "2"),
]
#: Texts of different lengths, and others to compare them with.
TEXTS = ["the cat", "a dog ran on the mat", "bird", "the bird flew under a dog", "the dog sat on"]
OTHERS = ["a dog", "the mat", "the bird sat on the mat", "cat", "a bird flew"]
LABELS = [0, 1, 1, 0, 1]
SIZES = {
    "bert": {"model_class": "Bert", "vocab_size": len(WORDS), "type_vocab_size": 2},
    "roberta": {"model_class": "Roberta", "vocab_size": len(WORDS), "type_vocab_size": 1},
    "gpt2": {"model_class": "GPT2", "vocab_size": len(WORDS)},
}


def write_classifier(folder: Path, kind: str, seed: int = 0, **more: Any) -> None:
    """Write a classifier with its head and its tokenizer; in GPT-2's case without padding."""
    import transformers

    name = SIZES[kind]["model_class"]
    sizes: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 24}
        sizes |= {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": None}
    else:
        sizes |= {"intermediate_size": 24, "max_position_embeddings": 24, "pad_token_id": 1}
    given = {key: value for key, value in SIZES[kind].items() if key != "model_class"}
    config = getattr(transformers, f"{name}Config")(**given, **sizes, **more)
    made = getattr(transformers, f"{name}ForSequenceClassification")
    seeded(lambda: made(config), seed).save_pretrained(folder)
    write_tokenizer(folder, kind)


def write_t5(folder: Path, seed: int = 0) -> None:
    """Write an encoder-decoder and its tokenizer, which ends each text."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(WORDS),
        d_model=12,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    seeded(lambda: T5ForConditionalGeneration(config), seed).save_pretrained(folder)
    write_tokenizer(folder, "t5")


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write a tokenizer of words, with the special tokens of a kind of model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    patterns = {
        "bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "t5": ("$A </s>", "$A $B </s>"),
    }
    if kind in patterns:
        single, pair = patterns[kind]
        inner.post_processor = TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    if kind != "gpt2":
        special |= {"pad_token": "<pad>", "model_max_length": 512}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.save_pretrained(folder)


def pool_of(
    task: Task, tokenizer: Any = None, batch_size: int | None = None, **more: Any
) -> TaskPool:
    """Return a pool with one task, ``t``, for models with a tokenizer."""
    loading = None if batch_size is None else {"batch_size": batch_size}
    pool = TaskPool({"t": task}, dataloader_kwargs=loading, cache=False, **more)
    return pool if tokenizer is None else pool.with_tokenizer(tokenizer)


def entropy(logits: torch.Tensor) -> float:
    """Return the mean entropy of predictions, in nats."""
    log_probs = logits.log_softmax(dim=-1)
    return float(-(log_probs.exp() * log_probs).sum(dim=-1).mean().detach())
