"""Tiny models of several families, and adapters that PEFT itself writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40
IDS = torch.arange(3, 17).view(2, 7)
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GPT2 = {**_SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_T5 = {**_SMALL, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
_BERT = {**_LLAMA, "max_position_embeddings": 32}
_VIT = {
    **_LLAMA,
    "image_size": 8,
    "patch_size": 4,
}
#: A class of transformers and its config, by a name of our own.
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "attention_bias": True}),
    "bert": ("BertForSequenceClassification", "BertConfig", _BERT),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, "num_key_value_heads": 2, "num_local_experts": 3},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", _VIT),
}


def made(family: str, seed: int = 0) -> nn.Module:
    """Return a model of a family, in eval mode."""
    import transformers

    name, config, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def read(family: str, folder: Path) -> nn.Module:
    """Return the model in a folder."""
    import transformers

    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder).eval()


def write_pair(
    family: str, root: Path, changes: Callable[[str], bool] = lambda name: True
) -> tuple[Path, Path]:
    """Write a model and one in which the parameters that are to change have changed."""
    model = made(family)
    model.save_pretrained(root / "base")
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            step = 0.05 * torch.randn(parameter.shape, generator=noise)
            parameter += step if changes(name) else 0
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned"


def outputs(model: nn.Module) -> Tensor:
    """Return what a model answers, on samples of its kind."""
    kind = type(getattr(model, "base_model", model)).__name__ + str(getattr(model, "config", ""))
    with torch.no_grad():
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        if '"model_type": "vit"' in kind:
            return model(pixel_values=pixels).logits
        if "clip_vision_model" in kind:
            return model(pixel_values=pixels).pooler_output
        more = {"decoder_input_ids": IDS} if '"model_type": "t5"' in kind else {}
        return model(input_ids=IDS, **more).logits


def write_adapter(
    folder: Path, base: nn.Module, *, seed: int = 0, **settings: Any
) -> Mapping[str, Tensor]:
    """Let PEFT write a LoRA adapter with random factors; return its tensors."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
