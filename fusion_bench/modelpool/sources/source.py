"""What a source is: one way of naming a model, and all that is asked about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import nn

from fusion_bench.modelpool.card import Origin
from fusion_bench.plan import Plan
from fusion_bench.problems import ConfigError, Place
from fusion_bench.repository import Repository
from fusion_bench.weights import Config, Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fusion_bench.modelpool.sources import Sources


@dataclass(frozen=True, eq=False)
class Named:
    """A model as the config names it.

    Attributes:
        node: what stands there.
        place: where, relative to the pool.
        pool: the models beside it.
        name: what the pool calls it; empty for one that only an adapter names.
        base: what an adapter is to be put on, where the config says so.
    """

    node: object
    place: Place
    pool: "Sources"
    name: str = ""
    base: str | None = None

    def refuse_base(self) -> None:
        """Raise for a whole model that is given a base.

        Raises:
            ConfigError: it is.
        """
        if self.base is not None:
            reason = f"'{self.node}' is no adapter, and only adapters have a base."
            raise ConfigError(reason, "Name it alone, without a base.", place=("base",))


class Source(Protocol):
    """One way of naming a model.

    What it raises has places relative to the model: ``("base",)`` for what an adapter stands on.
    It looks at files when it is asked, and not when it is made.
    """

    @property
    def named(self) -> Named:
        """How the config names it."""

    @property
    def at(self) -> Repository:
        """What it is called, and where it lies as far as that is known."""

    @property
    def base(self) -> "Source | None":
        """What an adapter is put on; None for a whole model.

        Raises:
            FusionBenchError: an adapter whose base is missing, unknown or a different one.
        """

    @property
    def home(self) -> Repository | None:
        """The folder that the whole model fills; None for one that is elsewhere, or a file."""

    @property
    def companions(self) -> tuple[Repository, ...]:
        """The folders with its tokenizer and its processors, its own first."""

    @property
    def prefix(self) -> str | None:
        """What stands before a bare model's keys where it has a head, if that is known."""

    def plan(self, plan: Plan) -> bool:
        """Note what is not here yet; tell whether a header can be read. No weight is.

        Raises:
            FusionBenchError: what will stand in the way of opening it.
        """

    def config(self) -> Config | None:
        """Return its config, as far as it is known without making the model."""

    def open(self, base: Model | None) -> Model:
        """Return the model, with weights under its own keys.

        Args:
            base: what ``self.base`` opened to.

        Raises:
            FusionBenchError: it cannot be read, or is quantised.
        """

    def architecture(self) -> str:
        """Return what besides weights tells what it computes; results are kept under its hash."""

    def described(self) -> Origin:
        """Return what a merged model's card says of it; its files are fetched."""

    def config_for(self, config_class: str) -> "PretrainedConfig | None":
        """Return its config as transformers has it, read by that class where it is in a file."""

    def load(self) -> nn.Module | None:
        """Return a module of one's own in eval mode; None for what is built of its weights."""

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write its config and what belongs to it, with or without its processors' files."""
