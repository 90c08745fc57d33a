"""Which model an adapter is put on: the one that it was trained on, or the run is refused."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

from fusion_bench.problems import ConfigError, did_you_mean
from fusion_bench.repository import Repository
from fusion_bench.sources import plain_source
from fusion_bench.weights import AdapterConfig, is_special, weight_files

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>.+))?")
#: Where the Hub's client keeps a state of a repository, here or on the machine of the training.
_SNAPSHOT = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>\w+)/?$"
)


@dataclass(frozen=True)
class Base:
    """What an adapter is put on.

    Attributes:
        model: a model of the pool.
        source: or else a directory, a file, or a repository.
    """

    model: str | None = None
    source: str = ""


def with_bases(models: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each model's source, and the base of those that are given as ``{path, base}``.

    Raises:
        ConfigError: a mapping that is neither that nor a config node.
    """
    sources: dict[str, Any] = {}
    bases: dict[str, str] = {}
    for name, model in models.items():
        source = plain_source(model)
        if isinstance(source, Mapping) and "_target_" not in source:
            if unknown := [str(key) for key in source if key not in ("path", "base")]:
                raise ConfigError(
                    "there is no such key.",
                    "A model is a name, a mapping with '_target_', or an adapter's 'path' and "
                    "'base'.",
                    place=("models", name, unknown[0]),
                )
            named = {key: os.fspath(s) if isinstance(s, Path) else s for key, s in source.items()}
            for key in ("path", "base"):
                value = named.get(key)
                needed = key == "path" or value is not None
                if needed and not (isinstance(value, str) and value):
                    raise ConfigError(f"name a model, got '{value}'.", place=("models", name, key))
            if named.get("base") is not None:
                bases[str(name)] = named["base"]
            source = named["path"]
        sources[str(name)] = source
    return sources, bases


def named_base(name: str, base: str, models: Mapping[str, Any]) -> Base:
    """Return the base that the config gives an adapter: a model of the pool, or a place.

    Raises:
        ConfigError: a special name that is not in the pool.
    """
    if base in models:
        return Base(model=base)
    if is_special(base) and not _is_here(base):
        hint = did_you_mean(base, models)
        raise ConfigError(f"modelpool.models.{name}.base: '{base}' is not in the pool. {hint}")
    return Base(source=base)


def trained_on(config: AdapterConfig) -> Base:
    """Return the place that the adapter's own config names."""
    name = config.base or ""
    at_state = config.revision is not None and "@" not in name and not _is_here(name)
    return Base(source=f"{name}@{config.revision}" if at_state else name)


def is_same_model(config: AdapterConfig, source: str, place: Repository) -> bool:
    """Tell whether the base that an adapter's config names is the model at ``place``.

    It is by its name and state on the Hub, by its directory, or as a copy with the same files.
    ``source`` is what the pool calls the model.
    """
    declared = config.base or ""
    if declared == source and place.directory is not None:
        return True
    if _is_here(declared):
        there = Path(declared).expanduser()
        here = place.directory
        if here is None:
            return _hub_name(str(there.resolve()))[0] == _hub_name(source)[0] != ""
        file = Path(source).expanduser()
        if there.samefile(here) or (file.exists() and there.samefile(file)):
            return True
        return there.is_dir() and _same_files(there, here)
    name, revision = _hub_name(declared)
    known, state = _hub_name(str(place.directory or source))
    if not name or name.casefold() != known.casefold():
        return False
    wanted = config.revision or revision
    states = {state or "main", place.commit or state}
    return (
        not wanted or wanted in states or any(s.startswith(wanted) for s in states if s != "main")
    )


def refusal(name: str, path: str, config: AdapterConfig, source: str) -> ConfigError:
    """Return what to say of an adapter of another base, and what to type."""
    state = "" if config.revision is None else f" ({config.revision})"

    def typed(base: str) -> str:
        value = f"{{path: {json.dumps(path, ensure_ascii=False)}, base: {base}}}"
        return shlex.quote(f"modelpool.models.{name}={value}")

    own = json.dumps(trained_on(config).source, ensure_ascii=False)
    return ConfigError(
        f"modelpool.models.{name}: its adapter_config.json says that the adapter was trained on "
        f"'{config.base}'{state}, and '_pretrained_' is '{source}'. If these are one model, give "
        f"{typed('_pretrained_')}; if not, name the adapter's own base: {typed(own)}."
    )


def _hub_name(text: str) -> tuple[str, str]:
    """Return the repository and the state that a name or a place in the Hub's cache stands for."""
    if found := _SNAPSHOT.search(text.replace("\\", "/")):
        return f"{found['owner']}/{found['name']}", found["revision"]
    if (found := _HUB_NAME.fullmatch(text)) and not _is_here(text):
        return found["repo"], found["revision"] or ""
    return "", ""


def _is_here(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (RuntimeError, OSError, ValueError):  # no home, or no name that a file can have
        return False


def _same_files(one: Path, other: Path) -> bool:
    """Tell whether two directories hold the same weights, in the same files."""
    places = [
        Repository(str(p), frozenset(f.name for f in p.iterdir() if f.is_file()), directory=p)
        for p in (one, other)
    ]
    try:
        names, others = (weight_files(place) for place in places)
    except ConfigError:  # one of them is no model
        return False
    return names == others and all(cmp(one / n, other / n, shallow=False) for n in names)
