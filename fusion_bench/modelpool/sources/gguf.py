"""A GGUF file is a model: its weights are decoded, its config is made of its metadata."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fusion_bench.modelpool.gguf import gguf_config, gguf_weights, write_gguf_tokenizer
from fusion_bench.modelpool.sources.folder import Folder, made_of
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.repository import Repository
from fusion_bench.tokenizer import tokenizer_files
from fusion_bench.weights import Config, GgufWeights, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Gguf(Folder):
    """A file of llama.cpp, with whatever a folder has beside it."""

    @classmethod
    def take(cls, named: Named) -> Optional["Gguf"]:
        """Take the path of a file whose name ends so."""
        with suppress(RuntimeError, OSError, ValueError):  # no home, or no name of a file
            node = named.node
            if (
                isinstance(node, str)
                and node.lower().endswith(".gguf")
                and Path(node).expanduser().is_file()
            ):
                return cls(named, node)
        return None

    @property
    def at(self) -> Repository:
        """The folder that it is in, under its own name."""
        return replace(self.named.pool.locate(str(self._path.parent)), name=self.name)

    @property
    def home(self) -> None:
        """A file has neighbours, and not a folder."""

    def plan(self, plan: Plan) -> bool:
        """Read the header, and say that the weights are decoded."""
        self.named.refuse_base()
        _ = self._stored
        plan.note(
            f"{self.named.name or self.name}: its weights are in the format of llama.cpp (GGUF). "
            "They are decoded, and the merged ones are written unquantised."
        )
        return True

    def config(self) -> Config:
        """Return what is in the config.json beside it, or else what its metadata say."""
        return super().config() or self._own_config

    def config_for(self, config_class: str) -> "PretrainedConfig | None":
        """Return what a class of transformers makes of its config."""
        return made_of(self.config(), config_class, self.name)

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write its config and the files beside it, or else the tokenizer that it holds."""
        super().write_companions(directory, processors=processors)
        self.write_config(directory)
        if not processors or tokenizer_files(self.at):
            return
        if reason := write_gguf_tokenizer(self._path, directory):
            log.warning(
                f"The merged model has no tokenizer: transformers makes none of '{self.name}' "
                f"({reason}). Set modelpool.tokenizer to the original model."
            )

    @property
    def _path(self) -> Path:
        return Path(self.name).expanduser().absolute()

    @cached_property
    def _stored(self) -> GgufWeights:
        return GgufWeights(self._path)

    @cached_property
    def _own_config(self) -> Config:
        return gguf_config(self._stored)

    def _weights(self) -> Weights:
        config = self.config_for("AutoConfig")
        return gguf_weights(self._stored, config)
