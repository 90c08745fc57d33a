"""The rows by which a mixture's router chooses experts."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fusion_bench.method.contract import ModelPool
from fusion_bench.method.expert_nodes import Expert
from fusion_bench.method.pools import base_of
from fusion_bench.method.prompts import State, layer_states, tokenizer_of, tokens_of
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Model
from fusion_bench.weights.draws import normal

#: A layer: its stack, and its number there.
Layer = tuple[str, int]
#: Rows of each layer, all of one width.
Rows = Mapping[Layer, Tensor]
#: From prompts to one row a layer, in the layers' order.
States = Callable[[Sequence[str]], Tensor]

#: A norm below it is rounding.
_TINY = 1e-8


class Router:
    """Makes the routers of a mixture.

    Args:
        pool: the models.
        base: the one that reads the prompts.
        layers: those that get a router.
        width: the number of a row's elements.
    """

    def __init__(self, pool: ModelPool, base: Model, layers: Iterable[Layer], width: int):
        self._pool = pool
        self._base = base
        self._layers = sorted(layers)
        self._width = width

    def random(self, count: int, spread: float, seed: int | None) -> Rows:
        """Return ``count`` rows a layer of normal draws with the standard deviation ``spread``."""
        found = {}
        for layer in self._layers:
            drawn = normal(count * self._width, (seed, "router", *layer))
            found[layer] = spread * torch.from_numpy(drawn).view(count, self._width)
        return found

    def of_prompts(self, experts: Sequence[Expert], states: States) -> Rows:
        """Return each expert's row: a unit vector, or zero where it has no prompts.

        Raises:
            FusionBenchError: an expert's positive and negative prompts cancel.
        """
        vectors = torch.stack([self._row(expert, states) for expert in experts], dim=1)
        return dict(zip(self._layers, vectors, strict=True))

    def _row(self, expert: Expert, states: States) -> Tensor:
        if not expert.positive:
            return torch.zeros(len(self._layers), self._width, dtype=torch.float64)
        rows = states(expert.positive)
        if expert.negative:
            rows = rows - states(expert.negative)
        norms = rows.norm(dim=1, keepdim=True)
        if norms.min() < _TINY:
            raise FusionBenchError(
                f"the positive and negative prompts of '{expert.model}' cancel.",
                "Write others.",
                place=("experts",),
            )
        return rows / norms

    def hidden(self, state: State, device: torch.device) -> States:
        """Return the function from prompts to the sums of the states that enter the layers."""
        module = self._pool.load_model(base_of(self._pool)).to(device)
        stack, _ = self._layers[0]
        return lambda prompts: layer_states(module, stack, self._tokens(prompts), state, device)

    def embedded(self, prompts: Sequence[str]) -> Tensor:
        """Return the sum of the embeddings of all tokens, for every layer."""
        weights, width = self._base.weights, self._width
        key = next(key for key in weights if key.endswith("embed_tokens.weight"))
        total = torch.zeros(width, dtype=torch.float64)
        for tokens in self._tokens(prompts):
            for token in tokens.tolist():
                total += weights.read(key, token * width, (token + 1) * width).double()
        return total.expand(len(self._layers), width)

    def _tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        tokenizer = tokenizer_of(self._pool)
        return [tokens_of(tokenizer, prompt) for prompt in prompts]
