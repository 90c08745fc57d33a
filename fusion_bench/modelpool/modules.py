"""The modules of a pool's models, and those that are built of merged weights."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fusion_bench.modelpool.blueprint import blueprint
from fusion_bench.modelpool.build import build, config_of, read_whole, refuse_incomplete
from fusion_bench.modelpool.layouts import in_current_layout
from fusion_bench.modelpool.opened import OpenedModels
from fusion_bench.modelpool.output_tokens import OutputTokens
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.weights import Config, MergePolicy, Model, Weights, in_memory, zeros_like
from fusion_bench.weights.blueprint import Blueprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Modules:
    """Builds modules of one class in ``transformers``.

    Args:
        opened: the models.
        reference: the model that a merged one is built like.
        model_class: the class in ``transformers``.
        config_class: what reads the config of a model that is built.
        tokens: the merged model's tokenizer, where that is not the reference's.
        policy: tells the type of a merged model.
        canonical: gives the weights of a module the keys that the pool works with.
    """

    def __init__(
        self,
        opened: OpenedModels,
        reference: str,
        model_class: str,
        config_class: str,
        tokens: OutputTokens | None,
        policy: MergePolicy,
        canonical: Callable[[Weights], Weights],
    ):
        self._opened = opened
        self._reference = reference
        self._model_class = model_class
        self._config_class = config_class
        self._tokens = tokens
        self._policy = policy
        self._canonical = canonical
        self._blueprints: dict[str, Blueprint | None] = {}

    def load(self, name: str, weights: Callable[[], Weights]) -> nn.Module:
        """Return a model's own module, afresh.

        Args:
            name: the model.
            weights: gives its weights, where these and its config make the module.
        """
        source = self._opened.source(name)
        changes_rows = self._tokens is not None and self._tokens.changes_rows
        with within(*source.named.place):
            module = None if changes_rows else source.load()
        if module is not None:
            return module
        whole = source.home if self._opened.base(name) is None and not changes_rows else None
        if whole is None or self._model_class == "AutoModel":
            config = self.config_for(self._opened.built_like(name))
            return build(self._model_class, weights(), config)
        module, info = read_whole(self._model_class, whole)
        with within(*source.named.place):
            refuse_incomplete(f"'{whole.name}'", info)
        return module

    def build(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Return a module with these weights, of their own config or the reference's."""
        if isinstance(weights, Model) and weights.config is not None:
            config = self._opened.part_of(config_of(weights.config, self._config_class))
            return build(self._model_class, weights.weights, config)
        if isinstance(weights, Model):
            weights = weights.weights
        if self._opened.source(self._reference).config() is None:
            return self._copy(weights)
        return build(self._model_class, weights, self.config_for(self._reference))

    def as_built(self, weights: Weights) -> tuple[Weights, nn.Module]:
        """Return weights as the entries of the class that is built, and a module without values."""
        bare = self._opened.bare
        if bare is None:
            return weights, self._copy(zeros_like(weights))
        return in_current_layout(weights, bare), bare

    def blueprint(self, config: Config) -> Blueprint | None:
        """Return what is built by a config, each once."""
        asked = json.dumps(dict(config), sort_keys=True, default=str)
        if asked not in self._blueprints:
            self._blueprints[asked] = blueprint(
                config, self._model_class, self._config_class, self._opened.part_of, self._canonical
            )
        return self._blueprints[asked]

    def config_for(self, name: str) -> "PretrainedConfig | None":
        """Return what a model is built by; None for a module without a config."""
        config = self._opened.config_of(name)
        if config is None or self._tokens is None:
            return config
        return self._tokens.built_by(name, config)

    def _copy(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the reference's module with these weights."""
        module = self._opened.source(self._reference).load()
        if module is None:
            raise FusionBenchError(
                "it has no config.json, which tells how a module is built.",
                "Put it beside the weights, or save the merged weights instead.",
                place=("models", self._reference),
            )
        if self._policy.torch_dtype is not None:
            module.to(self._policy.torch_dtype)
        module.load_state_dict(in_memory(weights) if isinstance(weights, Weights) else weights)
        return module
