"""A directory, a repository on the Hub, or a name of the zoo: a whole model with its files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fusion_bench.companions import CONFIGS
from fusion_bench.modelpool.card import Origin, stated_license
from fusion_bench.modelpool.directory import (
    copy_files,
    processor_files,
    sentence_transformer,
    tell_what_is_left,
)
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan, zoo_step
from fusion_bench.pretrained import from_pretrained, quantisation
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.sources import reading, unbuilt
from fusion_bench.storage import read_json
from fusion_bench.weights import Config, Model, Weights, quantised, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Folder:
    """A whole model in a folder, here or on the Hub; the zoo is built when it is looked at."""

    named: Named
    name: str
    base: None = None

    @classmethod
    def take(cls, named: Named) -> Optional["Folder"]:
        """Take any name; a missing folder is reported when it is inspected."""
        return cls(named, named.node) if isinstance(named.node, str) else None

    @property
    def at(self) -> Repository:
        """The folder."""
        return self.named.pool.locate(self.name)

    @property
    def home(self) -> Repository | None:
        """The folder."""
        return self.at

    @property
    def companions(self) -> tuple[Repository, ...]:
        """The folder."""
        return (self.at,)

    @property
    def prefix(self) -> str | None:
        """What the class says that its config names."""
        import transformers

        names = (self.config() or {}).get("architectures")
        for name in names if isinstance(names, list) else ():
            prefix = getattr(getattr(transformers, str(name), None), "base_model_prefix", None)
            if isinstance(prefix, str) and prefix:
                return prefix
        return None

    def plan(self, plan: Plan) -> bool:
        """Note files that are not here, and the zoo where it is to be built."""
        if place := unbuilt(self.name):
            plan.add(zoo_step(place))
            return False
        self.named.refuse_base()
        self._refuse_quantised()
        files = weight_files(self.at)
        plan.download(self.at, *files, *(self.at.files & set(CONFIGS)))
        return "safetensors" in files[0] or self.at.has(*files)

    def config(self) -> Config | None:
        """Return what is in its config.json; None where there is none."""
        if "config.json" not in self.at.files:
            return None
        content = read_json(self.at.fetch("config.json") / "config.json")
        return content or None if isinstance(content, dict) else None

    def open(self, base: Model | None) -> Model:
        """Return the weights in its files, known by their headers."""
        self.named.refuse_base()
        weights = self._weights()
        if found := quantised(weights):
            raise FusionBenchError(
                f"'{self.at.name}' is quantised ({found}), and such weights mean nothing without "
                "their scales, so they cannot be merged.",
                "Name the model that it was made from, or a copy with plain weights.",
            )
        return Model(weights, self.config(), self.named.pool.model_class, self.companions)

    def architecture(self) -> str:
        """Return the class that is made of it, and its config."""
        return json.dumps([self.named.pool.model_class, self.config() or {}], sort_keys=True)

    def described(self) -> Origin:
        """Return its name, its state on the Hub, and the files with its weights."""
        files = self._weights().files
        return Origin(self.at.name, self.at.commit, files, license=stated_license(self.at))

    def config_for(self, config_class: str) -> "PretrainedConfig | None":
        """Return what a class of transformers makes of its config."""
        import transformers

        made = getattr(transformers, config_class)
        with reading("model", self.at.name):
            return from_pretrained(made, self.at.fetch("config.json", *self.at.code))

    def load(self) -> None:
        """Nothing is at hand: it is built."""

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Copy its files; say what does not come along."""
        names = [*(self.at.files & set(CONFIGS)), *sentence_transformer(self.at)]
        names += processor_files(self.at) if processors else []
        copy_files(self.at, names, directory)
        if self.home is not None:
            tell_what_is_left(self.home, names)

    def _weights(self) -> Weights:
        self._refuse_quantised()
        return self.named.pool.open(self.at)

    def _refuse_quantised(self) -> None:
        if method := quantisation(self.config() or {}):
            reason = f"'{self.at.name}' is quantised ({method}), and such weights cannot be merged."
            raise FusionBenchError(reason, "Name the model that it was made from.")
