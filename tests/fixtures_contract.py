"""The methods under config/method, each by its YAML, and small models of many kinds to fuse."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from fixtures_clip import vision_config
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method import (
    AdapterMerging,
    ExtractLora,
    Family,
    MergeExperts,
    MixtureOfExperts,
    StackedLayers,
    TensorwiseAlgorithm,
    checks,
)
from fusion_bench.method.checks import Net, Traits
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.weights import TensorWeights, write_checkpoint

CONFIG = Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class Special(Traits):
    """Where a method differs from the rest.

    Attributes:
        options: what its YAML leaves open or does not suit three models, or takes long.
        draws: options with which it draws at random, where the YAML's own do not.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, Any] = field(default_factory=dict)


#: By YAML. Every other method takes three models, in any order.
SPECIAL: dict[str, Special] = {
    "adamerging/layer_wise": Special(options={"max_steps": 3}),
    "adamerging/layer_wise_plusplus": Special(options={"max_steps": 3}),
    "adamerging/task_wise": Special(options={"max_steps": 3}),
    "adamerging/task_wise_plusplus": Special(options={"max_steps": 3}),
    "arcee_fusion": Special(two_ends=True, ordered=True),
    "karcher/karcher": Special(rounds=True),
    "linear/expo": Special(rounds=True),
    "linear/linear_interpolation": Special(two_ends=True, ordered=True),
    "linear/weighted_average": Special(
        options={"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True
    ),
    "model_soup/greedy": Special(ordered=True, rounds=True),
    "model_soup/learned": Special(options={"max_steps": 3}),
    "model_soup/uniform": Special(rounds=True),
    # For a single element the angles' mean may lie where the share of the average is infinite.
    "model_stock/model_stock average=angle": Special(options={"clamp": True}),
    "nearswap": Special(two_ends=True, ordered=True),
    "opcm/opcm": Special(ordered=True, draws={"shuffle_order": True}),
    "opcm/weight_average": Special(rounds=True),
    "passthrough": Special(alone=True, ordered=True),
    "rlhf/salsa": Special(options={"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True),
    "rlhf/warm": Special(rounds=True),
    "rlhf/warp_liti": Special(two_ends=True, ordered=True, rounds=True),
    "rlhf/warp_slerp": Special(ordered=True),
    "simple_average": Special(rounds=True),
    "slerp/multi_slerp": Special(rounds=True),
    "slerp/multi_slerp normalize_weights=False": Special(
        options={"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True
    ),
    "slerp/nuslerp": Special(ordered=True),
    "slerp/slerp": Special(two_ends=True, ordered=True),
    "wudi/wudi": Special(options={"iter_num": 5}),
    "wudi/wudi rest=base": Special(options={"iter_num": 5}, ignores=("conv.weight", "logit_scale")),
}


def special(name: str) -> Special:
    """Return what is special about a method, or else about the one that it is a variant of."""
    return SPECIAL.get(name) or SPECIAL.get(name.split()[0], Special())


@cache
def nodes() -> dict[str, dict[str, Any]]:
    """Return every YAML under config/method, composed; all at once, which is faster."""
    group = CONFIG / "method"
    names = [
        str(path.relative_to(group).with_suffix(""))
        for path in sorted(group.rglob("*.yaml"))
        if not path.name.startswith("_")
    ]
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        every = compose(overrides=[f"+method@n{i}={name}" for i, name in enumerate(names)])
    config: Any = OmegaConf.to_container(every, resolve=True)
    return {name: config[f"n{i}"] for i, name in enumerate(names)}


def method_class(name: str) -> type[Any]:
    """Return the class that a YAML names."""
    return get_class(nodes()[name.split()[0]]["_target_"])


def kind(name: str) -> str | None:
    """Return how a method is tested: as a function of the models' ``weights`` that needs nothing
    else, as one that learns from ``data``, or as one that makes a ``module``. Those of adapters,
    layers and experts have ``tests`` of their own.

    Of any other kind nothing is known here, and so nothing would be tested.
    """
    try:
        own = method_class(name)
    except ImportError:  # a test says so; the others can still be run
        return None
    if issubclass(own, LearningAlgorithm):
        return "data"
    if issubclass(own, TensorwiseAlgorithm):
        return "weights"
    if issubclass(
        own,
        AdapterMerging | ExtractLora | Family | StackedLayers | MixtureOfExperts | MergeExperts,
    ):
        return "tests"
    return "module" if issubclass(own, EnsembleAlgorithm) else None


def takes(name: str, option: str) -> bool:
    """Tell whether a method has an option."""
    return option in inspect.signature(method_class(name)).parameters


def variants(name: str) -> Iterator[str]:
    """Yield, as ``name option=value``, each choice that a YAML does not make."""
    hints = get_type_hints(method_class(name).__init__)
    for option, hint in hints.items():
        own = nodes()[name].get(option)
        if option not in ("return", "show_pbar", "inplace"):
            yield from (f"{name} {option}={choice}" for choice in _choices(hint) if choice != own)


def _choices(hint: Any) -> list[Any]:
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for inner in get_args(hint) for choice in _choices(inner)]


@cache
def method(name: str, **options: Any) -> Any:
    """Return the method that a YAML describes, with a variant's option.

    It is the same one each time, for it must keep nothing of what it has merged.
    """
    yaml_name, *given = name.split()
    variant: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    quiet = {"show_pbar": False} if takes(name, "show_pbar") else {}
    node = {
        "_recursive_": False,
        **nodes()[yaml_name],
        **quiet,
        **special(name).options,
        **variant,
        **options,
    }
    return instantiate(node)


def clip() -> nn.Module:
    """Return a small CLIP vision encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model: nn.Module = CLIPVisionModel(CLIPVisionConfig(**vision_config()))
    return model


def llama() -> nn.Module:
    """Return a small Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {"net": Net, "clip": clip, "llama": llama}
DTYPES = {"net": torch.float32, "clip": torch.float32, "llama": torch.bfloat16}


_drawn = 0


def draw(number: int) -> None:
    """Let what is asked for from now on be the families of this number."""
    global _drawn
    if number != _drawn:
        _drawn = number
        family.cache_clear()


@cache
def family(kind: str, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Return a base and models fine-tuned from it, which nobody may change."""
    return checks.family(FAMILIES[kind], dtype or DTYPES[kind], seed=_drawn)


LAYOUTS: dict[str, Sequence[tuple[bool, int | str]]] = {  # a model: keys in reverse, bytes a file
    "sharded": [(False, 4000)],
    "mixed": [(True, 4000), (False, 1500), (True, "5GB"), (False, 6000)],
}


def write_family(kind: str, layout: str, folder: Path) -> dict[str, str]:
    """Write the models' checkpoints; return name to directory."""
    models = family(kind)
    ways = LAYOUTS[layout]
    for i, (name, model) in enumerate(models.items()):
        backwards, size = ways[i % len(ways)]
        state = model.state_dict()
        keys = list(reversed(state)) if backwards else list(state)
        # Of tied entries a file holds the one that comes first in the model.
        first = TensorWeights(state)
        keys = [key for key in keys if first.tied_to(key) == key]
        (folder / name).mkdir(parents=True)
        config: Any = model.config
        config.save_pretrained(folder / name)
        write_checkpoint(
            TensorWeights({key: state[key] for key in keys}), folder / name, max_shard_size=size
        )
    return {name: str(folder / name) for name in models}


def open_pool(kind: str, directories: Mapping[str, str]) -> HFModelPool:
    """Return a pool of checkpoints."""
    return CausalLMPool(directories) if kind == "llama" else HFModelPool(directories)
