"""Any models of the transformers library that were fine-tuned from one pretrained model."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.modelpool.adapter_folder import generation_task, write_adapter
from fusion_bench.modelpool.build import check_class
from fusion_bench.modelpool.card import Origin, stored
from fusion_bench.modelpool.chat_templates import check_template
from fusion_bench.modelpool.comparison import ModelComparison
from fusion_bench.modelpool.directory import Folder, write_directories
from fusion_bench.modelpool.keys import under_current_names
from fusion_bench.modelpool.modules import Modules
from fusion_bench.modelpool.opened import OpenedModels
from fusion_bench.modelpool.output_tokens import OutputTokens
from fusion_bench.modelpool.planning import ModelPlan
from fusion_bench.modelpool.policy import policy_of
from fusion_bench.modelpool.processor import Processor
from fusion_bench.modelpool.reference_tokenizer import ReferenceTokenizer
from fusion_bench.modelpool.sources import Sources
from fusion_bench.modelpool.token_setting import TokenSetting
from fusion_bench.modelpool.written_companions import WrittenCompanions
from fusion_bench.plan import Plan
from fusion_bench.problems import (
    FusionBenchError,
    Problems,
    error_of,
)
from fusion_bench.repository import locate
from fusion_bench.sources import plain_source
from fusion_bench.storage import check_file_name
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.weights import (
    AdapterConfig,
    AdapterWeights,
    Config,
    MergePolicy,
    Model,
    Renamed,
    TensorWeights,
    Weights,
    check_size,
    is_special,
    open_checkpoint,
    open_repository,
)
from fusion_bench.weights.adapter_builder import AdaptedModel
from fusion_bench.weights.blueprint import Blueprint
from fusion_bench.weights.config import vocabulary

log = logging.getLogger(__name__)


class HFModelPool:
    """Named models: ``_pretrained_``, the common base, and the models to fuse.

    Weights are read from the checkpoints' files, tensor by tensor; a module is only built to be
    evaluated.

    Args:
        models: name to model: a Hub repository (``owner/name`` or ``owner/name@revision``), a local
            directory, a ``zoo:`` name, a file of weights, a directory with a LoRA adapter in PEFT's
            layout, a config node, or a module. A file's config is beside it, or else the
            reference's. An adapter's base is ``_pretrained_`` if its config names that one, and
            without ``_pretrained_`` the one that it names; ``{path: adapter, base: model}`` or
            ``model+adapter`` gives it another, which is a model of the pool or one more name.
            Names with a leading or trailing underscore take no part in the fusion.
        model_class: the class in ``transformers`` whose ``from_pretrained`` builds a model.
        processor: whose tokenizer and processor files go beside a merged model: a name as in
            ``models``, or a config node; by default the reference's, which is the pretrained
            model or else the first.
        policy: what to do where models differ; keys as in ``MergePolicy``.
        max_shard_size: of a merged model's files.
        train_datasets: name to dataset node, for methods that learn from training data.
        val_datasets: likewise, for methods that tune on validation data.
        test_datasets: likewise, for methods that adapt to unlabelled test data.
        tokenizer: ``union``, ``base`` or the name of a model: all models are seen with the rows of
            that tokenizer, matched by token, and the merged model gets it. A mapping says more:
            ``source``, one of these; ``base``, the model whose row a token gets that others lack,
            by default the pretrained one; ``tokens``, a token to its ``source`` (a model,
            ``{kind: model_token, model, token}`` or ``{kind: zero}``) and ``force``, for all
            models; ``pad_to_multiple_of``. Anything else says the same as ``processor``.
        chat_template: of the merged model's tokenizer: ``auto``, the most frequent of the models';
            a known name; or a text in Jinja.

    Raises:
        FusionBenchError: an empty pool, an impossible policy or size, or a name that no file can
            have.

    Attributes:
        notes: in sentences, what differs in models that were compared and are merged all the same.
    """

    #: The part of a config whose model is merged, where that is not the whole.
    _part: str | None = None
    #: What reads the config of a model that is built.
    _config_class = "AutoConfig"

    @keeps_arguments
    def __init__(
        self,
        models: Mapping[str, Any],
        model_class: str = "AutoModel",
        processor: Any = None,
        policy: Mapping[str, Any] | MergePolicy | None = None,
        max_shard_size: int | str = "5GB",
        train_datasets: Mapping[str, Any] | None = None,
        val_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ):
        self._sources = Sources(models or {}, model_class)
        problems = Problems()
        for name in self._sources:
            with problems.collect("models", name):
                check_file_name(name)
        with problems.collect():
            check_size(max_shard_size)
        with problems.collect("policy"):
            self.policy = policy if isinstance(policy, MergePolicy) else policy_of(policy or {})
        setting = None
        with problems.collect("tokenizer"):
            setting = TokenSetting.read(plain_source(tokenizer), self._sources)
        named = "processor"
        if setting is None and tokenizer is not None:
            named, processor = "tokenizer", tokenizer
        with problems.collect("chat_template"):
            check_template(chat_template)
        self.model_class = model_class
        self._processor = Processor(processor, self._sources, named) if processor else None
        self.max_shard_size = max_shard_size
        self.train_datasets = dict(train_datasets or {})
        self.val_datasets = dict(val_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.model_names = [name for name in self._sources if not is_special(name)]
        self.has_pretrained = "_pretrained_" in self._sources
        self._reference_tokenizer = ReferenceTokenizer(
            lambda: self._opened.source(self._reference), self._processor, lambda: self.vocabulary
        )
        self._tokens: OutputTokens | None = None
        if setting is not None or chat_template is not None:
            self._tokens = OutputTokens(
                setting,
                chat_template,
                list(dict.fromkeys([*["_pretrained_"] * self.has_pretrained, *self.model_names])),
                self._sources,
                TokenizerSource(self._reference_tokenizer.found),
                lambda name: self._opened.model(name),
                lambda name: self._opened.config_of(name),
                model_class,
            )
        self.notes: list[str] = []
        with problems.collect("models"):
            if not self.model_names:
                raise FusionBenchError(
                    "the pool is empty.",
                    "Name at least one model besides special ones such as '_pretrained_', for "
                    "example 'sun397: path/to/model'.",
                )
        problems.raise_all()
        self._opened = OpenedModels(
            self._sources,
            self._reference,
            model_class,
            self._config_class,
            self._part,
            self._canonical,
        )
        self._modules = Modules(
            self._opened,
            self._reference,
            model_class,
            self._config_class,
            self._tokens,
            self.policy,
            self._canonical,
        )
        self._companions = WrittenCompanions(
            lambda: self._opened.source(self._reference),
            lambda: (self.model(self._reference).config or {}).get("vocab_size"),
            self._processor,
            self._tokens,
            model_class,
            self.policy.dtype,
        )
        self._comparison = ModelComparison(
            self._opened.source,
            self._reference,
            self.policy,
            model_class,
            self._part,
            self._processor,
            self._tokens,
        )

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        """Find all models, and open those whose headers are enough; no weight is read.

        Args:
            scratch: where small files go that are not here, such as configs and indices, for a run
                that leaves nothing.
            built: whether modules are built of the models.
        """
        self._sources.scratch = scratch
        plan = Plan()
        if built:
            with plan.collect():
                check_class(self.model_class, keeps=scratch is None)
        ModelPlan(
            self._sources,
            self._reference,
            self._opened,
            self.weights,
            self._tokens,
            self._comparison,
        ).add_to(plan)
        if self._processor is not None:
            self._processor.plan(plan)
        return plan

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        """Compare what besides weights decides what the models compute with the reference's.

        That are configs, tokenizers, and how pictures are prepared, as far as they are known.

        Args:
            names: of which models; by default all.
            layers: whether they are to have the same layers.

        Returns:
            In sentences, what differs and is merged all the same; also kept as ``notes``.

        Raises:
            FusionBenchError: what differs and the policy does not allow, or a damaged file.
        """
        wanted = dict.fromkeys([self._reference, *self.model_names])
        chosen = [name for name in wanted if names is None or name in names]
        found = self._comparison.compare(chosen, layers)
        self.notes = list(found.notes)
        if found.refused:
            raise error_of(found.refused)
        return self.notes

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the reference's config says that it has."""
        return vocabulary(self._comparison.config(self._reference))

    @cached_property
    def tokenizer(self) -> TokenizerSource:
        """The models' tokenizer: the one that a merged model gets."""
        if (tokens := self._tokens) is not None:
            return TokenizerSource(
                lambda: tokens.tokenizer, unbuilt=self._reference_tokenizer.unbuilt
            )
        return self._reference_tokenizer.source

    def model(self, name: str) -> Model:
        """Return a model, with weights under the reference's keys.

        A model may stand inside a larger one: an encoder in a classifier. Its keys then lose, or
        get, the prefix that they have there.

        Raises:
            FusionBenchError: an unknown name, or a source that cannot be read or is quantised.
        """
        return self._opened.model(name) if self._tokens is None else self._tokens.model(name)

    def weights(self, name: str) -> Weights:
        """Return a model's weights, as in ``model``.

        Raises:
            FusionBenchError: as ``model``.
        """
        return self.model(name).weights

    def architecture(self, name: str | None = None) -> str:
        """Return a hash of what besides its weights tells what a model computes, its config.

        Without a name it is that of a merged model, which is built like the reference.
        """
        own = self._opened.source(self._reference if name is None else name).architecture()
        if self._tokens is not None:
            own = json.dumps([own, self._tokens.identity])
        return hashlib.sha256(own.encode()).hexdigest()

    def load_model(self, name: str) -> nn.Module:
        """Load a model afresh, in eval mode, on the CPU.

        Raises:
            FusionBenchError: as ``weights``, and a checkpoint that lacks some of the weights or
                has them in other shapes.
        """
        return self._modules.load(name, lambda: self.weights(name))

    def blueprint(self, config: Config) -> Blueprint | None:
        """Return what the pool's class builds by a config, under the keys that the pool works with.

        Nothing takes memory. ``None`` for an architecture that transformers does not know.

        Raises:
            FusionBenchError: a config that its class refuses.
        """
        return self._modules.blueprint(config)

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Return a module of the reference's architecture with these weights.

        A ``Model`` is built by its own config. Nothing is initialised to be thrown away, and
        tensors are taken over as they are. A module that transformers did not make is copied.

        Raises:
            FusionBenchError: weights that are not all of the model's, or no config.
        """
        return self._modules.build(weights)

    def as_built(self, weights: Weights) -> tuple[Weights, nn.Module]:
        """Return weights as the entries of the class that is built, and a module without values.

        Raises:
            FusionBenchError: no config, or none that the class fits.
        """
        return self._modules.as_built(weights)

    def save_model(
        self,
        model: nn.Module | Weights | Model,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a model as a Hugging Face directory, which appears whole or not at all.

        Beside the weights are the reference's config and tokenizer files, or those of a ``Model``,
        and a model card. The recipe is in the card and in the weights' metadata: ``config``, and
        each source with its files' hashes. Of an ``AdaptedModel`` the adapter is written alone, in
        PEFT's layout.

        Args:
            model: weights, which are computed as they are written, or a module.
            path: a directory; what is there is replaced.
            config: the run's config.
        """
        self.save_models([(model, Path(path), config)])

    def save_models(
        self,
        models: Sequence[tuple[nn.Module | Weights | Model, Path, Mapping[str, Any] | None]],
    ) -> None:
        """Write models as ``save_model`` does, in one pass over what they are made of.

        Args:
            models: each with its directory and its config.
        """
        sources = self.described()
        folders = []
        for model, path, config in models:
            if isinstance(model, AdaptedModel):
                self._save_adapter(model, path, sources, config)
            else:
                folders.append(self._folder(model, path.absolute(), config))
        if folders:
            write_directories(folders, sources=sources, max_shard_size=self.max_shard_size)

    def _folder(
        self, model: nn.Module | Weights | Model, path: Path, config: Mapping[str, Any] | None
    ) -> Folder:
        """Return what is written of a model."""
        own = model if isinstance(model, Model) else None
        if isinstance(model, Model):
            weights = model.weights
        elif isinstance(model, Weights):
            weights = model
        else:
            weights = self._opened.like_reference(TensorWeights(model.state_dict()))
        return Folder(path, self._for_file(weights), config, partial(self._beside, own))

    def _save_adapter(
        self,
        model: AdaptedModel,
        path: Path,
        sources: Mapping[str, Origin],
        config: Mapping[str, Any] | None,
    ) -> None:
        """Write an adapter alone, in PEFT's layout."""
        base, base_class = self._opened.source("_pretrained_").at, self._class_of_base()
        write_adapter(
            path.absolute(),
            model.adapter,
            base=base.repo_id or str(base.directory or base.name),
            revision=base.commit,
            base_class=base_class,
            task=generation_task(base_class),
            sources=sources,
            config=config,
        )

    def described(self) -> dict[str, Origin]:
        """Return where the models come from; their files are fetched.

        Of a model that is itself a merge they are its own models, as ``merge/model``.
        """
        return stored({name: source.described() for name, source in self._sources.items()})

    def open_saved(self, path: Path) -> Weights:
        """Return the weights that ``save_model`` wrote, under the pool's keys."""
        settings = path / "adapter_config.json"
        if settings.exists():
            adapter = open_checkpoint(path / "adapter_model.safetensors")
            base, _ = self.as_built(self.weights("_pretrained_"))
            return AdapterWeights(base, adapter, AdapterConfig.read(settings))
        return self._canonical(open_repository(locate(str(path))))

    def _class_of_base(self) -> str:
        """Return the class of transformers that makes the pretrained model."""
        named = (self._opened.source("_pretrained_").config() or {}).get("architectures")
        if self.model_class.startswith("Auto") and isinstance(named, list) and named:
            return self.model_class if self.model_class == "AutoModel" else str(named[0])
        return self.model_class

    def _canonical(self, weights: Weights) -> Weights:
        """Return a file's or a module's weights with the keys that the pool works with.

        A pool of bare models, ``AutoModel``, sees the backbone of a classifier without its head.
        """
        weights = under_current_names(weights)
        if self.model_class != "AutoModel" or self._opened.backbone_prefix is None:
            return weights
        prefix = f"{self._opened.backbone_prefix}."
        inside = [key for key in weights if key.startswith(prefix)]
        return Renamed(weights, {k.removeprefix(prefix): k for k in inside}) if inside else weights

    def _for_file(self, weights: Weights) -> Weights:
        """Return weights with the keys that they have in a file."""
        return weights

    def _beside(self, model: Model | None, directory: Path) -> None:
        """Write the companions of a model that is saved; warn where it has no config."""
        self.write_companions(model, directory)
        if not (directory / "config.json").exists():
            log.warning(
                "The merged weights are saved without a config.json, because the models have none."
            )

    def write_companions(self, model: Model | None, directory: Path) -> None:
        """Write config, tokenizer and processor files beside merged weights.

        Args:
            model: one with a config of its own, in place of the reference's.
            directory: where they go.
        """
        self._companions.write(model, directory)

    @property
    def _reference(self) -> str:
        return "_pretrained_" if self.has_pretrained else self.model_names[0]
