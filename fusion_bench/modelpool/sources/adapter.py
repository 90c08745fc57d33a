"""An adapter is a model: that on which it is put, with what it adds.

It is put on the model that it was trained on, or the run is refused. ``base+adapter`` and
``{path: adapter, base: base}`` name another.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fusion_bench.command import is_there
from fusion_bench.modelpool.card import Origin, stated_license
from fusion_bench.modelpool.directory import copy_files, processor_files
from fusion_bench.modelpool.sources.file import whole
from fusion_bench.modelpool.sources.source import Named, Source
from fusion_bench.plan import Plan
from fusion_bench.problems import ConfigError, FusionBenchError, did_you_mean, within
from fusion_bench.repository import Repository
from fusion_bench.sources import plain_source, unbuilt
from fusion_bench.weights import (
    AdapterConfig,
    AdapterWeights,
    Config,
    Model,
    Weights,
    is_special,
    open_checkpoint,
    weight_files,
)
from fusion_bench.weights.config import vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_ADD_IT = "Add it as '_pretrained_', {here}_pretrained_"
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>.+))?")
#: Where the Hub's client keeps a state of a repository, here or on the machine of the training.
_SNAPSHOT = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>\w+)/?$"
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A folder with a LoRA adapter in PEFT's layout, here or on the Hub."""

    named: Named
    at: Repository

    @classmethod
    def take(cls, named: Named) -> Optional["Adapter"]:
        """Take the name of a folder with an adapter's config; of the zoo, none is one."""
        if not isinstance(named.node, str) or unbuilt(named.node) is not None:
            return None
        place = named.pool.locate(named.node)
        return cls(named, place) if _CONFIG in place.files else None

    @cached_property
    def base(self) -> Source:
        """What it is put on; adapters that stand on each other are refused."""
        above, below = [self], self._below
        while isinstance(below, Adapter):
            if below in above:
                names = " on ".join(adapter.named.name for adapter in [*above, below])
                remedy = "Name a whole model as the base of one."
                raise ConfigError(f"its base depends on itself: {names}.", remedy)
            above.append(below)
            below = below._below
        return self._below

    @property
    def home(self) -> Repository | None:
        """That of the whole model."""
        return self.base.home

    @property
    def companions(self) -> tuple[Repository, ...]:
        """Its own folder, in which a trainer puts the tokens that it added; then its base's."""
        return (self.at, *self.base.companions)

    @property
    def prefix(self) -> str | None:
        """That of the whole model."""
        return self.base.prefix

    def plan(self, plan: Plan) -> bool:
        """Note what of it and of its base is not here, and say what its own config does not."""
        files = [_CONFIG, *(file for file in _FILES[:1] if file in self.at.files)]
        plan.download(self.at, *files)
        if self.named.pool.is_unbuilt("_pretrained_"):
            return False  # nothing to hold its base against
        base, declared = self.base, self._settings.base
        if not (below := base.named.name):
            return base.plan(plan) and self.at.has(*files)
        if declared is None:
            plan.note(f"{self.named.name}: the adapter names no base and is merged into '{below}'.")
        elif self.named.base is not None:
            plan.note(
                f"{self.named.name}: the adapter's config says that it was trained on "
                f"'{declared}'; it is put on '{below}', as its 'base' says."
            )
        return self.at.has(*files)

    def config(self) -> Config | None:
        """Return that of the whole model."""
        return self.base.config()

    def open(self, base: Model | None) -> Model:
        """Return its base with what it adds, also to the number of tokens."""
        assert base is not None
        weights = AdapterWeights(base.weights, self._weights(), self._settings)
        config, known = base.config, vocabulary(base.config)
        tokens = next((new for old, new in weights.resized() if old == known), None)
        if config is not None and "vocab_size" in config and tokens is not None:
            config = {**config, "vocab_size": tokens}
        companions = (self.at, *base.companions)
        return replace(base, weights=weights, config=config, companions=companions)

    def architecture(self) -> str:
        """Return that of the whole model."""
        return self.base.architecture()

    def described(self) -> Origin:
        """Return what it is called, and what it is put on, with the files of both."""
        base = self.base.described()
        files = (*self._weights().files, *base.files)
        below = self.base.named.name
        origin = Origin(below) if below else Origin(base.name, base.commit)
        return Origin(self.at.name, self.at.commit, files, origin, stated_license(self.at))

    def config_for(self, config_class: str) -> "PretrainedConfig | None":
        """Return that of the whole model."""
        return self.base.config_for(config_class)

    def load(self) -> None:
        """Nothing is at hand: it is built."""

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write what belongs to its base, but its own processors where it has any."""
        own = processor_files(self.at) if processors else []
        copy_files(self.at, own, directory)
        self.base.write_companions(directory, processors=processors and not own)

    def _weights(self) -> Weights:
        file = next((name for name in _FILES if name in self.at.files), None)
        if file is None:
            reason = f"there are no weights in '{self.at.name}'."
            raise FusionBenchError(reason, f"It needs one of: {', '.join(_FILES)}.")
        return open_checkpoint(self.at.fetch(file) / file)

    @cached_property
    def _settings(self) -> AdapterConfig:
        return AdapterConfig.read(self.at.fetch(_CONFIG) / _CONFIG)

    @cached_property
    def _below(self) -> Source:
        """What it is put on, whatever that stands on in its turn."""
        pool, base = self.named.pool, self.named.base
        if base is not None and base in pool:
            return pool[base]
        if base is not None:
            with within("base"):
                if is_special(base) and not _is_here(base):
                    raise ConfigError(f"'{base}' is not in the pool.", did_you_mean(base, pool))
                return self._outside(base, "base")
        settings = self._settings
        if "_pretrained_" in pool and self.named.name != "_pretrained_":
            pretrained = pool["_pretrained_"]
            if settings.base is not None and not is_same_model(settings, pretrained.at):
                raise self._refusal(pretrained.at.name)
            return pretrained
        if settings.base is None:
            raise ConfigError(
                "the adapter names no base model.",
                f"{_ADD_IT}, or give {{here}}{self.named.name}.path and "
                f"{{here}}{self.named.name}.base.",
            )
        try:
            return self._outside(_trained_on(settings))
        except FusionBenchError as error:
            more = f"The adapter names it as its base model. {_ADD_IT}."
            error.problems = tuple(
                replace(problem, remedy=f"{problem.remedy} {more}".strip())
                for problem in error.problems
            )
            raise

    def _outside(self, name: str, *key: str) -> Source:
        """Return a model that is none of the pool, if it is there; ``base+adapter`` is one."""
        place, pool = (*self.named.place, *key), self.named.pool
        if both := split(name):
            below, node = both
            adapter = Adapter.take(Named(node, place, pool, base=below))
            if adapter is None:
                raise ConfigError(f"'{node}' is no adapter, and stands after a '+'.")
            return adapter
        source = whole(Named(name, place, pool))
        assert source is not None
        if unbuilt(name) is None:
            _ = source.at  # is there
        return source

    def _refusal(self, pretrained: str) -> ConfigError:
        """Return what to say of an adapter of another base, and what to type."""
        settings = self._settings
        state = "" if settings.revision is None else f" ({settings.revision})"

        def typed(base: str) -> str:
            path = json.dumps(self.named.node, ensure_ascii=False)
            value = f"{{path: {path}, base: {base}}}"
            return shlex.quote(f"{{here}}{self.named.name}={value}")

        own = json.dumps(_trained_on(settings), ensure_ascii=False)
        return ConfigError(
            f"its adapter_config.json says that the adapter was trained on '{settings.base}'"
            f"{state}, and '_pretrained_' is '{pretrained}'.",
            f"If these are one model, give {typed('_pretrained_')}; if not, name the adapter's own "
            f"base: {typed(own)}.",
        )


def with_bases(models: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """Return each model's source, and the base of ``{path, base}`` and of ``base+adapter``.

    Raises:
        ConfigError: a mapping that is neither that nor a config node.
    """
    sources: dict[str, object] = {}
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
        if isinstance(source, str) and str(name) not in bases and (both := split(source)):
            bases[str(name)], source = both
        sources[str(name)] = source
    return sources, bases


def split(name: str) -> tuple[str, str] | None:
    """Return base and adapter of ``base+adapter``, the last of several; None of another name.

    A path that is there is no such name, and a ``+`` in one of the two paths does not separate.
    """
    if _is_here(name):
        return None
    found = [(name[:at], name[at + 1 :]) for at, sign in enumerate(name) if sign == "+"]
    found = [(base, adapter) for base, adapter in reversed(found) if base and adapter]
    here = [both for both in found if any(map(_is_here, both))]
    return next(iter(here or found), None)


def is_same_model(config: AdapterConfig, place: Repository) -> bool:
    """Tell whether the base that an adapter's config names is the model at ``place``.

    It is by its name and state on the Hub, by its directory, or as a copy with the same files.
    """
    declared, source = config.base or "", place.name
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


def _trained_on(settings: AdapterConfig) -> str:
    """Return the name of the base that the adapter's own config names."""
    name = settings.base or ""
    at_state = settings.revision is not None and "@" not in name and not _is_here(name)
    return f"{name}@{settings.revision}" if at_state else name


def _hub_name(text: str) -> tuple[str, str]:
    """Return the repository and the state that a name or a place in the Hub's cache stands for."""
    if found := _SNAPSHOT.search(text.replace("\\", "/")):
        return f"{found['owner']}/{found['name']}", found["revision"]
    if (found := _HUB_NAME.fullmatch(text)) and not _is_here(text):
        return found["repo"], found["revision"] or ""
    return "", ""


def _is_here(name: str) -> bool:
    try:
        return bool(name) and is_there(Path(name).expanduser())
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
