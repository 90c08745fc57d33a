"""What a language model makes of prompts, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusion_bench.method.contract import ModelPool, ReadingTexts
from fusion_bench.problems import FusionBenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What stands for a prompt: its last token, or the mean over its tokens.
State = Literal["last", "mean"]


def refuse_without_tokenizer(pool: ModelPool) -> None:
    """Refuse a pool whose prompts could not be read; files tell.

    Raises:
        FusionBenchError: it has no tokenizer.
    """
    if not isinstance(pool, ReadingTexts) or not pool.tokenizer.exists:
        raise FusionBenchError(
            "the pool has no tokenizer, by which prompts are read.",
            "Name one as the pool's 'tokenizer'.",
        )


def tokenizer_of(pool: ModelPool) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a pool's models.

    Raises:
        FusionBenchError: there is none.
    """
    refuse_without_tokenizer(pool)
    assert isinstance(pool, ReadingTexts)
    return pool.tokenizer.tokenizer


def tokens_of(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> Tensor:
    """Return a prompt's tokens, behind the one that begins a text where the tokenizer has one.

    Raises:
        FusionBenchError: there are none.
    """
    begun = f"{tokenizer.bos_token or ''}{prompt}"
    tokens = torch.tensor(
        list(tokenizer(begun, add_special_tokens=False)["input_ids"]), dtype=torch.long
    )
    if not len(tokens):
        raise FusionBenchError(f"the prompt {prompt!r} has no token.", "Write another.")
    return tokens


def layer_states(
    module: nn.Module,
    stack: str,
    prompts: Sequence[Tensor],
    state: State,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the hidden states that enter each layer, summed over prompts.

    Each prompt is read by itself, so that nothing depends on padding.

    Args:
        module: a causal language model, on ``device``.
        stack: the name of its layers, such as ``model.layers``.
        prompts: the tokens of each, 1-d.
        state: which of a prompt's states is taken.
        device: of the computation.

    Returns:
        One row a layer, in float64.
    """
    layers = list(module.get_submodule(stack).children())
    sums: list[Tensor] = []

    def look(index: int, hidden: Tensor) -> None:
        rows = hidden[0].double().cpu()
        own = rows[-1] if state == "last" else rows.mean(dim=0)
        if index == len(sums):
            sums.append(torch.zeros_like(own))
        sums[index] += own

    with _watched(layers, look):
        for tokens in prompts:
            read(module, tokens, device)
    return torch.stack(sums)


def usage(
    module: nn.Module,
    routers: Sequence[str],
    prompts: Sequence[Tensor],
    experts_per_token: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return how often each router chooses each expert.

    Args:
        module: a causal language model with experts, on ``device``.
        routers: the names of its routers, modules with a row of ``weight`` for each expert.
        prompts: the tokens of each, 1-d.
        experts_per_token: how many experts a router chooses for a token.
        device: of the computation.

    Returns:
        Counts over all tokens, a row a router and a column an expert.
    """
    modules: list[Any] = [module.get_submodule(name) for name in routers]
    counts = torch.zeros(len(modules), len(modules[0].weight), dtype=torch.long)

    def look(index: int, hidden: Tensor) -> None:
        weight = modules[index].weight
        logits = hidden.reshape(-1, weight.shape[1]).float() @ weight.float().T
        chosen = logits.topk(experts_per_token, dim=-1).indices.flatten().cpu()
        counts[index] += torch.bincount(chosen, minlength=counts.shape[1])

    with _watched(modules, look):
        for tokens in prompts:
            read(module, tokens, device)
    return counts


def read(module: nn.Module, tokens: Tensor, device: torch.device | str) -> None:
    """Run the model on one prompt, without its head."""
    inner: Any = getattr(module, "base_model", module)
    with torch.inference_mode():
        inner(input_ids=tokens[None].to(device), use_cache=False)


@contextmanager
def _watched(modules: Sequence[nn.Module], look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show ``look`` what each module is given, with the module's number."""
    with ExitStack() as hooks:
        for index, module in enumerate(modules):

            def hook(_: nn.Module, given: Any, named: Any, index: int = index) -> None:
                look(index, given[0] if given else named["hidden_states"])

            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield
