"""What transformers would build by a config, told without memory for a weight."""

import warnings
from typing import TYPE_CHECKING

import torch

from fusion_bench.modelpool.build import class_named
from fusion_bench.pretrained import from_config
from fusion_bench.weights import TensorSpec
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
    for key, tensor in module.state_dict(keep_vars=True).items():
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
