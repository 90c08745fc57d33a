"""Untrained models of each kind; they draw from torch's global generator."""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fusion_bench.zoo.language.recipe import LanguageRecipe
from fusion_bench.zoo.language.tokenizer import MAX_LENGTH, MAX_WORDS

if TYPE_CHECKING:
    from transformers import (
        BertForPreTraining,
        LlamaForCausalLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        T5ForConditionalGeneration,
    )

_HEADS = 4


def new_llama(tokens: "PreTrainedTokenizerBase", recipe: LanguageRecipe) -> "LlamaForCausalLM":
    """Return an untrained causal model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_vocabulary(tokens),
        hidden_size=recipe.width,
        intermediate_size=5 * recipe.width // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=recipe.tied,
    )
    model = LlamaForCausalLM(config)
    _spread(model)
    if not recipe.tied:
        nn.init.zeros_(model.lm_head.weight)
    return model


def new_t5(
    tokens: "PreTrainedTokenizerBase", recipe: LanguageRecipe
) -> "T5ForConditionalGeneration":
    """Return an untrained encoder with a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **_vocabulary(tokens),
        d_model=recipe.width,
        d_kv=recipe.width // _HEADS,
        d_ff=4 * recipe.width // 3,
        num_layers=recipe.layers,
        num_heads=_HEADS,
        n_positions=MAX_LENGTH,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=tokens.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def new_bert(tokens: "PreTrainedTokenizerBase", recipe: LanguageRecipe) -> "BertForPreTraining":
    """Return an untrained encoder with a head that fills in masked words."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=len(tokens),
        pad_token_id=tokens.pad_token_id,
        hidden_size=recipe.width,
        intermediate_size=5 * recipe.width // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=MAX_WORDS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config)
    _spread(model)
    return model


def matrices(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Return the weights of the layers by name: those that Muon is made for."""
    outputs = model.get_output_embeddings()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not outputs
    }


def _spread(model: "PreTrainedModel") -> None:
    """Draw the matrices anew; their own spread is meant for long training."""
    for weight in matrices(model).values():
        nn.init.normal_(weight, std=0.7 / math.sqrt(weight.shape[1]))


def _vocabulary(tokens: "PreTrainedTokenizerBase") -> dict[str, int | None]:
    return {
        "vocab_size": len(tokens),
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
