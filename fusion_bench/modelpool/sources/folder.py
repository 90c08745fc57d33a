"""A directory, a repository on the Hub, or a name of the zoo: a whole model with its files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Optional

import torch

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
from fusion_bench.pretrained import (
    from_pretrained,
    quantisation,
    quantisation_settings,
    without_quantisation,
)
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.sources import reading, unbuilt
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import (
    Config,
    Model,
    Weights,
    dequantised,
    quantised,
    told_by_values,
    undecodable,
    weight_files,
)

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
        """The folder; none whose weights are decoded, which transformers would keep quantised."""
        return None if self._quantised() else self.at

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
        method = self._quantised().get("quant_method")
        files = weight_files(self.at)
        plan.download(self.at, *files, *(self.at.files & set(CONFIGS)))
        if method is not None:
            plan.note(
                f"{self.named.name or self.at.name}: its weights are quantised ({method}). They "
                f"are read as {str(self._dtype()).removeprefix('torch.')}, and the merged ones are "
                "written unquantised."
            )
        by_headers = "safetensors" in files[0] and not told_by_values(self._quantised())
        return by_headers or self.at.has(*files)

    def config(self) -> Config | None:
        """Return what is in its config.json, as of plain weights; None where there is none."""
        content = self._content()
        if content is None or not quantisation_settings(content):
            return content
        plain: Config = without_quantisation(content)
        return plain

    def open(self, base: Model | None) -> Model:
        """Return the weights in its files, known by their headers."""
        self.named.refuse_base()
        weights, settings = self._weights(), self._quantised()
        if settings:
            weights = self._decoded(weights, settings)
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
        if self._quantised():
            return made_of(self.config() or {}, config_class, self.at.name)
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
        if self._quantised():
            self.write_config(directory)
        elif self.home is not None:
            tell_what_is_left(self.home, names)

    def write_config(self, directory: Path) -> None:
        """Write its config, as of plain weights."""
        write_text(directory / "config.json", json.dumps(self.config(), indent=2) + "\n")

    def _weights(self) -> Weights:
        self._quantised()
        return self.named.pool.open(self.at)

    def _content(self) -> Config | None:
        if "config.json" not in self.at.files:
            return None
        content = read_json(self.at.fetch("config.json") / "config.json")
        return content or None if isinstance(content, dict) else None

    def _quantised(self) -> Mapping[str, Any]:
        """Return how its config says that the weights are quantised; empty for plain ones.

        Raises:
            FusionBenchError: in a way that cannot be decoded.
        """
        content = self._content() or {}
        settings = quantisation_settings(content)
        reason = undecodable(settings) if settings else quantisation(content)
        if reason is not None:
            raise FusionBenchError(
                f"'{self.at.name}' is quantised ({reason}), and such weights cannot be merged.",
                "Name the model that it was made from.",
            )
        return settings

    def _dtype(self) -> torch.dtype:
        """Return the type that the weights had before they were quantised."""
        content = self._content() or {}
        named = content.get("dtype") or content.get("torch_dtype")
        known = {str(each).removeprefix("torch."): each for each in (torch.float16, torch.float32)}
        return known.get(str(named), torch.bfloat16)

    def _decoded(self, weights: Weights, settings: Mapping[str, Any]) -> Weights:
        plain = dequantised(weights, settings, self._dtype(), name=self.at.name)
        if plain is weights:
            raise FusionBenchError(
                f"'{self.at.name}' is quantised ({settings['quant_method']}) by its config.json, "
                "and no entry of its weights is.",
                "Remove the quantization_config there if the weights are plain.",
            )
        return plain


def made_of(config: Config, config_class: str, name: str) -> "PretrainedConfig":
    """Return what a class of transformers makes of a config that is in no file.

    Args:
        config: the content of a config.json.
        config_class: of transformers.
        name: what the model is called, for messages.

    Raises:
        FusionBenchError: it is none.
    """
    import transformers

    made = getattr(transformers, config_class)
    with reading("model", name), TemporaryDirectory() as folder:
        write_text(Path(folder) / "config.json", json.dumps(config))
        built: PretrainedConfig = from_pretrained(made, Path(folder))
    return built
