r"""Mixture of experts: the MLPs of dense models side by side, behind a router.

In each layer $y = \sum_{e \in \text{top-}k} p_e\, E_e(x)$ with $p = \text{softmax}(W x)$, scaled so
that the chosen $p_e$ sum to 1. The row of $W$ for an expert is the unit vector of the hidden states
of its prompts. Of one model with copies of its MLP, this is sparse upcycling.
Komatsuzaki et al., Sparse Upcycling, https://arxiv.org/abs/2212.05055
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fusion_bench.method.base import run
from fusion_bench.method.contract import Data, ModelPool, Needs, Ran
from fusion_bench.method.expert_layouts import (
    PARTS,
    LayoutName,
    config_for,
    has_biases,
    layout_for,
    mlp_of,
    refuse_attention,
    refuse_entries,
    refuse_family,
)
from fusion_bench.method.expert_nodes import (
    Expert,
    ExpertNode,
    experts_of,
    read_expert,
    refuse_unknown,
)
from fusion_bench.method.expert_router import Router, Rows
from fusion_bench.method.pools import base_of, located
from fusion_bench.method.prompts import State, refuse_without_tokenizer
from fusion_bench.problems import FusionBenchError, check_between, check_choice, within
from fusion_bench.weights import (
    Config,
    Model,
    Stacked,
    TensorWeights,
    Weights,
    changed,
)
from fusion_bench.weights.draws import normal

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Gate = Literal["hidden", "embedding", "random", "zero"]

#: The keys of a model's MLPs by layer, its stack and number, and by part.
_Keys = dict[tuple[str, int], dict[str, str]]
#: How wide a shared expert is that adds nothing; machines like multiples of it.
_NARROW = 8


@dataclass(eq=False)
class MixtureOfExperts:
    """A model whose layers choose among the MLPs of several dense models.

    The pretrained model, or else the first, gives everything but the MLPs, and the tokenizer.

    Args:
        experts: the models whose MLPs become experts, in order; by default all. An item is a name
            in the pool, or a mapping with ``model``, ``positive_prompts``, ``negative_prompts``,
            ``noise`` and ``scale``, a factor on the last of the MLP's projections.
        num_experts: of a single model, how many copies of its MLP there are.
        shared_expert: the one that reads every token, given like the others; for ``qwen2_moe``.
        gate: what the router's rows are. ``hidden``: the hidden states of the prompts that enter
            the layer; ``embedding``: the embeddings of the prompts' tokens, alike in all layers;
            ``random``; ``zero``, by which the first experts are chosen.
        state: with ``hidden``, take a prompt's ``last`` token, or the ``mean`` over its tokens.
        experts_per_token: how many experts read a token.
        noise: the standard deviation of what is added to the experts' weights.
        layout: the architecture; ``auto`` takes the base's relative.
        seed: the random seed.
    """

    needs_pretrained = False

    experts: Sequence[ExpertNode] | None = None
    num_experts: int | None = None
    shared_expert: ExpertNode | None = None
    gate: Gate = "hidden"
    state: State = "last"
    experts_per_token: int = 2
    noise: float = 0.0
    layout: LayoutName = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, Gate)
        check_choice("state", self.state, State)
        check_choice("layout", self.layout, LayoutName)
        check_between("noise", self.noise, 0, math.inf)
        for name in ("num_experts", "experts_per_token"):
            count = vars(self)[name]
            if count is not None and (type(count) is not int or count < 1):
                raise FusionBenchError(f"{count!r} is not a number of experts.", place=(name,))
        experts_of(self.experts, [""], None)
        self._shared = None
        if self.shared_expert is not None:
            with within("shared_expert"):
                self._shared = read_expert(self.shared_expert)

    @property
    def needs(self) -> Needs:
        """Nothing; models need to be alike in their MLPs only."""
        return Needs(weights=False)

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models whose MLPs are not alike, and prompts that are missing or cannot be read.

        Raises:
            FusionBenchError: as said.
        """
        experts = experts_of(self.experts, pool.model_names, self.num_experts)
        self._check_names(pool, experts)
        base = base_of(pool)
        if not pool.weights(base):
            return  # nothing but the names is known
        if self._reads_prompts:
            with located(pool):
                refuse_without_tokenizer(pool)
        with located(pool, base):
            refuse_family(_config(pool))
        layout = layout_for(_config(pool), self.layout, self._shared is not None)
        with located(pool, base):
            refuse_attention(_config(pool), layout)
            refuse_entries(pool.weights(base), layout)
        _check_shapes(pool, experts, self._shared)

    def _check_names(self, pool: ModelPool, experts: Sequence[Expert]) -> None:
        """Refuse experts that the pool does not have, and that the router cannot choose."""
        if not pool.model_names:
            raise FusionBenchError("There is nothing to merge: the pool has no model.")
        known = dict.fromkeys([base_of(pool), *pool.model_names])
        for index, expert in enumerate(experts):
            with within("experts", index):
                refuse_unknown(expert, known)
            if self._reads_prompts and not expert.positive:
                raise FusionBenchError(
                    f"the expert '{expert.model}' has no positive_prompts, by which it is chosen.",
                    "Give some, or choose {here}gate=random.",
                    place=("experts",),
                )
        if self._shared is not None:
            with within("shared_expert"):
                refuse_unknown(self._shared, known)
        if self.experts_per_token > len(experts):
            raise FusionBenchError(
                f"{self.experts_per_token} experts a token, and there are {len(experts)}.",
                "Choose fewer, or name more experts.",
                place=("experts_per_token",),
            )

    @property
    def _reads_prompts(self) -> bool:
        return self.gate in ("hidden", "embedding")

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Model:
        """Return the mixture, whose experts are read from the models when it is read.

        Args:
            pool: the models.
            fabric: on whose device the base reads the prompts.
            data: ignored.

        Raises:
            FusionBenchError: as ``check_pool``, and prompts that cancel each other.
        """
        device = torch.device("cpu") if fabric is None else fabric.device
        mixture = self._mixture(pool)
        return mixture.model(mixture.rows(device))

    def outline(self, pool: ModelPool) -> Model:
        """Return the mixture with a router whose values are not known.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        mixture = self._mixture(pool)
        return mixture.model(mixture.unknown_rows())

    def _mixture(self, pool: ModelPool) -> "_Mixture":
        self.check_pool(pool)
        experts = experts_of(self.experts, pool.model_names, self.num_experts)
        return _Mixture(self, pool, experts, self._shared)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Make a mixture of a pool's models, or of a dict's modules a state dict."""
        return run(self, modelpool, fabric, data)


def _config(pool: ModelPool) -> Config:
    """Return the base's config.json.

    Raises:
        FusionBenchError: it has none.
    """
    config = pool.model(base_of(pool)).config
    if config is None:
        raise FusionBenchError(
            "it has no config.json, from which the mixture's is made.", "Put it beside the weights."
        )
    return config


def _check_shapes(pool: ModelPool, experts: Sequence[Expert], shared: Expert | None) -> None:
    """Refuse experts whose MLPs do not fit into the base's layers, or beside each other."""
    base, shapes = base_of(pool), dict[str, tuple[int, int]]()
    with located(pool, base):
        layers = mlp_of(pool.weights(base))
    width = pool.weights(base).spec(next(iter(layers.values()))["gate_proj"]).shape[1]
    for expert in [*experts, *([] if shared is None else [shared])]:
        with located(pool, expert.model):
            model = pool.model(expert.model)
            config = model.config or _config(pool)
            refuse_family(config)
            act, expected = (own.get("hidden_act", "silu") for own in (config, _config(pool)))
            if act != expected:
                raise FusionBenchError(
                    f"its activation is {act}, that of '{base}' {expected}.", "Use another model."
                )
            own = mlp_of(model.weights)
            if own.keys() != layers.keys():
                raise FusionBenchError(
                    f"it has {len(own)} layers, '{base}' has {len(layers)}.",
                    "Use models of one depth.",
                )
            for part, key in ((part, key) for parts in own.values() for part, key in parts.items()):
                shape = model.weights.spec(key).shape
                inner = shape[part == "down_proj"]
                wanted = (width, inner) if part == "down_proj" else (inner, width)
                if expert is not shared:
                    wanted = shapes.setdefault(part, wanted)
                if shape != wanted:
                    beside = base if width not in shape else experts[0].model
                    raise FusionBenchError(
                        f"'{key}' is {list(shape)}, and beside '{beside}' it has to be "
                        f"{list(wanted)}.",
                        "Use models of one size.",
                    )


class _Mixture:
    """A mixture of models that were checked."""

    def __init__(
        self,
        method: MixtureOfExperts,
        pool: ModelPool,
        experts: Sequence[Expert],
        shared: Expert | None,
    ):
        self._method = method
        self._pool = pool
        self._experts = experts
        self._shared = shared
        self._base = pool.model(base_of(pool))
        self._config = _config(pool)
        self._layout = layout_for(self._config, method.layout, shared is not None)
        self._layers = mlp_of(self._base.weights)
        spec = self._base.weights.spec(next(iter(self._layers.values()))["gate_proj"])
        self._width = spec.shape[1]
        self._dtype = pool.policy.torch_dtype or spec.dtype

    def model(self, rows: Rows) -> Model:
        """Return the mixture with these rows in its routers."""
        kept = changed(base_of(self._pool), self._base.weights, self._pool.policy)
        mlp = {key: layer for layer, parts in self._layers.items() for key in parts.values()}
        blocks = self._blocks(TensorWeights(self._routers(rows)))
        parts: dict[str, tuple[Weights, str]] = {}
        for key in kept:
            if key not in mlp:
                parts[key] = kept, key
            else:  # the experts stand where the MLP stood
                parts |= blocks.pop(mlp[key], {})
        return replace(self._base, weights=Stacked(parts), config=self._mixture_config())

    def _blocks(self, routers: Weights) -> dict[tuple[str, int], dict[str, tuple[Weights, str]]]:
        """Return for each layer what stands in place of its MLP."""
        layout, found = self._layout, dict[tuple[str, int], dict[str, tuple[Weights, str]]]()
        experts = [self._expert(index, own) for index, own in enumerate(self._experts)]
        shared = None if self._shared is None else self._expert(-1, self._shared)
        for layer in self._layers:
            prefix = f"{layer[0]}.{layer[1]}."
            own = found[layer] = {}
            for name in (layout.router, *([layout.shared_gate] if layout.shared else [])):
                own[prefix + name] = routers, prefix + name
            for part in PARTS:
                for index, (weights, keys) in enumerate(experts):
                    own[prefix + layout.expert(index, part)] = weights, keys[layer][part]
                if layout.shared:
                    name = prefix + layout.shared_expert(part)
                    own[name] = (shared[0], shared[1][layer][part]) if shared else (routers, name)
        return found

    def _expert(self, index: int, expert: Expert) -> tuple[Weights, _Keys]:
        """Return an expert's weights, with the keys of its MLPs."""
        weights, method = self._pool.weights(expert.model), self._method
        keys = mlp_of(weights)
        noise = method.noise if expert.noise is None else expert.noise
        factors = {parts["down_proj"]: expert.scale for parts in keys.values()}
        named = {key for parts in keys.values() for key in parts.values()}
        if noise == 0 and expert.scale == 1:
            return changed(expert.model, weights, self._pool.policy), keys

        def change(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            (own,) = tensors
            if noise and key in named:
                drawn = normal(own.numel(), (method.seed, "expert", index, key), start)
                own = own + noise * torch.from_numpy(drawn).to(own)
            return own * factors.get(key, 1.0)

        return changed(expert.model, weights, self._pool.policy, change), keys

    def _routers(self, rows: Rows) -> dict[str, Tensor]:
        """Return what no model has: routers, and a shared expert that adds nothing."""
        layout, found = self._layout, dict[str, Tensor]()
        for layer in self._layers:
            prefix = f"{layer[0]}.{layer[1]}."
            own = rows[layer].to(self._dtype)
            found[prefix + layout.router] = own[: len(self._experts)].clone()
            if layout.shared:
                found[prefix + layout.shared_gate] = own[len(self._experts) :].clone()
            if layout.shared and self._shared is None:
                for part in PARTS:
                    empty = torch.zeros(_NARROW, self._width, dtype=self._dtype)
                    name = prefix + layout.shared_expert(part)
                    found[name] = empty.T.contiguous() if part == "down_proj" else empty
        return found

    def unknown_rows(self) -> Rows:
        """Return rows without values."""
        empty = torch.empty(len(self._experts) + 1, self._width, device="meta")
        return dict.fromkeys(self._layers, empty)

    def rows(self, device: torch.device) -> Rows:
        """Return each layer's rows: one an expert, and one for the shared expert."""
        method, router = self._method, Router(self._pool, self._base, self._layers, self._width)
        everybody = [*self._experts, self._shared or Expert("")]
        if method.gate == "zero":
            return {layer: torch.zeros(len(everybody), self._width) for layer in self._layers}
        if method.gate == "random":
            spread = float(self._config.get("initializer_range", 0.02))
            return router.random(len(everybody), spread, method.seed)
        if method.gate == "embedding":
            return router.of_prompts(everybody, router.embedded)
        return router.of_prompts(everybody, router.hidden(method.state, device))

    def _mixture_config(self) -> dict[str, object]:
        """Return the mixture's config.json."""
        layout = self._layout
        first = next(iter(self._layers))
        widths = []
        for expert in (self._experts[0], self._shared):
            if expert is not None:
                weights = self._pool.weights(expert.model)
                widths.append(weights.spec(mlp_of(weights)[first]["gate_proj"]).shape[0])
        own: dict[str, object] = {
            layout.count: len(self._experts),
            "num_experts_per_tok": self._method.experts_per_token,
        }
        if layout.model_type == "mixtral":
            return config_for(self._config, layout, {**own, "intermediate_size": widths[0]})
        own |= {
            "moe_intermediate_size": widths[0],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if layout.shared:
            own["shared_expert_intermediate_size"] = widths[1] if self._shared else _NARROW
            own["qkv_bias"] = has_biases(self._base.weights, layout)
        return config_for(self._config, layout, own)
