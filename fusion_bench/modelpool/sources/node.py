"""A config node is a model: what it makes when it is called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from torch import nn

from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.sources.module import config_of, opened
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, key_of
from fusion_bench.repository import Repository
from fusion_bench.sources import make, unbuilt
from fusion_bench.weights import Config, Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(eq=False)
class Node:
    """A config node with a ``_target_``; it is called whenever its model is asked for.

    It also takes what names no model, to say so when that is used.
    """

    named: Named
    base: None = None
    home: None = None
    companions: tuple[Repository, ...] = ()
    prefix: None = None
    _config: Config | None = field(default=None, init=False)

    @classmethod
    def take(cls, named: Named) -> Optional["Node"]:
        """Take whatever it is."""
        return cls(named)

    @property
    def at(self) -> Repository:
        """What it names, with the state of that."""
        name = self._pretrained()
        directory = Path(name) if name and Path(name).is_dir() else None
        return Repository(name or f"a {type(self.named.node).__name__}", frozenset(), directory)

    def plan(self, plan: Plan) -> bool:
        """Find what it names; only calling it tells more."""
        name = self._pretrained()
        if name and unbuilt(name) is None:
            self.named.pool.locate(name)
        return False

    def config(self) -> Config | None:
        """Return the config of what it made, once it made something."""
        return self._config

    def open(self, base: Model | None) -> Model:
        """Return what it makes."""
        return opened(self._made())

    def architecture(self) -> str:
        """Return the node."""
        return json.dumps(self.named.node, sort_keys=True, default=str)

    def described(self) -> Origin:
        """Return the node."""
        return Origin(json.dumps(self.named.node, default=str))

    def config_for(self, config_class: str = "") -> "PretrainedConfig | None":
        """Return the config of what it makes."""
        return getattr(self._made(), "config", None)

    def load(self) -> nn.Module:
        """Return what it makes."""
        return self._made().eval()

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write the config of what it makes, if that has one."""
        if (config := self.config_for()) is not None:
            config.save_pretrained(directory)

    def _pretrained(self) -> str:
        """Return the name of a model in it, with its state; empty where there is none."""
        node = self.named.node
        name = node.get("pretrained_model_name_or_path") if isinstance(node, Mapping) else None
        if not isinstance(name, str) or not isinstance(node, Mapping):
            return ""
        revision = node.get("revision")
        return f"{name}@{revision}" if revision else name

    def _made(self) -> nn.Module:
        module = make("model", self.named.node, key_of(self.named.place))
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            raise FusionBenchError(f"expected a repository, a directory or a module, got {got}.")
        self._config = config_of(module) or self._config
        return module
