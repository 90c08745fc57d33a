"""What transformers would build by a config, told without memory for a weight."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_bench.modelpool.agreement import enormous
from fusion_bench.modelpool.build import config_of, part_for, skeleton
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Config, Layers, TensorSpec, TensorWeights, Weights
from fusion_bench.weights.blueprint import Blueprint
from fusion_bench.weights.config import plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def blueprint(
    config: Config,
    model_class: str,
    config_class: str,
    part_of: "Callable[[PretrainedConfig | None], PretrainedConfig | None]",
    canonical: Callable[[Weights], Weights],
) -> Blueprint | None:
    """Return what a class of transformers builds by a config.

    Args:
        config: of a model.
        model_class: of transformers.
        config_class: what reads the config.
        part_of: takes the part that the module is built by.
        canonical: gives entries the keys that they are wanted under.

    Returns:
        ``None`` for an architecture that transformers does not know, and where the config has more
        layers than a model can have.

    Raises:
        FusionBenchError: a config that its class refuses.
    """
    if enormous(config):
        return None
    try:
        whole = config_of(config, config_class)
    except FusionBenchError:
        return None
    except Exception as error:  # each class fails in its own way over what somebody wrote
        raise _unbuildable(config, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old names, which the config's owner has seen
            module = skeleton(model_class, part_of(whole) or whole)
    except FusionBenchError:
        raise
    except Exception as error:
        raise _unbuildable(config, error) from error
    tensors = module.state_dict(keep_vars=True)
    order = _in_order_of_use(module, list(tensors))
    named = canonical(TensorWeights({key: torch.empty(0) for key in order}))
    first: dict[int, str] = {}
    entries, tied = {}, {}
    for key in named:
        (origin,) = named.origins(key)
        tensor = tensors[origin.key]
        entries[key] = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if (known := first.setdefault(id(tensor), key)) != key:
            tied[key] = known
    stated = part_for(config, config_class)
    return Blueprint(plain(whole.to_dict()), stated, entries, tied)


def _unbuildable(config: Config, error: Exception) -> FusionBenchError:
    """Return the problem of a config that its class refuses."""
    said = " ".join(str(error).split())[:300]
    return FusionBenchError(
        f"transformers cannot build a '{config.get('model_type')}' by this config: {said}"
    )


def _in_order_of_use(module: "PreTrainedModel", keys: Sequence[str]) -> list[str]:
    """Return a module's keys in the order in which it comes to them.

    Some modules are defined in another order than they are used in: a norm behind the layers is
    defined in front of them. So the module computes something, as far as that can be done without
    numbers. What it does not come to stays behind the rest.
    """
    layers = Layers(keys)
    inside = _answer_like_the_first(module, layers)
    used: dict[str, int] = {}

    def notice(name: str, module: nn.Module, args: object) -> None:
        used.setdefault(name, len(used))

    for name, part in module.named_modules():
        part.register_forward_pre_hook(partial(notice, name))
    with torch.no_grad(), torch.device("meta"), suppress(Exception):
        module.set_attn_implementation("eager")  # which looks at no number of a mask
        module(**_inputs(module))

    def turn(key: str) -> tuple[int, int]:
        layer, like = inside.get(key, (key.rpartition(".")[0], key))
        own = used.get(like.rpartition(".")[0], len(used))
        return (used[layer], own) if layer in used else (len(used), 0)

    came_to = any(layers.place(key) and turn(key)[0] < len(used) for key in keys)
    return sorted(keys, key=turn) if came_to else list(keys)


def _answer_like_the_first(module: nn.Module, layers: Layers) -> dict[str, tuple[str, str]]:
    """Let the first layer compute for those that have its class and shapes, to be quick.

    Returns:
        For each entry of these layers, its layer and the first layer's entry of the same place.
    """
    inside: dict[str, tuple[str, str]] = {}
    for stack, (first, *others) in layers.stacks.items():
        one = module.get_submodule(f"{stack}.{first}")
        form = {key: tensor.shape for key, tensor in one.state_dict().items()}
        answers: list[object] = []
        for number in (first, *others):
            name = f"{stack}.{number}"
            other = module.get_submodule(name)
            shapes = {key: tensor.shape for key, tensor in other.state_dict().items()}
            if type(other) is not type(one) or shapes != form:
                continue
            inside |= {f"{name}.{key}": (name, f"{stack}.{first}.{key}") for key in form}
            if other is not one:
                other.forward = partial(_answer, answers)
        one.register_forward_hook(lambda *call, answers=answers: answers.append(call[-1]))
    return inside


def _answer(answers: list[object], *args: object, **kwargs: object) -> object:
    return answers[-1]


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
