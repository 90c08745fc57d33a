"""How models with experts call their entries, and what their config.json says."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Config, Layers, Weights, learned

LayoutName = Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe"]

#: The parts of a dense MLP: act(gate(x)) times up(x), through down.
PARTS = ("gate_proj", "up_proj", "down_proj")

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_QKV_BIAS = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_O_BIAS = "self_attn.o_proj.bias"
_QK_NORMS = tuple(f"self_attn.{name}_norm.weight" for name in "qk")


@dataclass(frozen=True)
class ExpertLayout:
    """The names that an architecture has for routers and experts inside of a layer.

    Attributes:
        model_type: the architecture.
        architecture: its class for causal models.
        families: the dense architectures that become one.
        block: what stands in place of the MLP.
        names: a part of a dense MLP to its name in an expert.
        count: the number of experts in config.json.
        others: the layer's entries besides the MLP.
        biases: the attention's biases, all of which a layer may have, or none.
        shared: whether a shared expert is part of it.
        dropped: keys of dense models' config.json that have no meaning.
    """

    model_type: str
    architecture: str
    families: tuple[str, ...]
    block: str = "mlp"
    names: Mapping[str, str] = field(default_factory=lambda: {part: part for part in PARTS})
    count: str = "num_experts"
    others: tuple[str, ...] = (*_NORMS, *_ATTENTION)
    biases: tuple[str, ...] = ()
    shared: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def router(self) -> str:
        """The router's rows, one an expert."""
        return f"{self.block}.gate.weight"

    def expert(self, index: int, part: str) -> str:
        """Return the name of an expert's part."""
        return f"{self.block}.experts.{index}.{self.names[part]}.weight"

    def shared_expert(self, part: str) -> str:
        """Return the name of the shared expert's part."""
        return f"{self.block}.shared_expert.{part}.weight"

    @property
    def shared_gate(self) -> str:
        """The row that says how much the shared expert counts."""
        return f"{self.block}.shared_expert_gate.weight"


LAYOUTS = {
    layout.model_type: layout
    for layout in (
        ExpertLayout(
            "mixtral",
            "MixtralForCausalLM",
            ("llama", "mistral"),
            block="block_sparse_moe",
            names={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            count="num_local_experts",
            dropped=("attention_bias", "mlp_bias", "pretraining_tp"),
        ),
        ExpertLayout(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            ("qwen2", "llama", "mistral"),
            biases=_QKV_BIAS,
            shared=True,
            dropped=("attention_bias", "mlp_bias", "pretraining_tp"),
        ),
        ExpertLayout(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ("qwen3",),
            others=(*_NORMS, *_ATTENTION, *_QK_NORMS),
            biases=(*_QKV_BIAS, _O_BIAS),
        ),
    )
}

#: Dense architectures whose MLPs may be experts.
FAMILIES = tuple(dict.fromkeys(family for own in LAYOUTS.values() for family in own.families))


def refuse_family(config: Config) -> None:
    """Refuse a model whose MLPs are no experts.

    Raises:
        FusionBenchError: as said.
    """
    if (family := config.get("model_type")) not in FAMILIES:
        raise FusionBenchError(
            f"it is a '{family}', of which no mixture of experts is made.",
            f"Use models of one of the types: {', '.join(FAMILIES)}.",
        )


def layout_for(config: Config, name: LayoutName, shared: bool) -> ExpertLayout:
    """Return the layout of a mixture on a dense model of a known family.

    Args:
        config: the dense model's config.json.
        name: the layout that is asked for.
        shared: whether there is a shared expert.

    Raises:
        FusionBenchError: the two do not go together.
    """
    family = config["model_type"]
    fitting = [own for own in LAYOUTS.values() if family in own.families]
    named = [own for own in fitting if name in ("auto", own.model_type)]
    if not named:
        raise FusionBenchError(
            f"a '{family}' does not become a '{name}'.",
            f"Choose {{here}}layout={fitting[0].model_type}.",
            place=("layout",),
        )
    for own in named:
        if own.shared or not shared:
            return own
    others = [own.model_type for own in fitting if own.shared]
    remedy = f"choose {{here}}layout={others[0]}." if others else "use other models."
    raise FusionBenchError(
        f"a '{named[0].model_type}' has no shared expert.",
        f"Remove it, or {remedy}",
        place=("shared_expert",),
    )


def refuse_attention(config: Config, layout: ExpertLayout) -> None:
    """Refuse a dense model whose layers attend in a way that the layout does not know.

    Raises:
        FusionBenchError: as said.
    """
    window = config.get("sliding_window", 4096 if config["model_type"] == "mistral" else None)
    if window is None or not config.get("use_sliding_window", "qwen" not in config["model_type"]):
        return
    if layout.model_type == "mixtral" or config["model_type"] == layout.model_type[:5]:
        alike = len(set(config.get("layer_types") or ())) <= 1
        if layout.model_type == "qwen2_moe" or alike:
            return
    raise FusionBenchError(
        f"its attention has a window of {window} tokens, and a '{layout.model_type}' of it would "
        "have it in other layers or not at all.",
        "Use another model or layout.",
    )


def refuse_entries(weights: Weights, layout: ExpertLayout) -> None:
    """Refuse a dense model with entries that have no place in the layout.

    Raises:
        FusionBenchError: it has some; the first is named.
    """
    layers = Layers(weights)
    for key in learned(weights):
        place = layers.place(key)
        if place is None or place.rest.startswith("mlp."):
            continue
        if place.rest not in (*layout.others, *layout.biases):
            raise FusionBenchError(
                f"'{key}' has no place in a '{layout.model_type}'.", "Use another model or layout."
            )


def mlp_of(weights: Weights) -> dict[tuple[str, int], dict[str, str]]:
    """Return for each layer, by stack and number, the keys of its MLP by part.

    Raises:
        FusionBenchError: MLPs of another form, or none.
    """
    layers = Layers(weights)
    found: dict[tuple[str, int], dict[str, str]] = {}
    known = {f"mlp.{part}.weight": part for part in PARTS}
    for key in learned(weights):
        if (place := layers.place(key)) is None or not place.rest.startswith("mlp."):
            continue
        if place.rest not in known:
            raise FusionBenchError(
                f"'{key}' is not part of a dense MLP of {', '.join(PARTS)}.",
                "Use dense models, without biases in their MLPs.",
            )
        found.setdefault((place.stack, place.number), {})[known[place.rest]] = key
    if not found or any(len(parts) < len(PARTS) for parts in found.values()):
        raise FusionBenchError(
            f"it has no MLP of {', '.join(PARTS)} in each layer.", "Use dense models."
        )
    return found


def config_for(dense: Config, layout: ExpertLayout, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a mixture.

    What the dense model's config leaves to the defaults of its class is written where the mixture's
    class has another default.

    Args:
        dense: the dense model's config.json.
        layout: the mixture's layout.
        own: what the mixture's config says itself.
    """
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[dense["model_type"]].from_dict(dict(dense))
    default = CONFIG_MAPPING[layout.model_type]()
    unused = {*layout.dropped, "auto_map", "_name_or_path", "transformers_version"}
    config = {key: value for key, value in dense.items() if key not in unused}
    rope = dict(made.rope_parameters)
    if "rope_parameters" in config:
        config["rope_parameters"] = rope
    else:
        config.setdefault("rope_theta", rope["rope_theta"])
    for key, value in made.to_dict().items():
        if key in config or key in unused or key == "rope_parameters":
            continue
        if getattr(default, key, value) != value:
            config[key] = value
    return {
        **config,
        **own,
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
    }


def has_biases(keys: Collection[str], layout: ExpertLayout) -> bool:
    """Return whether a dense model's attention has the biases that the layout may have."""
    return any(key.endswith(layout.biases) for key in keys) if layout.biases else False
