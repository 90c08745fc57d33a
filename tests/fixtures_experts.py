"""Tiny dense models of the families that become experts, and what a mixture of them computes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fixtures_llm import VOCABULARY, seeded, write_tokenizer
from torch import Tensor, nn

from fusion_bench.modelpool import CausalLMPool

WIDTH = 16
#: Sentences of words that the tokenizer knows.
PROMPTS = {
    "a": ["the cat sat on the mat", "a cat and a dog"],
    "b": ["the bird flew"],
    "c": ["a tree", "under the tree"],
}


def write_dense(folder: Path, family: str = "llama", *, seed: int = 0, **more: Any) -> None:
    """Write a dense model of two layers, with a tokenizer; the rest is left to defaults."""
    import transformers

    made = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **more,
    }
    config = getattr(transformers, f"{made}Config")(**sizes)
    seeded(lambda: getattr(transformers, f"{made}ForCausalLM")(config), seed).save_pretrained(
        folder
    )
    write_tokenizer(folder)


def pool(folder: Path, *names: str, **more: Any) -> CausalLMPool:
    """Return a pool of models in a folder, by name; that of ``base`` is the pretrained one."""
    models = {"_pretrained_" if name == "base" else name: str(folder / name) for name in names}
    return CausalLMPool(models, **more)


def loaded(folder: Path) -> Any:
    """Return a saved model in float64, all of whose weights are in its files."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """Return the logits for a text with every token."""
    with torch.no_grad():
        logits: Tensor = model(torch.arange(VOCABULARY)[None]).logits[0]
        return logits


class ByHand(nn.Module):
    """What a mixture does in place of an MLP, token by token.

    Args:
        experts: the dense MLPs.
        rows: the router's, one an expert.
        chosen: how many experts a token has.
        shared: what each token gets besides, times the sigmoid of its product with a row.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        rows: Tensor,
        chosen: int,
        shared: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.experts = list(experts)
        self.rows = rows
        self.chosen = chosen
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the chosen experts, by their shares."""
        result = torch.zeros_like(x)
        for position, token in enumerate(x[0]):
            exps = [float(torch.exp(row @ token)) for row in self.rows]
            best = sorted(range(len(exps)), key=lambda e: -exps[e])[: self.chosen]
            total = sum(exps[e] for e in best)
            for e in best:
                result[0, position] += exps[e] / total * self.experts[e](token[None])[0]
            if self.shared is not None:
                result[0, position] += self.shared(token)
        return result


def begun(tokenizer: Any, prompt: str) -> list[int]:
    """Return a prompt's tokens, behind the one that begins a text."""
    own: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return own if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *own]


def states(model: Any, prompts: Sequence[str], tokenizer: Any, mean: bool = False) -> list[Tensor]:
    """Return the sum over prompts of what enters each layer: at the last token, or in the mean."""
    sums: list[Any] = [0.0] * len(model.model.layers)
    for prompt in prompts:
        tokens = torch.tensor([begun(tokenizer, prompt)])
        with torch.no_grad():
            hidden = model(tokens, output_hidden_states=True).hidden_states
        for layer in range(len(sums)):
            own = hidden[layer][0]
            sums[layer] = sums[layer] + (own.mean(dim=0) if mean else own[-1])
    return sums
