"""A config node is a model: the module that it makes when it is called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.sources.module import Module
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, key_of
from fusion_bench.sources import load, unbuilt
from fusion_bench.weights import Config, Model


@dataclass(eq=False)
class Node(Module):
    """A config node with a ``_target_``; it is called whenever its module is asked for.

    It also takes what names no model, to say so when that is used.
    """

    _config: Config | None = field(default=None, init=False)

    @classmethod
    def take(cls, named: Named) -> "Node":
        """Take whatever it is."""
        return cls(named)

    @property
    def module(self) -> nn.Module:
        """What it makes, each time anew."""
        module = load("model", self.named.node, key_of(self.named.place))
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            raise FusionBenchError(f"expected a repository, a directory or a module, got {got}.")
        return module

    @property
    def prefix(self) -> None:
        """Only calling it tells."""

    def plan(self, plan: Plan) -> bool:
        """Find what it names; only calling it tells more."""
        name = self._read_from()
        if name and unbuilt(name) is None:
            self.named.pool.locate(name)
        return False

    def config(self) -> Config | None:
        """Return the config of what it made, once it was opened."""
        return self._config

    def open(self, base: Model | None) -> Model:
        """Return what it makes."""
        model = super().open(base)
        self._config = model.config
        return model

    def architecture(self) -> str:
        """Return the node."""
        return json.dumps(self.named.node, sort_keys=True, default=str)

    def described(self) -> Origin:
        """Return the node."""
        return Origin(json.dumps(self.named.node, default=str))

    def load(self) -> nn.Module:
        """Return what it makes."""
        return self.module.eval()

    def _read_from(self) -> str:
        """Return the name of a model in the node, with its state; empty where there is none."""
        node = self.named.node if isinstance(self.named.node, Mapping) else {}
        name, revision = node.get("pretrained_model_name_or_path"), node.get("revision")
        if not isinstance(name, str):
            return ""
        return f"{name}@{revision}" if revision else name
