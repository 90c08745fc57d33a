"""Any models of the transformers library that were fine-tuned from one pretrained model."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.modelpool.card import Source, model_card, recipe
from fusion_bench.repository import Repository, locate
from fusion_bench.sources import load, reading
from fusion_bench.storage import file_sha256, whole_directory, write_text
from fusion_bench.weights import (
    AdapterConfig,
    AdapterWeights,
    MergePolicy,
    Renamed,
    TensorWeights,
    Weights,
    in_memory,
    is_special,
    open_checkpoint,
    open_repository,
    shortened,
    weight_files,
    without_prefix,
    write_checkpoint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "pretrained_model_name_or_path"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: What is copied beside merged weights; no weights, no code.
_CONFIGS = ("config.json", "generation_config.json")
_PROCESSORS = (
    "*token*.json",
    "*token*.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "*processor_config.json",
)


class HFModelPool:
    """Named models: ``_pretrained_``, the common base, and the models to fuse.

    Weights are read from the checkpoints' files, tensor by tensor; a module is only built to be
    judged.

    Args:
        models: name to model: a Hub repository (``owner/name`` or ``owner/name@revision``), a local
            directory, a ``zoo:`` name, a directory with a LoRA adapter in PEFT's layout, a config
            node, or a module. An adapter's base is ``_pretrained_``, or else the one that it names.
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
        FusionBenchError: an empty pool, or an impossible policy.
    """

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
        self._models = {str(name): _plain_source(model) for name, model in (models or {}).items()}
        self.model_class = model_class
        self._processor = _plain_source(processor)
        self.policy = policy if isinstance(policy, MergePolicy) else _policy(policy or {})
        self.max_shard_size = max_shard_size
        self.train_datasets = dict(train_datasets or {})
        self.val_datasets = dict(val_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.model_names = [name for name in self._models if not is_special(name)]
        self.has_pretrained = "_pretrained_" in self._models
        self._repositories: dict[str, Repository] = {}
        if not self.model_names:
            raise FusionBenchError(
                "modelpool.models: the pool is empty. Name at least one model besides special "
                "ones such as '_pretrained_', for example 'sun397: path/to/model'."
            )

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the reference's config says that it has."""
        source = self._models[self._reference]
        if not isinstance(source, str):
            return None
        config = self._json_config(self._whole_model(self._reference))
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
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
        return _under_keys_of(self._reference_weights, self._weights(name))

    def load_model(self, name: str) -> "PreTrainedModel":
        """Load a model afresh, in eval mode, on the CPU.

        Raises:
            FusionBenchError: as ``weights``, and a checkpoint that lacks some of the weights or
                has them in other shapes.
        """
        source = self._source(name)
        if not isinstance(source, str):
            return self._module(name).eval()
        if _ADAPTER_CONFIG in self._repository(name).files:
            return self.build_model(self.weights(name))
        model, info = self._from_pretrained(self._repository(name))
        _refuse_incomplete(f"modelpool.models.{name}: '{source}'", info)
        return model.eval()

    def build_model(self, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
        """Return a module of the reference's architecture with these weights.

        Nothing is initialised to be thrown away, and tensors are taken over as they are.

        Raises:
            FusionBenchError: weights that are not all of the model's.
        """
        tensors = in_memory(weights) if isinstance(weights, Weights) else dict(weights)
        config = self._model_config()
        floating = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
        model, info = _concrete(self._transformers_class(), config).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=floating[0] if floating else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
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
        path = Path(path).absolute()
        weights = model if isinstance(model, Weights) else TensorWeights(model.state_dict())
        sources = {name: self._described(name) for name in self._models}
        with ThreadPoolExecutor(thread_name_prefix="hash") as pool:
            files = {file for source in sources.values() for file in source.files}
            hashes = {file: pool.submit(file_sha256, file) for file in files}
            pending = recipe(config, sources, lambda file: "0" * 64)  # as long as a hash
            final = cache(lambda: recipe(config, sources, lambda file: hashes[file].result()))
            with whole_directory(path) as directory:
                write_checkpoint(
                    self._for_file(weights),
                    directory,
                    max_shard_size=self.max_shard_size,
                    metadata={"fusion_bench": json.dumps(pending)},
                    finish=lambda: {"fusion_bench": json.dumps(final())},
                )
                self._write_companions(directory)
                write_text(directory / "README.md", model_card(path.name, final()))

    def open_saved(self, path: Path) -> Weights:
        """Return the weights that ``save_model`` wrote, under the pool's keys."""
        return self._canonical(open_repository(locate(str(path))))

    def _canonical(self, weights: Weights) -> Weights:
        """Return a file's or a module's weights with the keys that the pool works with."""
        return weights

    def _for_file(self, weights: Weights) -> Weights:
        """Return weights with the keys that they have in a file."""
        return weights

    def _write_companions(self, directory: Path) -> None:
        """Write config, tokenizer and processor files beside merged weights."""
        if isinstance(self._models[self._reference], str):
            _copy(self._whole_model(self._reference), (*_CONFIGS, *_PROCESSORS), directory)
        elif (config := self._model_config()) is not None:
            config.save_pretrained(directory)
        if isinstance(self._processor, str):
            _copy(locate(self._processor), _PROCESSORS, directory)
        elif self._processor is not None:
            load("processor", self._processor, "modelpool.processor").save_pretrained(directory)
        file = directory / "config.json"
        if self.policy.dtype is not None and file.exists():
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            config["dtype"] = self.policy.dtype
            write_text(file, json.dumps(config, indent=2) + "\n")

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
            return Source(f"a {type(source).__name__}" if isinstance(source, nn.Module) else source)
        repository = self._repository(name)
        return Source(repository.name, repository.commit, self.weights(name).files)

    def _repository(self, name: str) -> Repository:
        """Return where a model lies; looked for once, so that all its files are of one state."""
        source = self._models[name]
        if source not in self._repositories:
            self._repositories[source] = locate(source)
        return self._repositories[source]

    def _whole_model(self, name: str) -> Repository:
        """Return where the model is that an adapter changes; the model's own place for others."""
        repository = self._repository(name)
        if _ADAPTER_CONFIG not in repository.files:
            return repository
        if self.has_pretrained and name != "_pretrained_":
            return self._whole_model("_pretrained_")
        declared = self._adapter_config(repository).base
        if declared is None:
            raise FusionBenchError(
                f"modelpool.models.{name}: the adapter names no base model. Add '_pretrained_' to "
                "modelpool.models."
            )
        try:
            return locate(declared)
        except FusionBenchError as error:
            raise FusionBenchError(
                f"modelpool.models.{name}: {error} The adapter names it as its base model. "
                "Add the base as '_pretrained_' to modelpool.models."
            ) from error

    def _adapter_config(self, repository: Repository) -> AdapterConfig:
        return AdapterConfig.read(repository.fetch(_ADAPTER_CONFIG) / _ADAPTER_CONFIG)

    def _weights(self, name: str) -> Weights:
        """Return a model's weights under its own keys."""
        source = self._source(name)
        if not isinstance(source, str):
            return self._canonical(TensorWeights(self._module(name).state_dict()))
        if Path(source).expanduser().is_file():
            return self._canonical(open_checkpoint(Path(source).expanduser()))
        repository = self._repository(name)
        whole = self._whole_model(name)
        method = self._json_config(whole).get("quantization_config", {}).get("quant_method")
        if method is not None:
            raise FusionBenchError(
                f"modelpool.models.{name}: '{whole.name}' is quantised ({method}), and quantised "
                "weights cannot be merged. Name the model that it was made from."
            )
        weights = open_repository(whole)
        if whole is repository:
            return self._canonical(weights)
        file = next((name for name in _ADAPTER_FILES if name in repository.files), None)
        if file is None:
            raise FusionBenchError(
                f"modelpool.models.{name}: there are no weights in '{source}'. It needs one of: "
                f"{', '.join(_ADAPTER_FILES)}."
            )
        adapter = open_checkpoint(repository.fetch(file) / file)
        config = self._adapter_config(repository)
        return AdapterWeights(self._canonical(weights), adapter, config)

    def _json_config(self, repository: Repository) -> dict[str, Any]:
        if "config.json" not in repository.files:
            return {}
        file = repository.fetch("config.json") / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FusionBenchError(f"'{file}' is not valid JSON. Fetch it again.") from error
        return content if isinstance(content, dict) else {}

    def _module(self, name: str) -> nn.Module:
        """Return a model that is given as a module, or by a config node."""
        module = load("model", self._source(name), f"modelpool.models.{name}")
        if not isinstance(module, nn.Module):
            raise FusionBenchError(
                f"modelpool.models.{name}: expected a repository, a directory or a module, "
                f"got {type(module).__name__}."
            )
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

    def _model_config(self) -> Any:
        """Return the reference's config; None for a module that has none."""
        source = self._models[self._reference]
        if not isinstance(source, str):
            return getattr(self._module(self._reference), "config", None)
        from transformers import AutoConfig

        repository = self._whole_model(self._reference)
        with reading("model", repository.name):
            return AutoConfig.from_pretrained(repository.fetch("config.json"))

    def _from_pretrained(self, repository: Repository) -> Any:
        """Return module and loading info of a checkpoint."""
        names = ["config.json", *weight_files(repository)]
        with reading("model", repository.name):
            return self._transformers_class().from_pretrained(
                repository.fetch(*names), output_loading_info=True, ignore_mismatched_sizes=True
            )


def _plain_source(model: Any) -> Any:
    """Return a model's name where a config node says no more than that."""
    node = OmegaConf.to_container(model, resolve=True) if OmegaConf.is_config(model) else model
    if not isinstance(node, Mapping) or set(node) != {"_target_", _NAME}:
        return node
    return node[_NAME] if str(node["_target_"]).startswith("transformers.") else node


def _policy(section: Mapping[str, Any]) -> MergePolicy:
    known = [field.name for field in fields(MergePolicy)]
    for name in section:
        if name not in known:
            hint = did_you_mean(name, known)
            raise FusionBenchError(f"modelpool.policy: there is no '{name}'. {hint}")
    return MergePolicy(**section)


def _under_keys_of(reference: Weights, weights: Weights) -> Weights:
    """Return ``weights`` with the reference's keys, where a prefix alone tells them apart."""
    if prefix := without_prefix(weights, reference):
        return Renamed(weights, {key: f"{prefix}{key}" for key in reference})
    if prefix := without_prefix(reference, weights):
        return Renamed(weights, {f"{prefix}{key}": key for key in weights})
    return weights


def _copy(repository: Repository, patterns: tuple[str, ...], directory: Path) -> None:
    names = [file for file in repository.files if any(fnmatch(file, p) for p in patterns)]
    place = repository.fetch(*names)
    for name in names:
        shutil.copyfile(place / name, directory / name)


def _concrete(model_class: Any, config: Any) -> Any:
    """Return the class that an ``AutoModel…`` stands for."""
    if hasattr(model_class, "config_class"):
        return model_class
    with torch.device("meta"):  # which costs no memory
        return type(model_class.from_config(config))


def _refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """Raise for keys that transformers had to make up, or could not use."""
    problems = [f"lacks '{key}'" for key in sorted(info["missing_keys"])]
    problems += [
        f"'{key}' is {list(found)}, its config.json says {list(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    if problems:
        raise FusionBenchError(f"{name} is not a whole model.\n  {shortened(problems)}")
