"""Modules that transformers makes: of weights and a config, or of a whole folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_bench.pretrained import from_config, from_pretrained
from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.repository import Repository
from fusion_bench.sealed import remembered
from fusion_bench.sources import reading
from fusion_bench.trust import trusts_remote_code
from fusion_bench.weights import Config, Weights, in_memory, shortened, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def class_named(name: str) -> Any:
    """Return a class of transformers.

    Raises:
        FusionBenchError: there is none of that name; the place is the key ``model_class``.
    """
    import transformers

    try:
        return getattr(transformers, name)
    except AttributeError as error:
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise FusionBenchError(
            f"transformers has no '{name}'.", did_you_mean(name, known), place=("model_class",)
        ) from error


def check_class(name: str, *, keeps: bool) -> None:
    """Refuse a class that transformers does not have; it is imported to look only once.

    Args:
        name: of the class.
        keeps: whether what was seen is kept for the next run.

    Raises:
        FusionBenchError: as ``class_named``.
    """

    def look() -> str:
        class_named(name)
        return ""

    remembered("facts", ["class", version("transformers"), name], look, keeps=keeps)


def config_of(content: Config, config_class: str) -> "PretrainedConfig":
    """Return what a class of transformers makes of a ``config.json``.

    Raises:
        FusionBenchError: a ``model_type`` that transformers does not know.
    """
    import transformers

    made = getattr(transformers, config_class)
    if made is transformers.AutoConfig:
        kind = str(content.get("model_type"))
        if kind not in transformers.CONFIG_MAPPING:
            raise FusionBenchError(f"transformers knows no model of the type '{kind}'.")
        made = transformers.CONFIG_MAPPING[kind]
    config: PretrainedConfig = made.from_dict(dict(part_for(content, config_class)))
    return config


def part_for(content: Config, config_class: str) -> Config:
    """Return the part of a ``config.json`` that a class reads: of CLIP's that of its encoder."""
    import transformers

    key = getattr(getattr(transformers, config_class), "base_config_key", "")
    part = content.get(key)
    return part if isinstance(part, Mapping) else content


def build(
    model_class: str, weights: Mapping[str, Tensor], config: "PretrainedConfig | None"
) -> "PreTrainedModel":
    """Return a module with these weights, which are taken over as they are; in eval mode.

    Args:
        model_class: of transformers.
        weights: under the keys that the module has.
        config: what it is built by.

    Raises:
        FusionBenchError: weights that are not all of the model's, or no such class.
    """
    tensors = in_memory(weights) if isinstance(weights, Weights) else dict(weights)
    floating = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
    made = _concrete(class_named(model_class), config)
    options = {}
    if "add_pooling_layer" in signature(made).parameters:
        options["add_pooling_layer"] = any(key.startswith("pooler.") for key in tensors)
    model, info = made.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=floating[0] if floating else None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=trusts_remote_code(),
        **options,
    )
    refuse_incomplete("The merged model", info)
    built: PreTrainedModel = model.eval()
    return built


def read_whole(
    model_class: str, repository: Repository
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Return the module that a folder holds, in eval mode, and what was missing.

    Raises:
        FusionBenchError: it cannot be read, or no such class.
    """
    made = class_named(model_class)
    names = ["config.json", *weight_files(repository)]
    with reading("model", repository.name), _a_class_that_fits():
        model, info = from_pretrained(
            made,
            repository.fetch(*names, *repository.code),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return model.eval(), info


def refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """Raise for keys that transformers had to make up, or could not use.

    Raises:
        FusionBenchError: there are some.
    """
    problems = [f"lacks '{key}'" for key in sorted(info["missing_keys"])]
    problems += [
        f"'{key}' is {list(found)}, its config.json says {list(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    if problems:
        raise FusionBenchError(f"{name} is not a whole model.\n  {shortened(problems)}")


def skeleton(model_class: str, config: "PretrainedConfig") -> "PreTrainedModel":
    """Return a model without memory for its weights.

    Raises:
        FusionBenchError: no such class, or none for the architecture.
    """
    made = class_named(model_class)
    with torch.device("meta"), _a_class_that_fits():
        model: PreTrainedModel = (
            made(config) if hasattr(made, "config_class") else from_config(made, config)
        )
    return model


def _concrete(model_class: Any, config: "PretrainedConfig | None") -> Any:
    """Return the class that an ``AutoModel…`` stands for."""
    if hasattr(model_class, "config_class"):
        return model_class
    with torch.device("meta"), _a_class_that_fits():  # which costs no memory
        return type(from_config(model_class, config))


@contextmanager
def _a_class_that_fits() -> Iterator[None]:
    """Name the class where an ``AutoModel…`` knows none for the architecture."""
    try:
        yield
    except ValueError as error:
        first_line = str(error).partition("\n")[0]
        if not first_line.startswith("Unrecognized configuration class"):
            raise
        raise FusionBenchError(first_line, place=("model_class",)) from error
