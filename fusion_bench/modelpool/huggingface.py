"""Any models of the transformers library that were fine-tuned from one pretrained model."""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_bench.companions import CONFIGS
from fusion_bench.modelpool.adapters import (
    Base,
    is_same_model,
    named_base,
    refusal,
    trained_on,
    with_bases,
)
from fusion_bench.modelpool.agreement import (
    PREPROCESSOR,
    Config,
    Found,
    compare_configs,
    compare_pictures,
    compare_vocabularies,
    holds,
    plain,
)
from fusion_bench.modelpool.card import Source
from fusion_bench.modelpool.directory import (
    copy_files,
    processors,
    sentence_transformer,
    tell_what_is_left,
    write_directory,
)
from fusion_bench.modelpool.keys import under_current_names, under_keys_of
from fusion_bench.modelpool.tokens import Vocabulary
from fusion_bench.plan import Plan, zoo_step
from fusion_bench.pretrained import from_config, from_pretrained, quantisation
from fusion_bench.problems import ConfigError, FusionBenchError, Problems, did_you_mean
from fusion_bench.repository import Repository, locate
from fusion_bench.sources import load, plain_source, reading, unbuilt
from fusion_bench.storage import check_file_name, read_json, write_text
from fusion_bench.trust import trusts_remote_code
from fusion_bench.weights import (
    AdapterConfig,
    AdapterWeights,
    HubWeights,
    MergePolicy,
    Renamed,
    TensorWeights,
    Weights,
    check_size,
    in_memory,
    is_special,
    open_checkpoint,
    open_repository,
    quantised,
    shortened,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class HFModelPool:
    """Named models: ``_pretrained_``, the common base, and the models to fuse.

    Weights are read from the checkpoints' files, tensor by tensor; a module is only built to be
    evaluated.

    Args:
        models: name to model: a Hub repository (``owner/name`` or ``owner/name@revision``), a local
            directory, a ``zoo:`` name, a file of weights, a directory with a LoRA adapter in PEFT's
            layout, a config node, or a module. A file's config is beside it, or else the
            reference's. An adapter's base is ``_pretrained_`` if its config names that one, and
            without ``_pretrained_`` the one that it names; ``{path: adapter, base: model}`` gives
            it another, which is a model of the pool or one more name.
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

    Raises:
        FusionBenchError: an empty pool, an impossible policy or size, or a name that no file can
            have.

    Attributes:
        notes: in sentences, what differs in models that were compared and are merged all the same.
    """

    #: The part of a config whose model is merged, where that is not the whole.
    _part: str | None = None

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
    ):
        self._models, self._bases = with_bases(models or {})
        problems = Problems()
        for name in self._models:
            with problems.collect("models", name):
                check_file_name(name)
        with problems.collect():
            check_size(max_shard_size)
        with problems.collect("policy"):
            self.policy = policy if isinstance(policy, MergePolicy) else _policy(policy or {})
        self.model_class = model_class
        self._processor = plain_source(processor)
        self.max_shard_size = max_shard_size
        self.train_datasets = dict(train_datasets or {})
        self.val_datasets = dict(val_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.model_names = [name for name in self._models if not is_special(name)]
        self.has_pretrained = "_pretrained_" in self._models
        self._stands_on: dict[str, Base] = {}
        self._repositories: dict[str, Repository] = {}
        self._by_header: dict[str, HubWeights] = {}
        self._scratch: Path | None = None
        self._node_configs: dict[str, Config] = {}
        self._found: dict[tuple[str, ...], Found] = {}
        self.notes: list[str] = []
        with problems.collect("models"):
            if not self.model_names:
                raise FusionBenchError(
                    "the pool is empty.",
                    "Name at least one model besides special ones such as '_pretrained_', for "
                    "example 'sun397: path/to/model'.",
                )
        problems.raise_all()

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        """Find all models, and open those whose headers are enough; no weight is read.

        Args:
            scratch: where small files go that are not here, such as configs and indices, for a run
                that leaves nothing.
            built: whether modules are built of the models.
        """
        self._scratch = scratch
        plan = Plan()
        if built:
            with plan.collect("model_class"):
                self._transformers_class()
        known = []
        for name in self._models:
            with plan.collect("models", name):
                if self._find(name, plan):
                    known.append(name)
        known = [name for name in known if self._can_be_read(name, known)]
        if self._reference in known:
            with plan.collect("models", self._reference):
                plan.weights[self._reference] = self.weights(self._reference)
        for name in known:
            if name == self._reference:
                continue
            with plan.collect("models", name):
                if self._reference in plan.weights:
                    plan.weights[name] = self.weights(name)
                    self._refuse_untied(name)
                elif not self._is_adapter(name):  # nothing to compare with, but it can be damaged
                    self._weights(name)
        for name in known:
            with plan.collect("models", name):
                self._plan_comparison(name, plan)
        if isinstance(self._processor, str) and unbuilt(self._processor) is None:
            with plan.collect("processor"):
                processor = self._located(self._processor)
                plan.download(processor, *processors(processor))
        return plan

    def _find(self, name: str, plan: Plan) -> bool:
        """Note what of a model is not here; tell whether its header can be read all the same."""
        source = self._models[name]
        if isinstance(source, Mapping):  # only calling it tells more
            named = source.get("pretrained_model_name_or_path")
            if isinstance(named, str) and unbuilt(named) is None:
                revision = source.get("revision")
                self._located(f"{named}@{revision}" if revision else named)
            return False
        if not isinstance(source, str):
            return isinstance(source, nn.Module)
        if place := unbuilt(source):
            plan.add(zoo_step(place))
            return False
        if _is_file(source):
            self._refuse_base(name)
            return True
        repository = self._repository(name)
        if self._is_adapter(name):
            files = [_ADAPTER_CONFIG, *(f for f in _ADAPTER_FILES[:1] if f in repository.files)]
            plan.download(repository, *files)
            pretrained = self._models.get("_pretrained_")
            if isinstance(pretrained, str) and unbuilt(pretrained):
                return False  # nothing to hold the adapter's base against
            return self._finds_base(name, plan) and repository.has(*files)
        self._refuse_base(name)
        return self._has_header(name, repository, plan)

    def _finds_base(self, name: str, plan: Plan) -> bool:
        """Note what of an adapter's base is not here, and say what its own config does not."""
        self._stem(name)  # is there
        base, declared = self._base(name), self._adapter_config(self._repository(name)).base
        if base.model is not None:  # which is looked for in its turn
            if declared is None:
                plan.note(f"{name}: the adapter names no base; it is put on '{base.model}'.")
            elif name in self._bases:
                plan.note(
                    f"{name}: the adapter's config says that it was trained on '{declared}'; it is "
                    f"put on '{base.model}', as modelpool.models.{name}.base says."
                )
            return True
        if place := unbuilt(base.source):
            plan.add(zoo_step(place))
            return False
        whole = self._whole_model(name)
        return _is_file(base.source) or self._has_header(name, whole, plan)

    def _can_be_read(self, name: str, known: Collection[str]) -> bool:
        """Tell whether a model's header can be read, and those of what it stands on."""
        above = self._stands_on.get(name, Base()).model
        return name in known and (above is None or self._can_be_read(above, known))

    def _has_header(self, name: str, repository: Repository, plan: Plan) -> bool:
        """Note the files of a whole model; tell whether there is a header that can be read."""
        self._refuse_quantised(name, repository)
        files = weight_files(repository)
        plan.download(repository, *files, *(repository.files & set(CONFIGS)))
        return "safetensors" in files[0] or repository.has(*files)

    def _is_adapter(self, name: str) -> bool:
        source = self._models[name]
        if not isinstance(source, str) or _is_file(source):
            return False
        return _ADAPTER_CONFIG in self._repository(name).files

    def _refuse_untied(self, name: str) -> None:
        """Refuse a model with an output layer of its own where the merged model would have none."""
        if not isinstance(self._models[name], str) or self.policy.on_extra != "error":
            return
        if not isinstance(self._models[self._reference], str):
            return
        if not isinstance(self._models[self._stem(name)], str):
            return
        own, reference = (
            self._json_config(self._whole_model(each)).get("tie_word_embeddings")
            for each in (name, self._reference)
        )
        if own is False and reference is True:
            raise FusionBenchError(
                f"modelpool.models.{name}: its output layer is untied (tie_word_embeddings in its "
                f"config.json), that of '{self._reference}' is tied, so that a merged model would "
                "lose it. Name models that are tied alike, or give "
                "modelpool.policy.on_extra=drop to leave it out."
            )

    def compare(self, names: Collection[str] | None = None) -> list[str]:
        """Compare what besides weights decides what the models compute with the reference's.

        That are configs, tokenizers, and how pictures are prepared, as far as they are known.

        Args:
            names: of which models; by default all.

        Returns:
            In sentences, what differs and is merged all the same; also kept as ``notes``.

        Raises:
            FusionBenchError: what differs and the policy does not allow, or a damaged file.
        """
        wanted = dict.fromkeys([self._reference, *self.model_names])
        chosen = tuple(name for name in wanted if names is None or name in names)
        if chosen not in self._found:
            self._found[chosen] = self._compared(chosen)
        found = self._found[chosen]
        self.notes = list(found.notes)
        if found.refused:
            raise FusionBenchError("\n".join(found.refused))
        return self.notes

    def _compared(self, names: Collection[str]) -> Found:
        found = Found()
        configs = {name: config for name in names if (config := self._config(name))}
        if configs:
            warn = self.policy.on_config == "warn"
            heads = self.model_class != "AutoModel"  # of a classifier it takes the backbone
            found += compare_configs(configs, warn=warn, part=self._part, heads=heads)
        vocabularies = {name: own for name in names if (own := self._vocabulary(name))}
        if further := self._processors_vocabulary():
            vocabularies[f"the tokenizer of '{self._processor}'"] = further
        if vocabularies:
            warn = self.policy.on_tokenizer == "warn"
            found += compare_vocabularies(vocabularies, warn=warn)
        pictures = {name: said for name in names if (said := self._preprocessor(name))}
        return found + compare_pictures(pictures) if pictures else found

    def _config(self, name: str) -> Config | None:
        """Return the config of a model, or of the one that an adapter stands on, if it has any."""
        stem = self._stem(name)
        source = self._models[stem]
        if isinstance(source, nn.Module):
            return _config_of(source)
        if not isinstance(source, str):
            return self._node_configs.get(stem)
        return self._json_config(self._whole_model(name)) or None

    def _place(self, name: str) -> Repository | None:
        """Return where a model's config is; None for one that is not read from files."""
        return self._whole_model(name) if isinstance(self._models[self._stem(name)], str) else None

    def _vocabulary(self, name: str) -> Vocabulary | None:
        """Return a model's tokenizer; None where it has none, or none of the models has tokens."""
        if not isinstance(self._models[name], str) or self._part or not self.vocabulary:
            return None
        own = Vocabulary.of(self._repository(name))
        place = self._place(name)
        return own if own is not None or place is None else Vocabulary.of(place)

    def _processors_vocabulary(self) -> Vocabulary | None:
        """Return the tokenizer that goes beside a merged model, if it is not the reference's."""
        if not isinstance(self._processor, str) or self._part or not self.vocabulary:
            return None
        return Vocabulary.of(self._located(self._processor))

    def _preprocessor(self, name: str) -> Config | None:
        """Return how a model's pictures are prepared; None where it does not say so."""
        place = self._place(name)
        if place is None or PREPROCESSOR not in place.files:
            return None
        content = read_json(place.fetch(PREPROCESSOR) / PREPROCESSOR)
        return content if isinstance(content, dict) else None

    def _plan_comparison(self, name: str, plan: Plan) -> None:
        """Note the files that are needed to compare a model."""
        if own := self._vocabulary(name):
            plan.download(own.repository, *own.needed())
        place = self._place(name)
        if place is not None and PREPROCESSOR in place.files:
            plan.download(place, PREPROCESSOR)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the reference's config says that it has."""
        source = self._models[self._reference]
        if isinstance(source, nn.Module):
            config = _config_of(source) or {}
        elif isinstance(source, str):
            config = self._json_config(self._whole_model(self._reference))
        else:
            return None
        of_text = config.get("text_config")
        size = config.get("vocab_size")
        if not size and isinstance(of_text, Mapping):
            size = of_text.get("vocab_size")
        return size if isinstance(size, int) else None

    def weights(self, name: str) -> Weights:
        """Return a model's weights, under the reference's keys.

        A model may stand inside a larger one: an encoder in a classifier. Its keys then lose, or
        get, the prefix that they have there.

        Raises:
            FusionBenchError: an unknown name, or a source that cannot be read or is quantised.
        """
        if name == self._reference:
            return self._reference_weights
        return under_keys_of(self._reference_weights, self._weights(name))

    def architecture(self, name: str | None = None) -> str:
        """Return a hash of what besides its weights tells what a model computes, its config.

        Without a name it is that of a merged model, which is built like the reference.
        """
        name = self._reference if name is None else name
        self._source(name)  # is there
        source = self._models[self._stem(name)]
        if isinstance(source, str):
            config = self._json_config(self._whole_model(name))
            text = json.dumps([self.model_class, config], sort_keys=True)
        elif isinstance(source, nn.Module):
            text = f"{getattr(source, 'config', '')}{source}"
        else:
            text = json.dumps(source, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def load_model(self, name: str) -> "PreTrainedModel":
        """Load a model afresh, in eval mode, on the CPU.

        Raises:
            FusionBenchError: as ``weights``, and a checkpoint that lacks some of the weights or
                has them in other shapes.
        """
        source = self._source(name)
        if isinstance(source, nn.Module):
            return deepcopy(source).eval()
        if not isinstance(source, str):
            return self._module(name).eval()
        built = self.model_class == "AutoModel" or _is_file(source)
        if built or _ADAPTER_CONFIG in self._repository(name).files:
            return self._built(self.weights(name), self._model_config(self._with_config(name)))
        model, info = self._from_pretrained(self._repository(name))
        _refuse_incomplete(f"modelpool.models.{name}: '{source}'", info)
        return model.eval()

    def build_model(self, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
        """Return a module of the reference's architecture with these weights.

        Nothing is initialised to be thrown away, and tensors are taken over as they are.

        Raises:
            FusionBenchError: weights that are not all of the model's.
        """
        return self._built(weights, self._model_config())

    def _with_config(self, name: str) -> str:
        """Return whose config a model is built with: its own where it has one.

        One that stands inside a larger model, or has the reference inside, is seen under the
        reference's keys, and is built like it.
        """
        own, reference = self._config(name), self._config(self._reference)
        if own is None or (reference and (holds(own, reference) or holds(reference, own))):
            return self._reference
        return self._stem(name)

    def _built(self, weights: Mapping[str, Tensor], config: Any) -> "PreTrainedModel":
        tensors = in_memory(weights) if isinstance(weights, Weights) else dict(weights)
        floating = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
        model_class = _concrete(self._transformers_class(), config)
        options = {}
        if "add_pooling_layer" in signature(model_class).parameters:
            options["add_pooling_layer"] = any(key.startswith("pooler.") for key in tensors)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=floating[0] if floating else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trusts_remote_code(),
            **options,
        )
        _refuse_incomplete("The merged model", info)
        return model.eval()

    def save_model(
        self,
        model: nn.Module | Weights,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a model as a Hugging Face directory, which appears whole or not at all.

        Beside the weights are the reference's config and tokenizer files and a model card. The
        recipe is in the card and in the weights' metadata: ``config``, and each source with its
        files' hashes.

        Args:
            model: weights, which are computed as they are written, or a module.
            path: a directory; what is there is replaced.
            config: the run's config.
        """
        weights = model if isinstance(model, Weights) else TensorWeights(model.state_dict())
        write_directory(
            Path(path).absolute(),
            self._for_file(weights),
            sources={name: self._described(name) for name in self._models},
            config=config,
            max_shard_size=self.max_shard_size,
            write_companions=self._write_companions,
        )

    def open_saved(self, path: Path) -> Weights:
        """Return the weights that ``save_model`` wrote, under the pool's keys."""
        return self._canonical(open_repository(locate(str(path))))

    def _canonical(self, weights: Weights) -> Weights:
        """Return a file's or a module's weights with the keys that the pool works with.

        A pool of bare models, ``AutoModel``, sees the backbone of a classifier without its head.
        """
        weights = under_current_names(weights)
        if self.model_class != "AutoModel" or self._backbone_prefix is None:
            return weights
        prefix = f"{self._backbone_prefix}."
        inside = [key for key in weights if key.startswith(prefix)]
        return Renamed(weights, {k.removeprefix(prefix): k for k in inside}) if inside else weights

    @cached_property
    def _backbone_prefix(self) -> str | None:
        """What a larger model of the reference's kind puts before the keys of the bare one."""
        source = self._models[self._reference]
        if isinstance(source, nn.Module):
            return getattr(source, "base_model_prefix", None) or None
        if not isinstance(source, str):
            return None
        import transformers

        config = self._json_config(self._whole_model(self._reference))
        names = config.get("architectures")
        for name in names if isinstance(names, list) else ():
            prefix = getattr(getattr(transformers, str(name), None), "base_model_prefix", None)
            if isinstance(prefix, str) and prefix:
                return prefix
        return None

    def _for_file(self, weights: Weights) -> Weights:
        """Return weights with the keys that they have in a file."""
        return weights

    def _write_companions(self, directory: Path) -> None:
        """Write config, tokenizer and processor files beside merged weights."""
        if isinstance(self._models[self._reference], str):
            self._copy_companions(self._whole_model(self._reference), directory)
        elif (config := self._model_config()) is not None:
            config.save_pretrained(directory)
        if isinstance(self._processor, str):
            source = self._located(self._processor)
            if not (names := processors(source)):
                raise FusionBenchError(
                    f"'{self._processor}' has neither a tokenizer nor a processor. Name another "
                    "source, or none to take the pretrained model's."
                )
            copy_files(source, names, directory)
        elif self._processor is not None:
            load("processor", self._processor, "modelpool.processor").save_pretrained(directory)
        file = directory / "config.json"
        if not file.exists():
            log.warning("No config.json goes beside the merged weights: the models bring none.")
            return
        config = read_json(file)
        before = deepcopy(config)
        if self.policy.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = self.policy.dtype
        named = config.get("architectures") or []
        if self.model_class == "AutoModel" and re.search("For|Head", json.dumps(named)):
            del config["architectures"]  # a classifier's, of which this is the backbone
        rows = self._embedding_rows()
        if rows is not None and "vocab_size" in config:
            config["vocab_size"] = rows
        if config != before:
            write_text(file, json.dumps(config, indent=2) + "\n")

    def _copy_companions(self, model: Repository, directory: Path) -> None:
        """Copy what belongs to the reference beside its weights; say what does not come along."""
        names = [*(model.files & set(CONFIGS)), *sentence_transformer(model)]
        own = self._repository(self._reference)
        beside = processors(own)  # a trainer puts them beside an adapter, with the tokens it added
        if self._processor is None and own != model and beside:
            copy_files(own, beside, directory)
        elif self._processor is None:
            names += processors(model)
        copy_files(model, names, directory)
        self._tell_what_is_left(names)

    def _tell_what_is_left(self, copied: Collection[str]) -> None:
        """Name in the log what the reference's folder has that a merged model's does not."""
        source = self._models[self._reference]
        if isinstance(source, str) and not _is_file(source):
            tell_what_is_left(self._whole_model(self._reference), copied)

    def _embedding_rows(self) -> int | None:
        """Return how many tokens an adapter made of its base's; None where it left them alone."""
        weights = self._reference_weights
        vocabulary = self.vocabulary
        if not isinstance(weights, AdapterWeights) or vocabulary is None:
            return None
        return next((rows for old, rows in weights.resized() if old == vocabulary), None)

    @cached_property
    def _reference_weights(self) -> Weights:
        return self._weights(self._reference)

    @property
    def _reference(self) -> str:
        return "_pretrained_" if self.has_pretrained else self.model_names[0]

    def _source(self, name: str) -> Any:
        if name not in self._models:
            raise FusionBenchError(
                f"Model '{name}' is not in the pool. " + did_you_mean(name, self._models)
            )
        return self._models[name]

    def _described(self, name: str) -> Source:
        source = self._models[name]
        if not isinstance(source, str):
            module = isinstance(source, nn.Module)
            return Source(
                f"a {type(source).__name__}" if module else json.dumps(source, default=str)
            )
        repository = self._repository(name)
        base = None
        if self._is_adapter(name):
            model = self._base(name).model
            whole = None if model is not None else self._whole_model(name)
            base = Source(model or "") if whole is None else Source(whole.name, whole.commit)
        return Source(repository.name, repository.commit, self.weights(name).files, base)

    def _repository(self, name: str) -> Repository:
        """Return where a model lies that is given by name."""
        return self._located(self._models[name])

    def _located(self, source: str) -> Repository:
        """Return where a source lies; looked for once, so that all its files are of one state."""
        if source not in self._repositories:
            if _is_file(source):
                place = locate(str(Path(source).expanduser().absolute().parent))
                self._repositories[source] = replace(place, name=source)
            else:
                self._repositories[source] = locate(source, self._scratch)
        return self._repositories[source]

    def _whole_model(self, name: str) -> Repository:
        """Return where the model is that an adapter is put on; a whole model's own place.

        Raises:
            FusionBenchError: an adapter whose base is not there, not told, or another.
        """
        stem = self._stem(name)
        if stem not in self._stands_on:
            return self._repository(stem)
        source = self._stands_on[stem].source
        try:
            return self._located(source)
        except FusionBenchError as error:
            if stem in self._bases:
                raise type(error)(f"modelpool.models.{stem}.base: {error}") from error
            raise type(error)(
                f"modelpool.models.{stem}: {error} The adapter names it as its base model. "
                "Add the base as '_pretrained_' to modelpool.models."
            ) from error

    def _stem(self, name: str) -> str:
        """Return the model of the pool that an adapter stands on in the end; or itself.

        Raises:
            FusionBenchError: adapters that stand on each other, or as ``_base``.
        """
        stem, above = name, []
        while self._is_adapter(stem) and (model := self._base(stem).model) is not None:
            above.append(stem)
            if model in above:
                raise ConfigError(
                    f"modelpool.models.{name}: its base stands on itself: "
                    f"{' on '.join([*above, model])}. Name a whole model as the base of one."
                )
            stem = model
        return stem

    def _refuse_base(self, name: str) -> None:
        """Raise for a whole model that is given a base."""
        if name in self._bases:
            source = self._models[name]
            raise ConfigError(
                f"modelpool.models.{name}.base: '{source}' is no adapter, and only adapters have a "
                f"base. Leave 'base' away."
            )

    def _base(self, name: str) -> Base:
        """Return what an adapter is put on.

        Raises:
            FusionBenchError: it was trained on another model than ``_pretrained_``, or names none.
        """
        if name not in self._stands_on:
            self._stands_on[name] = self._found_base(name)
        return self._stands_on[name]

    def _found_base(self, name: str) -> Base:
        if name in self._bases:
            return named_base(name, self._bases[name], self._models)
        config = self._adapter_config(self._repository(name))
        if not self.has_pretrained or name == "_pretrained_":
            if config.base is None:
                raise ConfigError(
                    f"modelpool.models.{name}: the adapter names no base model. Add "
                    "'_pretrained_' to modelpool.models, or give "
                    f"modelpool.models.{name}.path and .base."
                )
            return trained_on(config)
        if config.base is not None:
            source, place = self._pretrained_place()
            if not is_same_model(config, source, place):
                raise refusal(name, self._models[name], config, source)
        return Base(model="_pretrained_")

    def _pretrained_place(self) -> tuple[str, Repository]:
        """Return what ``_pretrained_`` is called, and where it is, as far as that is known."""
        source = self._models["_pretrained_"]
        if isinstance(source, str):
            return source, self._repository("_pretrained_")
        if isinstance(source, Mapping):
            named = str(source.get("pretrained_model_name_or_path", ""))
            revision = source.get("revision")
            named = f"{named}@{revision}" if revision else named
        else:
            named = str(getattr(getattr(source, "config", None), "name_or_path", ""))
        directory = Path(named) if named and Path(named).is_dir() else None
        return named or f"a {type(source).__name__}", Repository(named, frozenset(), directory)

    def _adapter_config(self, repository: Repository) -> AdapterConfig:
        return AdapterConfig.read(repository.fetch(_ADAPTER_CONFIG) / _ADAPTER_CONFIG)

    def _weights(self, name: str) -> Weights:
        """Return a model's weights under its own keys."""
        source = self._source(name)
        if not isinstance(source, str):
            return self._canonical(TensorWeights(self._module(name).state_dict()))
        if _is_file(source):
            self._refuse_base(name)
            weights: Weights = open_checkpoint(Path(source).expanduser())
            _refuse_scales(name, source, weights)
            return self._canonical(weights)
        repository = self._repository(name)
        if _ADAPTER_CONFIG not in repository.files:
            self._refuse_base(name)
            return self._canonical(self._stored(name, repository))
        base = self._base_weights(name)
        file = next((name for name in _ADAPTER_FILES if name in repository.files), None)
        if file is None:
            raise FusionBenchError(
                f"modelpool.models.{name}: there are no weights in '{source}'. It needs one of: "
                f"{', '.join(_ADAPTER_FILES)}."
            )
        adapter = open_checkpoint(repository.fetch(file) / file)
        config = self._adapter_config(repository)
        return AdapterWeights(base, adapter, config)

    def _base_weights(self, name: str) -> Weights:
        """Return the weights that an adapter is put on."""
        self._stem(name)  # is there
        base = self._base(name)
        if base.model is not None:
            at_hand = base.model == self._reference
            return self._reference_weights if at_hand else self._weights(base.model)
        if _is_file(base.source):
            return self._canonical(open_checkpoint(Path(base.source).expanduser()))
        return self._canonical(self._stored(name, self._whole_model(name)))

    def _stored(self, name: str, repository: Repository) -> Weights:
        """Return the weights in a repository as they are; quantised ones are refused.

        A header that was asked for on the Hub is kept.
        """
        self._refuse_quantised(name, repository)
        if repository.name not in self._by_header:
            weights = open_repository(repository)
            _refuse_scales(name, repository.name, weights)
            if not isinstance(weights, HubWeights):
                return weights
            self._by_header[repository.name] = weights
        return self._by_header[repository.name]

    def _refuse_quantised(self, name: str, repository: Repository) -> None:
        if method := quantisation(self._json_config(repository)):
            raise FusionBenchError(
                f"modelpool.models.{name}: '{repository.name}' is quantised ({method}), and "
                "quantised weights cannot be merged. Name the model that it was made from."
            )

    def _json_config(self, repository: Repository) -> dict[str, Any]:
        if "config.json" not in repository.files:
            return {}
        content = read_json(repository.fetch("config.json") / "config.json")
        return content if isinstance(content, dict) else {}

    def _module(self, name: str) -> nn.Module:
        """Return a model that is given as a module, or by a config node."""
        module = load("model", self._source(name), f"modelpool.models.{name}")
        if not isinstance(module, nn.Module):
            raise FusionBenchError(
                f"modelpool.models.{name}: expected a repository, a directory or a module, "
                f"got {type(module).__name__}."
            )
        if (config := _config_of(module)) is not None:
            self._node_configs[name] = config
        return module

    def _transformers_class(self) -> Any:
        import transformers

        try:
            return getattr(transformers, self.model_class)
        except AttributeError as error:
            known = [name for name in dir(transformers) if name.startswith("AutoModel")]
            hint = did_you_mean(self.model_class, known)
            raise FusionBenchError(
                f"modelpool.model_class: transformers has no '{self.model_class}'. {hint}"
            ) from error

    def _model_config(self, name: str | None = None) -> Any:
        """Return a model's config, by default the reference's; None for a module without one."""
        name = name or self._reference
        source = self._models[name]
        if not isinstance(source, str):
            return getattr(self._module(name), "config", None)
        from transformers import AutoConfig

        repository = self._whole_model(name)
        with reading("model", repository.name):
            return from_pretrained(AutoConfig, repository.fetch("config.json", *repository.code))

    def _from_pretrained(self, repository: Repository) -> Any:
        """Return module and loading info of a checkpoint."""
        names = ["config.json", *weight_files(repository)]
        model_class = self._transformers_class()
        with reading("model", repository.name), _a_class_that_fits():
            return from_pretrained(
                model_class,
                repository.fetch(*names, *repository.code),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )


def _config_of(module: nn.Module) -> dict[str, Any] | None:
    """Return a module's config as plain data, if it has one as those of transformers have."""
    config: Any = getattr(module, "config", None)
    return plain(config.to_dict()) if hasattr(config, "to_dict") else None


def _is_file(source: str) -> bool:
    with suppress(RuntimeError):  # the home directory of nobody known
        return Path(source).expanduser().is_file()
    return False


def _refuse_scales(name: str, source: str, weights: Weights) -> None:
    """Refuse weights that mean nothing without their scales."""
    if told := quantised(weights):
        raise FusionBenchError(
            f"modelpool.models.{name}: '{source}' is quantised ({told}), and such weights mean "
            "nothing without their scales, so they cannot be merged. Name the model that it was "
            "made from, or a copy with plain weights."
        )


def _policy(section: Mapping[str, Any]) -> MergePolicy:
    known = MergePolicy.options()
    for name in section:
        if name not in known:
            hint = did_you_mean(name, known)
            raise FusionBenchError("there is no such key.", hint, place=(name,))
    return MergePolicy(**section)


def _concrete(model_class: Any, config: Any) -> Any:
    """Return the class that an ``AutoModel…`` stands for."""
    if hasattr(model_class, "config_class"):
        return model_class
    with torch.device("meta"), _a_class_that_fits():  # which costs no memory
        return type(from_config(model_class, config))


@contextmanager
def _a_class_that_fits() -> Iterator[None]:
    """Name the class where an ``AutoModel…`` knows none for the architecture."""
    try:
        yield
    except ValueError as error:
        first_line = str(error).partition("\n")[0]
        if not first_line.startswith("Unrecognized configuration class"):
            raise
        raise FusionBenchError(f"modelpool.model_class: {first_line}") from error


def _refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """Raise for keys that transformers had to make up, or could not use."""
    problems = [f"lacks '{key}'" for key in sorted(info["missing_keys"])]
    problems += [
        f"'{key}' is {list(found)}, its config.json says {list(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    if problems:
        raise FusionBenchError(f"{name} is not a whole model.\n  {shortened(problems)}")
