"""A mergekit recipe as frozen data.

What a recipe says is described in our own words in ``docs/recipes.md``. Every part knows its place
in the file, so that a problem that is found later is told with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fusion_bench.problems import ConfigError, Place

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: a path or a name on the Hub, with an adapter or without."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Return the model that ``path@revision+adapter@revision`` names.

        Raises:
            ConfigError: more than one ``+``, or nothing before or behind one.
        """
        whole, plus, adapter = text.partition("+")
        path, revision = _revision(whole)
        if "+" in adapter or not path or (plus and not adapter):
            raise ConfigError(
                f"'{text}' is not of the form 'path@revision+adapter@revision'.",
                "Write a path with such signs as 'model: {model: {path: …}}'.",
            )
        return cls(path, revision, *_revision(adapter)) if plus else cls(path, revision)

    @property
    def name(self) -> str:
        """The path, with its state on the Hub."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def adapter_name(self) -> str | None:
        """The adapter, with its state on the Hub."""
        if self.adapter is None or self.adapter_revision is None:
            return self.adapter
        return f"{self.adapter}@{self.adapter_revision}"

    def __str__(self) -> str:
        return self.name if self.adapter is None else f"{self.name}+{self.adapter_name}"


def _revision(text: str) -> tuple[str, str | None]:
    path, at, revision = text.partition("@")
    return path, revision if at and revision else None


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains ``filter``; for all others where it is None.

    A tuple is a gradient over the layers.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


@dataclass(frozen=True)
class Setting:
    """What one level of a recipe says of a parameter; nothing where it cannot be read."""

    conditions: tuple[Condition, ...]
    place: Place


Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model in a slice; without ``layers`` all of its layers."""

    model: Reference
    layers: tuple[int, int] | None
    parameters: Parameters
    place: Place


@dataclass(frozen=True)
class Slice:
    """Layers of several models that are merged into as many layers."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Parameters
    place: Place


@dataclass(frozen=True)
class Module:
    """A part of the model, or all of it where it has no name.

    ``whole``: it is given as ``models``, one slice of all layers.
    """

    name: str | None
    slices: tuple[Slice, ...]
    whole: bool
    parameters: Parameters
    place: Place


@dataclass(frozen=True)
class Tokens:
    """Where a token's row comes from, where the recipe says so.

    ``source`` is a model, or ``zero``, or a model with the token (or its id) whose row it is.
    """

    source: Reference | None = None
    zero: bool = False
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The merged model's tokenizer: ``base``, ``union``, or a model's."""

    source: str | Reference
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    place: Place = ("tokenizer",)

    @property
    def source_place(self) -> Place:
        """Where the source is named."""
        short = self.place[-1] == "tokenizer_source"
        return self.place if short else (*self.place, "source")


@dataclass(frozen=True)
class Recipe:
    """A document of a recipe."""

    method: str
    modules: tuple[Module, ...]
    base: Reference | None
    parameters: Parameters
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    place: Place = ()
    notes: tuple[str, ...] = ()

    def sources(self) -> Iterator[Source]:
        """Yield the sources in the order of the file."""
        for module in self.modules:
            for part in module.slices:
                yield from part.sources

    def references(self) -> Iterator[Reference]:
        """Yield every model that is named, the base first."""
        if self.base is not None:
            yield self.base
        for module in self.modules:
            for part in module.slices:
                if part.base is not None:
                    yield part.base
        yield from (source.model for source in self.sources())
        if self.tokenizer is not None:
            if isinstance(self.tokenizer.source, Reference):
                yield self.tokenizer.source
            for own in self.tokenizer.tokens.values():
                if own.source is not None:
                    yield own.source
