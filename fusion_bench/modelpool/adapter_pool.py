"""LoRA adapters of one base as models of their own, without the base."""

import logging
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.modelpool.adapter_folder import class_of_base, missed, write_adapter
from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.policy import policy_of
from fusion_bench.plan import Plan
from fusion_bench.problems import ConfigError, FusionBenchError, Problems, did_you_mean, within
from fusion_bench.repository import Repository, locate
from fusion_bench.storage import check_file_name
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.weights import (
    AdapterConfig,
    MergePolicy,
    Model,
    TensorSpec,
    Weights,
    is_special,
    open_checkpoint,
)
from fusion_bench.weights.adapter_builder import AdapterBuilder
from fusion_bench.weights.lowrank import (
    AdapterParts,
    Factors,
    LowRankWeights,
    Truncation,
    refuse_more_than_products,
)

log = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PRETRAINED = "_pretrained_"


class AdapterPool:
    """Named LoRA adapters of one base, which are merged without it.

    Their products are the task vectors: every method that merges weights sees them as models, with
    zeros as the pretrained model. The merged product is saved as an adapter in PEFT's layout, by a
    truncated singular value decomposition.

    Args:
        models: name to a folder or Hub repository with an adapter in PEFT's layout.
        rank: the largest rank of the saved factors; by default the largest of the adapters', or no
            limit with ``energy``.
        energy: the smallest rank is taken that keeps this share of the squared singular values,
            from 0 to 1.
        policy: as in ``HFModelPool``; ``dtype`` is that of the saved factors, by default the
            widest of the adapters'.

    Raises:
        FusionBenchError: an empty pool, or an impossible value.

    Attributes:
        notes: in sentences, what differs in adapters that are merged all the same.
    """

    has_pretrained = True
    vocabulary = None
    train_datasets: Mapping[str, object] = {}
    val_datasets: Mapping[str, object] = {}
    test_datasets: Mapping[str, object] = {}

    @keeps_arguments
    def __init__(
        self,
        models: Mapping[str, str],
        rank: int | None = None,
        energy: float | None = None,
        policy: Mapping[str, Any] | MergePolicy | None = None,
    ):
        self._models = {name: str(path) for name, path in (models or {}).items()}
        self.model_names = [name for name in self._models if not is_special(name)]
        problems = Problems()
        for name in self._models:
            with problems.collect("models"):
                check_file_name(name)
                if is_special(name):
                    raise FusionBenchError(
                        f"'{name}' is not merged; adapters are merged without a base.",
                        "Remove it.",
                        place=(name,),
                    )
        with problems.collect():
            self._truncation = Truncation(rank, energy)
        with problems.collect("policy"):
            self.policy = policy if isinstance(policy, MergePolicy) else policy_of(policy or {})
        with problems.collect("models"):
            if not self.model_names:
                raise FusionBenchError("the pool is empty.", "Name at least one adapter.")
        problems.raise_all()
        self._scratch: Path | None = None
        self._places: dict[str, Repository] = {}
        self._configs: dict[str, AdapterConfig] = {}
        self._stored: dict[str, Weights] = {}
        self._parts: dict[str, AdapterParts] = {}
        self.notes: list[str] = []
        self.tokenizer = TokenizerSource(lambda: None)

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan:
        """Find the adapters and open those that are here.

        Args:
            scratch: where small files go that are not here.
            built: whether modules are built of the models, which adapters alone are not.
        """
        self._scratch = scratch
        plan = Plan()
        if built:
            with plan.collect():
                self.load_model("")
        known = True
        for name in self.model_names:
            with plan.collect("models", name):
                place, file = self._place(name), self._file(name)
                plan.download(place, _CONFIG, file)
                known = known and place.has(_CONFIG, file)
                self._config(name)
        if known and not plan.problems:
            with plan.collect():
                plan.weights |= {name: self.weights(name) for name in (_PRETRAINED, *self._models)}
        return plan

    def compare(self, names: Collection[str] | None = None, *, layers: bool = True) -> list[str]:
        """Compare the bases that the adapters name.

        Args:
            names: of which adapters; by default all.
            layers: ignored: adapters of one base have the same layers.

        Raises:
            FusionBenchError: several bases, if the policy's ``on_config`` is ``error``.
        """
        configs = {n: self._config(n) for n in self.model_names if names is None or n in names}
        bases = {n: f"{c.base}@{c.revision}" if c.revision else c.base for n, c in configs.items()}
        named = {base: name for name, base in bases.items() if base is not None}
        self.notes = []
        if len(named) > 1:
            said = ", ".join(f"'{base}' ({name})" for base, name in named.items())
            reason = f"the adapters were trained on several bases: {said}."
            if self.policy.on_config != "warn":
                raise FusionBenchError(
                    reason,
                    "If these are one model, give {above}policy.on_config=warn; if not, merge the "
                    "adapters on their bases.",
                    place=("models", next(reversed(named.values()))),
                )
            self.notes = [reason[0].upper() + reason[1:]]
        return self.notes

    def weights(self, name: str) -> LowRankWeights:
        """Return an adapter's products, zeros where only others have one.

        Raises:
            FusionBenchError: an unknown name, or an adapter that is more than products.
        """
        if name == _PRETRAINED:
            return LowRankWeights(self._specs, {}, {})
        if name not in self._models:
            hint = did_you_mean(name, self._models)
            raise FusionBenchError(f"Adapter '{name}' is not in the pool.", hint)
        own = self._adapter(name)
        files = self._stored[name].files
        return LowRankWeights(self._specs, own.factors, own.vectors, files, own.origins)

    def model(self, name: str) -> Model:
        """Return the same, without a config."""
        return Model(self.weights(name), None, "LoRA adapter")

    def architecture(self, name: str | None = None) -> str | None:
        """Return None: an adapter computes nothing alone."""
        return None

    def load_model(self, name: str) -> nn.Module:
        """Refuse: an adapter is no module."""
        raise FusionBenchError(
            "adapters without their base cannot be evaluated.",
            "Save the merged adapter without a task pool (taskpool=null), and evaluate "
            "'base+adapter'.",
        )

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Refuse: an adapter is no module."""
        return self.load_model("")

    def save_model(
        self,
        model: nn.Module | Weights | Model,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write merged products as an adapter in PEFT's layout.

        Args:
            model: what was merged; ``LowRankWeights`` are written as they are.
            path: a directory; what is there is replaced.
            config: the run's config.

        Raises:
            FusionBenchError: adapters with different copies of the base's embeddings.
        """
        weights = model.weights if isinstance(model, Model) else model
        assert isinstance(weights, Weights)
        configs = {name: self._config(name) for name in self.model_names}
        builder = AdapterBuilder(transposed=self._transposed)
        for key, spec in self._specs.items():
            if key in self._biases:
                continue
            module = key.removesuffix(".weight")
            factors, error = self._factored(weights, key, spec)
            factors = factors.to(self._dtype)
            if key in self._embeddings:
                builder.embedding(module, factors, error=error)
                continue
            bias = f"{module}.bias"
            shift = weights.read(bias, 0, spec.shape[0]) if bias in self._biases else None
            builder.factors(module, factors, error=error, kernel=spec.shape[2:], bias=shift)
        self._copy(builder)
        weights.verify()
        named = next((own for own in configs.values() if own.base), None)
        base = None if named is None else named.base
        if base is not None and Path(base).expanduser().is_dir():
            base = str(Path(base).expanduser().absolute())  # from wherever it will be read
        sources = {
            name: Origin(self._place(name).name, self._place(name).commit, self._stored[name].files)
            for name in self.model_names
        }
        tasks = {own.task for own in configs.values()}
        adapter = builder.build()
        said = missed(adapter.changes)
        write_adapter(
            Path(path).absolute(),
            adapter,
            base=base,
            revision=None if named is None else named.revision,
            base_class=next(filter(None, map(class_of_base, configs.values())), None),
            task=tasks.pop() if len(tasks) == 1 else None,
            sources=sources,
            config=config,
            notes=() if said is None else (said,),
        )
        if said is not None:
            self.notes = [*self.notes, said]
            log.warning("%s", said)

    def as_saved(self, weights: Weights) -> LowRankWeights:
        """Return merged products as ``save_model`` writes them."""
        products = [key for key in self._specs if key not in self._biases]
        found = {key: self._factored(weights, key, self._specs[key])[0] for key in products}
        vectors = {key: weights[key].to(self._dtype) for key in self._specs if key in self._biases}
        factors = {key: own.to(self._dtype) for key, own in found.items()}
        return LowRankWeights(self._specs, factors, vectors)

    def open_saved(self, path: Path) -> Weights:
        """Return the products of what ``save_model`` wrote."""
        stored = open_checkpoint(path / _FILES[0])
        own = AdapterParts.of(stored, AdapterConfig.read(path / _CONFIG))
        return LowRankWeights(own.specs, own.factors, own.vectors, stored.files)

    def _factored(self, weights: Weights, key: str, spec: TensorSpec) -> tuple[Factors, float]:
        """Return the factors of a merged product, at least of rank 1, and their error."""
        if isinstance(weights, LowRankWeights):
            found, error = weights.factors.get(key), weights.errors.get(key, 0.0)
        else:
            matrix = weights.read(key, 0, spec.numel).view(spec.shape).flatten(1)
            found = self._limits.factors(matrix)
            error = found.to(self._dtype).error(matrix)
        if found is None or not found.rank:
            rows, columns = spec.shape[0], spec.numel // spec.shape[0]
            found = Factors(torch.zeros(rows, 1), torch.zeros(1, columns))
        return found, error

    def _copy(self, builder: AdapterBuilder) -> None:
        """Add the tensors of the base that adapters have copies of."""
        known: dict[str, Weights] = {}
        for name in self.model_names:
            for copied in self._adapter(name).copies:
                own = self._stored[name]
                if not torch.equal(known.setdefault(copied, own)[copied], own[copied]):
                    raise ConfigError(
                        f"'{copied}' differs from that of another adapter. Adapters can be merged "
                        "without their base if they change nothing but by products.",
                        "Merge them as models on their base, and extract an adapter of the result.",
                        place=("models", name),
                    )
        for copied, own in known.items():
            builder.copy(own, copied)

    @cached_property
    def _limits(self) -> Truncation:
        """What is kept of a product; by default as many singular values as an adapter's rank."""
        if self._truncation.rank is None and self._truncation.energy is None:
            ranks = (f.rank for name in self._models for f in self._adapter(name).factors.values())
            return Truncation(max(ranks))
        return self._truncation

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        """The entries of all adapters."""
        specs: dict[str, TensorSpec] = {}
        for name in self.model_names:
            for key, spec in self._adapter(name).specs.items():
                if specs.setdefault(key, spec) != spec:
                    raise FusionBenchError(
                        f"the product '{key}' is {list(spec.shape)}, that of another adapter "
                        f"{list(specs[key].shape)}: they are of different bases.",
                        "Remove one.",
                        place=("models", name),
                    )
        return specs

    @cached_property
    def _biases(self) -> set[str]:
        return {key for name in self._models for key in self._adapter(name).vectors}

    @cached_property
    def _embeddings(self) -> set[str]:
        return {key for name in self._models for key in self._adapter(name).embeddings}

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The type of the saved factors."""
        if self.policy.torch_dtype is not None:
            return self.policy.torch_dtype
        found = {f.a.dtype for name in self._models for f in self._adapter(name).factors.values()}
        first, *others = found
        for dtype in others:
            first = torch.promote_types(first, dtype)
        return first

    @property
    def _transposed(self) -> bool:
        """Whether the base stores its layers' matrices as [in, out], as all adapters say."""
        return any(self._config(name).transposed for name in self.model_names)

    def _adapter(self, name: str) -> AdapterParts:
        if name not in self._parts:
            with within("models", name):
                config = self._config(name)
                if config.transposed != self._transposed:
                    raise ConfigError(
                        "its adapter_config.json sets fan_in_fan_out unlike that of another "
                        "adapter: they are of different bases.",
                        "Remove one.",
                    )
                file = self._file(name)
                self._stored[name] = open_checkpoint(self._place(name).fetch(file) / file)
                self._parts[name] = AdapterParts.of(self._stored[name], config)
        return self._parts[name]

    def _place(self, name: str) -> Repository:
        if name not in self._places:
            self._places[name] = locate(self._models[name], self._scratch)
        place = self._places[name]
        if _CONFIG not in place.files:
            raise FusionBenchError(
                f"'{place.name}' is no adapter: there is no {_CONFIG}.",
                "Name an adapter; whole models are merged by another pool, such as HFModelPool.",
            )
        return place

    def _file(self, name: str) -> str:
        place = self._place(name)
        file = next((own for own in _FILES if own in place.files), None)
        if file is None:
            reason = f"there are no weights in '{place.name}'."
            raise FusionBenchError(reason, f"It needs one of: {', '.join(_FILES)}.")
        return file

    def _config(self, name: str) -> AdapterConfig:
        if name not in self._configs:
            found = AdapterConfig.read(self._place(name).fetch(_CONFIG) / _CONFIG)
            refuse_more_than_products(found)
            self._configs[name] = found
        return self._configs[name]
