"""An adapter in PEFT's layout, made module by module."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion_bench.weights.adapter_config import AdapterConfig
from fusion_bench.weights.checkpoint import open_checkpoint
from fusion_bench.weights.lowrank import Factors
from fusion_bench.weights.mapping import Weights
from fusion_bench.weights.model import Model
from fusion_bench.weights.views import Renamed, Stacked
from fusion_bench.weights.write import write_checkpoint

#: What every tensor's name in an adapter begins with.
PREFIX = "base_model.model."

#: What a module gets: factors, a copy of its own, or nothing.
How = Literal["factors", "whole", "left"]


@dataclass(frozen=True)
class ModuleChange:
    """What an adapter has of one module's change.

    Attributes:
        module: its name.
        how: ``factors``; the ``whole`` module; or nothing, it is ``left`` as it is in the base.
        rank: of the factors.
        error: the Frobenius norm of what is missing of the change, as a share of the change's own.
    """

    module: str
    how: How
    rank: int
    error: float


@dataclass(frozen=True)
class Adapter:
    """An adapter: what its two files hold.

    Attributes:
        tensors: those of ``adapter_model.safetensors``, by the names that they have there.
        settings: the content of ``adapter_config.json``, without the base.
        changes: what became of each module.
    """

    tensors: Weights
    settings: Mapping[str, object]
    changes: Sequence[ModuleChange] = ()

    @property
    def config(self) -> AdapterConfig:
        """What of the settings affects the weights."""
        return AdapterConfig.of(self.settings)


@dataclass(frozen=True)
class AdaptedModel(Model):
    """A base with an adapter, which is saved as the adapter alone.

    Attributes:
        adapter: the adapter.
    """

    adapter: Adapter = field(kw_only=True)


class _Kept(Stacked):
    """Tensors in files of a temporary directory, which is there for as long as they are."""

    def __init__(
        self, parts: Mapping[str, tuple[Weights, str]], directory: "TemporaryDirectory[str]"
    ):
        super().__init__(parts)
        self._directory = directory


class AdapterBuilder:
    """Collects an adapter's tensors in temporary files, so that memory holds one module's.

    Args:
        transposed: whether the base stores its layers' matrices as [in, out].
    """

    def __init__(self, *, transposed: bool = False):
        self._transposed = transposed
        self._directory = TemporaryDirectory(prefix="fusion-bench-adapter-")
        self._parts: dict[str, tuple[Weights, str]] = {}
        self._ranks: dict[str, int] = {}
        self._without_bias: dict[str, tuple[int, torch.dtype]] = {}
        self._whole: list[str] = []
        self._changes: list[ModuleChange] = []

    @property
    def has_factors(self) -> bool:
        """Whether a layer has factors, without which PEFT takes no adapter."""
        return bool(self._ranks)

    def factors(
        self,
        module: str,
        factors: Factors,
        *,
        error: float,
        kernel: Sequence[int] = (),
        bias: Tensor | None = None,
    ) -> None:
        """Add a layer's factors.

        Args:
            module: its name.
            factors: of the change of its matrix [out, in], with the scale in them; of a
                convolution [out, in x kernel].
            error: of what is missing.
            kernel: the shape of a convolution's kernel.
            bias: the change of its bias.
        """
        a, b = factors.a, factors.b
        if kernel:
            a = a.view(factors.rank, -1, *kernel)
            b = b.view(len(b), factors.rank, *(1 for _ in kernel))
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
        if bias is None:
            self._without_bias[module] = len(b), b.dtype
        else:
            tensors["lora_B.bias"] = bias.to(b.dtype)
        self._store(module, tensors)
        self._ranks[module] = factors.rank
        self._changes.append(ModuleChange(module, "factors", factors.rank, error))

    def embedding(self, module: str, factors: Factors, *, error: float) -> None:
        """Add the factors of an embedding's change, a matrix [tokens, features]."""
        tensors = {"lora_embedding_A": factors.b.T, "lora_embedding_B": factors.a.T}
        self._store(module, tensors)
        self._ranks[module] = factors.rank
        self._changes.append(ModuleChange(module, "factors", factors.rank, error))

    def whole(self, module: str, weights: Weights, keys: Mapping[str, str]) -> None:
        """Add a copy of a module.

        Args:
            module: its name.
            weights: what is copied, piece by piece.
            keys: the names of its entries inside of the module, to their keys in ``weights``.
        """
        directory = Path(self._directory.name) / str(len(self._changes))
        directory.mkdir()
        names = {f"{PREFIX}{module}.{name}": key for name, key in keys.items()}
        write_checkpoint(Renamed(weights, names), directory, max_shard_size=2**62)
        stored = open_checkpoint(directory / "model.safetensors")
        self._parts |= {
            name: (stored, next(n for n in names if n in stored and names[n] == key))
            for name, key in names.items()
        }
        self._whole.append(module)
        self._changes.append(ModuleChange(module, "whole", 0, 0.0))

    def copy(self, weights: Weights, name: str) -> None:
        """Add a tensor under the name that it has in another adapter."""
        self._parts[name] = weights, name

    def left(self, module: str) -> None:
        """Note that a module stays as it is in the base, although it has changed."""
        self._changes.append(ModuleChange(module, "left", 0, 1.0))

    def build(self, modules: Collection[str] | None = None) -> Adapter:
        """Return the adapter.

        Args:
            modules: the names of all modules of the base, to tell layers by the ends of their
                names; without it they are told by their whole names.
        """
        biased = any(name.endswith(".lora_B.bias") for name in self._parts)
        for module, (size, dtype) in self._without_bias.items() if biased else ():
            self._store(module, {"lora_B.bias": torch.zeros(size, dtype=dtype)}, part="bias")
        ((rank, _),) = Counter(self._ranks.values()).most_common(1) or ((1, 0),)
        others = {module: own for module, own in self._ranks.items() if own != rank}
        settings = {
            "peft_type": "LORA",
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": ends(list(self._ranks), modules),
            "modules_to_save": ends(self._whole, modules) or None,
            "bias": "none",
            "lora_bias": biased,
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": self._transposed,
            "init_lora_weights": True,
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        return Adapter(_Kept(self._parts, self._directory), settings, tuple(self._changes))

    def _store(self, module: str, tensors: Mapping[str, Tensor], part: str = "") -> None:
        file = Path(self._directory.name) / f"{len(self._parts)}{part}.safetensors"
        named = {f"{PREFIX}{module}.{name}": t.cpu().contiguous() for name, t in tensors.items()}
        save_file(named, file)
        stored = open_checkpoint(file)
        self._parts |= {name: (stored, name) for name in named}


def ends(chosen: Collection[str], modules: Collection[str] | None) -> list[str]:
    """Return the fewest ends of names that fit the chosen modules and no other.

    Args:
        chosen: names of modules.
        modules: the names of all modules; without it, whole names are returned.
    """
    if modules is None:
        return sorted(chosen)
    wanted, found = set(chosen), set[str]()
    for name in chosen:
        last = name.rpartition(".")[2]
        fitting = {other for other in modules if other.endswith(last)}
        found.add(last if fitting <= wanted else name)
    return sorted(found)
