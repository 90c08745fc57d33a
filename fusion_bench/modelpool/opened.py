"""The models of a pool, opened: under the keys of the reference, and in its layout."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from fusion_bench.modelpool.agreement import holds
from fusion_bench.modelpool.build import skeleton
from fusion_bench.modelpool.keys import under_keys_of
from fusion_bench.modelpool.layouts import in_current_layout, in_file_layout, in_layout_of
from fusion_bench.modelpool.sources import Source, Sources
from fusion_bench.problems import FusionBenchError, did_you_mean, within
from fusion_bench.weights import Model, Weights, learned

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class OpenedModels:
    """The models of a pool, each opened once.

    Args:
        sources: how the models are named.
        reference: the model that a merged one is built like.
        model_class: the class in ``transformers`` that is built.
        config_class: what reads the config of a model that is built.
        part: of a config whose model is merged, where that is not the whole.
        canonical: gives the weights of a file the keys that the pool works with.
    """

    def __init__(
        self,
        sources: Sources,
        reference: str,
        model_class: str,
        config_class: str,
        part: str | None,
        canonical: Callable[[Weights], Weights],
    ):
        self._sources = sources
        self._reference = reference
        self._model_class = model_class
        self._config_class = config_class
        self._part = part
        self._canonical = canonical
        self._models: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        """Return a model with the rows of its own tokenizer."""
        if name == self._reference:
            return self.reference_model
        if name not in self._models:  # a run asks for each many times
            own = self.open(self.source(name))
            with within("models", name):
                own = replace(own, weights=self.like_reference(own.weights))
            self._models[name] = own
        return self._models[name]

    def like_reference(self, weights: Weights) -> Weights:
        """Return weights with the reference's keys, and in its layout, as far as both are known."""
        reference = self.reference_model.weights
        named = under_keys_of(reference, weights)
        strange = [key for key in learned(named) if key not in reference]
        if not strange:
            return named
        model = self.bare
        return named if model is None else in_layout_of(reference, named, model)

    @cached_property
    def bare(self) -> "PreTrainedModel | None":
        """The reference's architecture; None where it is none of transformers."""
        if self.source(self._reference).config() is None:
            return None
        config = self.config_of(self._reference)
        return None if config is None else skeleton(self._model_class, config)

    def config_of(self, name: str) -> "PretrainedConfig | None":
        """Return a model's own config, as transformers has it."""
        source = self.source(name)
        with within(*source.named.place):
            return self.part_of(source.config_for(self._config_class))

    def part_of(self, config: "PretrainedConfig | None") -> "PretrainedConfig | None":
        """Return the part of a config that the pool's models are built by."""
        return config if self._part is None else getattr(config, self._part, config)

    def built_like(self, name: str) -> str:
        """Return whose config a model is built with: its own where it has one.

        One that stands inside a larger model, or has the reference inside, is seen under the
        reference's keys, and is built like it.
        """
        own, reference = (self.source(each).config() for each in (name, self._reference))
        if own is None or (reference and (holds(own, reference) or holds(reference, own))):
            return self._reference
        return name

    @cached_property
    def backbone_prefix(self) -> str | None:
        """What a larger model of the reference's kind puts before the keys of the bare one."""
        return self.source(self._reference).prefix

    @cached_property
    def reference_model(self) -> Model:
        """The model that a merged one is built like."""
        return self.open(self.source(self._reference))

    def source(self, name: str) -> Source:
        """Return how a model is named."""
        if name not in self._sources:
            hint = did_you_mean(name, self._sources)
            raise FusionBenchError(f"Model '{name}' is not in the pool.", hint)
        with within("models", name):
            return self._sources[name]

    def base(self, name: str) -> Source | None:
        """Return what an adapter is put on; None for a whole model."""
        source = self.source(name)
        with within(*source.named.place):
            return source.base

    def open(self, source: Source) -> Model:
        """Return a model, with the keys that the pool works with."""
        with within(*source.named.place):
            base = source.base
        if base is None:
            with within(*source.named.place):
                model = source.open(None)
                return replace(model, weights=self._canonical(model.weights))
        at_hand = base.named.name == self._reference
        below = self.reference_model if at_hand else self.open(base)
        with within(*source.named.place):
            try:
                return source.open(below)
            except FusionBenchError:
                for other in self._in_other_layouts(below, base):
                    with suppress(FusionBenchError):  # or else the first error, with own names
                        return source.open(other)
                raise

    def _in_other_layouts(self, model: Model, source: Source) -> Iterator[Model]:
        """Yield a model as its class in transformers names its entries, and as it writes them."""
        config = None if source.config() is None else source.config_for(self._config_class)
        if (part := self.part_of(config)) is not None:
            bare = skeleton(self._model_class, part)
            for layout in (in_current_layout, in_file_layout):
                yield replace(model, weights=layout(model.weights, bare))
