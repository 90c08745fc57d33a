"""A merge is a model: what a method makes of a pool, computed when it is read."""

import atexit
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Optional, Protocol, runtime_checkable

from fusion_bench.companions import CONFIGS
from fusion_bench.instantiate import check_part, instantiate
from fusion_bench.modelpool.build import config_of
from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.directory import (
    copy_files,
    processor_files,
    sentence_transformer,
)
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.problems import ConfigError, within
from fusion_bench.repository import Repository, locate
from fusion_bench.weights import Config, Model, Rounded, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TARGET = "fusion_bench.modelpool.MergedModel"


@dataclass(frozen=True)
class MergedModel:
    """A model that is itself a merge. It is computed when it is read, and stored nowhere.

    It is what saving the merge would give: its entries are rounded to the type that the merge has,
    and its config, tokenizer and chat template are the merge's.

    Args:
        modelpool: the pool's config node, or a pool; its policy says the type.
        method: the method's config node, or a method; it makes one model without data.
    """

    modelpool: Any
    method: Any


@runtime_checkable
class _Pool(Protocol):
    """What is asked of the inner pool."""

    model_names: Sequence[str]
    has_pretrained: bool

    def plan(self, scratch: Path | None = None, *, built: bool = True) -> Plan: ...

    def model(self, name: str) -> Model: ...

    def described(self) -> Mapping[str, Origin]: ...

    def write_companions(self, model: Model | None, directory: Path) -> None: ...


@runtime_checkable
class _Method(Protocol):
    """What is asked of the inner method."""

    def check_pool(self, pool: Any) -> None: ...

    def fuse(self, pool: Any) -> object: ...


@dataclass(frozen=True, eq=False)
class Merged:
    """A model that is itself a merge, as a source."""

    named: Named
    node: MergedModel
    base: None = None
    home: None = None

    @classmethod
    def take(cls, named: Named) -> Optional["Merged"]:
        """Take a ``MergedModel``, or its config node."""
        node = named.node
        if isinstance(node, MergedModel):
            return cls(named, node)
        if not isinstance(node, Mapping) or node.get("_target_") != _TARGET:
            return None
        return cls(named, MergedModel(node.get("modelpool"), node.get("method")))

    @property
    def at(self) -> Repository:
        """What it is called."""
        return Repository(f"a merge of {', '.join(self.pool.model_names)}", frozenset())

    @cached_property
    def companions(self) -> tuple[Repository, ...]:
        """A folder with the files that the saved merge has beside its weights."""
        folder = TemporaryDirectory(prefix="fusion_bench-", ignore_cleanup_errors=True)
        atexit.register(folder.cleanup)  # models keep its name: it stays as long as the process
        with within("modelpool"):
            own = self._fused if isinstance(self._fused, Model) else None
            self.pool.write_companions(own, Path(folder.name))
        return (replace(locate(folder.name), name=self.at.name),)

    @property
    def prefix(self) -> None:
        """The inner pool has taken it away."""

    @cached_property
    def pool(self) -> _Pool:
        """The inner pool."""
        with within("modelpool"):
            check_part(self.node.modelpool, "modelpool")
            pool = instantiate(_lazily(self.node.modelpool), "modelpool")
            if not isinstance(pool, _Pool):
                raise ConfigError("this is no pool of models.", "Name one of fusion_bench's.")
        return pool

    @cached_property
    def method(self) -> _Method:
        """The inner method."""
        with within("method"):
            check_part(self.node.method, "method")
            method = instantiate(self.node.method, "method")
            if not isinstance(method, _Method):
                raise ConfigError("this is no method.", "Name one of fusion_bench.method.")
        return method

    @cached_property
    def model(self) -> Model:
        """The merged model; no weight is read."""
        pool, fused = self.pool, self._fused
        reference = pool.model("_pretrained_" if pool.has_pretrained else pool.model_names[0])
        made = fused if isinstance(fused, Model) else replace(reference, weights=fused)
        return replace(made, weights=Rounded(made.weights))

    @cached_property
    def _fused(self) -> Model | Weights:
        """What the method makes."""
        fused = self.method.fuse(self.pool)
        if not isinstance(fused, Model | Weights):
            raise ConfigError(
                "it makes no weights, or several models.",
                "Choose another method.",
                place=("method",),
            )
        return fused

    def plan(self, plan: Plan) -> bool:
        """Plan the inner pool; check the method if the headers are known."""
        self.named.refuse_base()
        inner = self.pool.plan(self.named.pool.scratch, built=False)
        known = all(name in inner.weights for name in self.pool.model_names)
        method = self.method
        if known and not inner.problems:
            with inner.problems.collect("method"):
                method.check_pool(self.pool)
        problems, inner.weights = inner.problems, {}
        inside = [
            own if own.place[:1] == ("method",) else own.inside("modelpool") for own in problems
        ]
        inner.problems = type(problems)()
        plan.take(inner)
        type(problems)(inside).raise_all()
        return known

    def config(self) -> Config | None:
        """Return that of the merge."""
        return self.model.config

    def open(self, base: Model | None) -> Model:
        """Return the merge."""
        self.named.refuse_base()
        return replace(self.model, companions=self.companions)

    def architecture(self) -> str:
        """Return the class and the config of the merge."""
        return json.dumps([self.model.kind, dict(self.model.config or {})], sort_keys=True)

    def described(self) -> Origin:
        """Return what it is, and its models; it has no files of its own."""
        return Origin(self.at.name, models=self.pool.described())

    def config_for(self, config_class: str) -> "PretrainedConfig | None":
        """Return what a class of transformers makes of its config."""
        config = self.model.config
        return None if config is None else config_of(config, config_class)

    def load(self) -> None:
        """Nothing is at hand: it is built."""

    def write_companions(self, directory: Path, *, processors: bool) -> None:
        """Write the files that the saved merge has beside its weights."""
        (place,) = self.companions
        names = [*(place.files & set(CONFIGS)), *sentence_transformer(place)]
        names += processor_files(place) if processors else []
        copy_files(place, names, directory)


def _lazily(node: Any) -> Any:
    # Its models are made when their turn comes.
    return {"_recursive_": False, **node} if isinstance(node, Mapping) else node
