"""What transformers would build by a config, told without memory for a weight."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_bench.modelpool.build import class_named
from fusion_bench.pretrained import from_config
from fusion_bench.weights import Layers, TensorSpec
from fusion_bench.weights.blueprint import Blueprint
from fusion_bench.weights.config import plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def blueprint(model_class: str, config: "PretrainedConfig", whole: "PretrainedConfig") -> Blueprint:
    """Return what a class of transformers builds by a config.

    Args:
        model_class: of transformers.
        config: what a module is built by.
        whole: what it is a part of, or the same.
    """
    module = _on_meta(model_class, config)
    first: dict[int, str] = {}
    entries, tied = {}, {}
    tensors = module.state_dict(keep_vars=True)
    for key in _in_order_of_use(module, list(tensors)):
        tensor = tensors[key]
        entries[key] = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if (known := first.setdefault(id(tensor), key)) != key:
            tied[key] = known
    return Blueprint(plain(whole.to_dict()), entries, tied)


def _on_meta(model_class: str, config: "PretrainedConfig") -> "PreTrainedModel":
    made = class_named(model_class)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names, which the config's owner has seen
        if hasattr(made, "from_config"):  # an AutoModel…
            module: PreTrainedModel = from_config(made, config)
        else:
            module = made(config)
    return module


def _in_order_of_use(module: "PreTrainedModel", keys: Sequence[str]) -> list[str]:
    """Return a module's keys in the order in which it comes to them.

    Some modules are defined in another order than they are used in: a norm behind the layers is
    defined in front of them. So the module computes something, as far as that can be done without
    numbers. What it does not come to stays behind the rest.
    """
    used: dict[str, int] = {}

    def notice(name: str, module: nn.Module, args: object) -> None:
        used.setdefault(name, len(used))

    for name, part in module.named_modules():
        part.register_forward_pre_hook(partial(notice, name))
    with torch.no_grad(), torch.device("meta"), suppress(Exception):
        module.set_attn_implementation("eager")  # which looks at no number of a mask
        module(**_inputs(module))
    layers = Layers(keys)
    owners = {key: key.rpartition(".")[0] for key in keys}
    if not any(layers.place(key) and owners[key] in used for key in keys):
        return list(keys)
    return sorted(keys, key=lambda key: used.get(owners[key], len(used)))


def _inputs(module: "PreTrainedModel") -> dict[str, Tensor]:
    """Return inputs of shapes that suit a model."""
    taken, sizes = signature(module.forward).parameters, module.config.to_dict()
    sizes |= sizes.get("vision_config") or {}
    side = sizes.get("image_size") or 224
    height, width = (side, side) if isinstance(side, int) else side
    frames = 2 * (sizes.get("max_source_positions") or 1500)
    offered = {
        "input_ids": torch.zeros(1, 2, dtype=torch.long),
        "decoder_input_ids": torch.zeros(1, 2, dtype=torch.long),
        "pixel_values": torch.zeros(1, sizes.get("num_channels") or 3, height, width),
        "input_features": torch.zeros(1, sizes.get("num_mel_bins") or 80, frames),
    }
    return {name: value for name, value in offered.items() if name in taken}
