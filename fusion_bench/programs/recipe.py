"""What a run was made of, as plain data: enough to make it again, where that is possible."""

from collections.abc import Mapping
from importlib import import_module
from os import PathLike, fspath

from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import nn

from fusion_bench.arguments import arguments_of
from fusion_bench.method.contract import FusionMethod
from fusion_bench.method.family import Family
from fusion_bench.method.plain import PlainMethod
from fusion_bench.weights import MergePolicy, TensorWeights, sha256


def recorded(value: object) -> object:
    """Return a value of a run's config as plain data.

    An object whose arguments are known becomes the config node that makes it again. A module in
    memory has no name to find it by: its class and the hash of its weights are recorded. Of any
    other object only the class is.
    """
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): recorded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [recorded(inner) for inner in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, PlainMethod):
        return recorded(value.method)
    if isinstance(value, MergePolicy):
        return {name: getattr(value, name) for name in MergePolicy.options()}
    if isinstance(value, Fabric):
        return _fabric(value)
    if isinstance(value, nn.Module):
        digest = sha256(TensorWeights(value.state_dict()))
        return f"{_class(value)} in memory, sha256 {digest}"
    given, target = arguments_of(value), _target(type(value))
    if given is None or target is None:
        return _class(value)
    return {"_target_": target, **{name: recorded(inner) for name, inner in given.items()}}


def config_of(
    name: str, method: FusionMethod, config: Mapping[str, object]
) -> Mapping[str, object]:
    """Return a run's config for the recipe of one of its models: of a family its own method."""
    if not isinstance(method, Family):
        return config
    return {**config, "method": recorded(method.member_of(name).method)}


def _fabric(fabric: Fabric) -> dict[str, object]:
    """Return the arguments for the devices and the precision that Fabric has settled on."""
    return {
        "_target_": "lightning.Fabric",
        "accelerator": fabric.device.type,
        "devices": fabric.world_size,
        "precision": str(fabric.strategy.precision.precision),
    }


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _target(own: type) -> str | None:
    """Return the name by which a config calls a class; ``None`` for one of ours that none may."""
    package, _, _ = own.__module__.partition(".")
    if package != "fusion_bench":
        return f"{own.__module__}.{own.__qualname__}"
    room = ".".join(own.__module__.split(".")[:2])
    public = getattr(import_module(room), own.__name__, None) is own
    return f"{room}.{own.__name__}" if public else None
