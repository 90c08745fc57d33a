"""Calls ``from_pretrained`` without running code from repositories, and without prompts.

By default, transformers asks on the terminal whether a repository's code may run, and downloads
compiled kernels that a config.json names.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion_bench.companions import check_folder, own_file
from fusion_bench.problems import ConfigError
from fusion_bench.storage import read_json
from fusion_bench.trust import fetches_code, trusts_remote_code

#: Which code computes a part of a model: attention, for one.
_KERNELS = re.compile("_?(attn|experts)_implementation(_internal)?")
#: They name files to be read in place of those that everybody knows.
_OTHER_FILES = ("configuration_files", "fast_tokenizer_files")
#: Likewise as arguments of a call.
_FILE = re.compile("config|.*_(file|files|filename)")
#: Classes of which no model is made.
_NO_MODEL = re.compile(r"(Processor|Tokenizer|FeatureExtractor)\w*\.from_pretrained$")
#: Where a config says that its weights are quantised.
_QUANTISED = ("quantization_config", "compression_config")


def from_pretrained(made: Any, place: Path, *, model: bool = True, **options: Any) -> Any:
    """Load a folder with a class of transformers; the folder's code is not run.

    Args:
        made: the class.
        place: the folder, whose files are already checked.
        model: whether that is a model or its config, no tokenizer or processor.
        options: the call's other arguments.

    Raises:
        ConfigError: its config.json would fetch code.
    """
    check_configs(place, model=model)
    return made.from_pretrained(place, trust_remote_code=trusts_remote_code(), **options)


def from_config(made: Any, config: Any) -> Any:
    """Build a model from a config with an ``AutoModel…`` class; no repository code is run."""
    return made.from_config(config, trust_remote_code=trusts_remote_code())


def checked_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``from_pretrained`` node that runs no code from the repository.

    Args:
        node: names a class of transformers in ``_target_``.

    Raises:
        ConfigError: what it reads may not be read, or would fetch code.
    """
    for key, value in node.items():
        if _FILE.fullmatch(str(key)) and isinstance(value, str) and re.search(r"[/\\]", value):
            reason = f"'{value}' is refused; files are read only from the model's own folder."
            raise ConfigError(reason, "Remove the key.", place=(str(key),))
    name = node.get("pretrained_model_name_or_path")
    if isinstance(name, str | os.PathLike):
        model = not _NO_MODEL.search(str(node["_target_"]))
        place: Path | None = Path(name).expanduser()
        if place is not None and not place.exists():
            place = _folder_on_hub(str(name), node) if model else None
        if place is not None and place.is_file():
            raise ConfigError(f"'{place}' is a file. Give its folder instead.")
        if place is not None:
            folder = place / str(node.get("subfolder") or "")
            check_folder(folder)
            check_configs(folder, model=model, chosen="attn_implementation" in node)
    trusted = node.get("trust_remote_code")
    return {**node, "trust_remote_code": trusts_remote_code() if trusted is None else trusted}


def _folder_on_hub(name: str, node: Mapping[str, Any]) -> Path | None:
    """Return the folder in the Hub's cache with a repository's config.json, if it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    subfolder = node.get("subfolder") or None
    with suppress(EntryNotFoundError):
        file = hf_hub_download(
            name, "config.json", subfolder=subfolder, revision=node.get("revision")
        )
        return Path(file).parents[len(Path(subfolder or "").parts)]
    return None


def check_configs(place: Path, *, model: bool = True, chosen: bool = False) -> None:
    """Refuse configs with which transformers would run code or read unknown files.

    Args:
        place: the folder that they are in.
        model: whether a model is made of it, no tokenizer or processor.
        chosen: whether the user's config says which code computes the attention.

    Raises:
        ConfigError: they are so, or no JSON.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (file := place / name).exists():
            continue
        config = read_json(file)
        for key, value in _settings(config):
            if key in _OTHER_FILES and value:
                raise ConfigError(
                    f"'{file}': {key} names other files to read. It is refused. Remove the key "
                    "there."
                )
            if model and _KERNELS.fullmatch(key) and not (chosen and "attn" in key):
                _refuse_kernels(file, key, value)
        if model and isinstance(config, dict) and (method := quantisation(config)):
            raise ConfigError(
                f"'{place}' is quantised ({method}), and quantised weights are not supported. Use "
                "the original model."
            )
        weights = config.get("transformers_weights") if isinstance(config, dict) else None
        if model and isinstance(weights, str):
            own_file(place, weights)


def _refuse_kernels(file: Path, key: str, value: Any) -> None:
    for kernel in value.values() if isinstance(value, dict) else [value]:
        if kernel is not None and fetches_code(kernel):
            raise ConfigError(
                f"'{file}': {key} names {kernel!r}, code that would be downloaded and run. This "
                "is refused. Remove the key there, or give the model as a config node with "
                "'attn_implementation: sdpa'."
            )


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation method in a config.json, if any."""
    for key, section in _settings(config):
        if key in _QUANTISED and section:
            named = isinstance(section, Mapping) and section.get("quant_method")
            return str(named or "with an unnamed method")
    mlx = config.get("quantization")
    return "by MLX" if isinstance(mlx, Mapping) and "bits" in mlx else None


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config.json says of its quantised weights; empty where it says nothing."""
    for key, section in _settings(config):
        if key in _QUANTISED and isinstance(section, Mapping) and section:
            return section
    return {}


def without_quantisation(config: Any) -> Any:
    """Return a config's content as it is of plain weights, the sections in it likewise."""
    if isinstance(config, list):
        return [without_quantisation(each) for each in config]
    if not isinstance(config, Mapping):
        return config
    plain = {key: value for key, value in config.items() if key not in _QUANTISED}
    return {key: without_quantisation(value) for key, value in plain.items()}


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values, including nested ones."""
    level = [config]
    while level:
        value = level.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            level.extend(value.values())
        elif isinstance(value, list):
            level.extend(value)
