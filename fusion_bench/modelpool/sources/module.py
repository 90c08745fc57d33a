"""A module is a model."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from torch import nn

from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.repository import Repository
from fusion_bench.weights import Config, Model, TensorWeights
from fusion_bench.weights.config import plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(eq=False)
class Module:
    """A module that is given as it is, in Python; it is never changed."""

    named: Named
    base: None = None
    home: None = None
    companions: tuple[Repository, ...] = ()

    @classmethod
    def take(cls, named: Named) -> Optional["Module"]:
        """Take a module."""
        return cls(named) if isinstance(named.node, nn.Module) else None

    @property
    def module(self) -> nn.Module:
        """The module."""
        assert isinstance(self.named.node, nn.Module)
        return self.named.node

    @property
    def at(self) -> Repository:
        """What it was read from, as far as that is said."""
        name = self._read_from()
        directory = Path(name) if name and Path(name).is_dir() else None
        kind = type(self.named.node).__name__
        return Repository(name or f"a {kind}", frozenset(), directory)

    @property
    def prefix(self) -> str | None:
        """What its class says."""
        return getattr(self.module, "base_model_prefix", None) or None

    def plan(self, plan: Plan) -> bool:
        """There is nothing to find."""
        return True

    def config(self) -> Config | None:
        """Return its config, if it has one as those of transformers have."""
        return _config_of(self.module)

    def open(self, base: Model | None) -> Model:
        """Return its tensors as they are."""
        module = self.module
        return Model(TensorWeights(module.state_dict()), _config_of(module), str(module))

    def architecture(self) -> str:
        """Return its config, and how it prints itself."""
        return f"{getattr(self.module, 'config', '')}{self.module}"

    def described(self) -> Origin:
        """Return its class."""
        return Origin(f"a {type(self.module).__name__}")

    def config_for(self, config_class: str = "") -> "PretrainedConfig | None":
        """Return its own."""
        return getattr(self.module, "config", None)

    def load(self) -> nn.Module:
        """Return a copy."""
        return deepcopy(self.module).eval()

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write its config, if it has one."""
        if (config := self.config_for()) is not None:
            config.save_pretrained(directory)

    def _read_from(self) -> str:
        return str(getattr(self.config_for(), "name_or_path", ""))


def _config_of(module: nn.Module) -> Config | None:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    return None if to_dict is None else plain(to_dict())
