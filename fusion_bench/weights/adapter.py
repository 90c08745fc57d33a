r"""LoRA adapters as models: the base's tensors with $s \cdot BA$ added where the adapter has one.

Hu et al., LoRA, https://arxiv.org/abs/2106.09685; DoRA: Liu et al., https://arxiv.org/abs/2402.09353;
rank-stabilised scaling: Kalajdzievski, https://arxiv.org/abs/2312.03732.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_bench.errors import ConfigError
from fusion_bench.storage import read_json
from fusion_bench.weights.align import shortened
from fusion_bench.weights.mapping import TensorSpec, Weights

_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)


#: Ways to begin that change the base too, which the adapter's files then do not tell.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WITH_PEFT = "Merge it into its base with PEFT (merge_and_unload) and name the result."


def _refused(content: Mapping[str, Any]) -> str | None:
    """Return why an adapter's arithmetic is not that of this file."""
    begin = content.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_CHANGES_BASE):
        return f"it was begun with {begin}, which changes the base model."
    if content.get("alora_invocation_tokens"):
        return "it works on some tokens only (aLoRA) and cannot be merged."
    if content.get("layer_replication"):
        return "it repeats layers of its base."
    return None


def _quick(pattern: str) -> str:
    """Return a pattern of modules' names, if no name can keep its search busy for ever.

    Raises:
        ValueError: a pattern that cannot be read, or repeats what may be taken apart in many ways.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(pattern) from error
    if re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
        raise ValueError(pattern)
    return pattern


@dataclass(frozen=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says of the arithmetic.

    Raises:
        ConfigError: from ``read``, for an adapter of another kind than LoRA.
    """

    base: str | None
    alpha: float
    rank_stabilised: bool
    transposed: bool
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "AdapterConfig":
        """Read the file."""
        try:
            content: dict[str, Any] = read_json(path)
            kind = content["peft_type"]
            if kind != "LORA":
                raise ConfigError(f"'{path}': an adapter of the type {kind} is not supported.")
            if reason := _refused(content):
                raise ConfigError(f"'{path}': {reason} {_WITH_PEFT}")
            base = content.get("base_model_name_or_path")
            if not (base is None or isinstance(base, str)):
                raise TypeError(base)
            return cls(
                base=base,
                alpha=float(content["lora_alpha"]),
                rank_stabilised=bool(content.get("use_rslora")),
                transposed=bool(content.get("fan_in_fan_out")),
                alpha_pattern={
                    _quick(pattern): float(value)
                    for pattern, value in dict(content.get("alpha_pattern") or {}).items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"'{path}' is no configuration of a LoRA adapter.") from error

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of a module's low-rank product."""
        alpha = next(
            (
                value
                for pattern, value in self.alpha_pattern.items()
                if re.match(rf"(.*\.)?({pattern})$", module)
            ),
            self.alpha,
        )
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class _Update:
    """What is added to one entry, seen as a matrix of its rows: ``left @ right``.

    A ``magnitude`` gives each output its norm. The outputs are the rows, or the columns of an entry
    that is stored ``transposed``.
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor | None = None
    transposed: bool = False


class AdapterWeights(Weights):
    """A base model with an adapter; its entries are computed in float32 when they are read.

    Args:
        base: the model that the adapter was trained on.
        adapter: the adapter's own tensors, in PEFT's layout.
        config: how they are to be applied.

    Raises:
        ConfigError: an adapter that names modules which the base does not have.
    """

    def __init__(self, base: Weights, adapter: Weights, config: AdapterConfig):
        self._base = base
        self._adapter = adapter
        self._replaced: dict[str, Tensor] = {}
        self._updates: dict[str, _Update] = {}
        self._column_scales: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        unknown = []
        for name in adapter:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            plain = plain.replace(".modules_to_save.", ".")
            found = _PART.fullmatch(plain)
            key = self._key(f"{found['module']}.weight" if found else plain)
            if key is None:
                unknown.append(f"'{name}'")
            elif found:
                parts.setdefault(key, {})[found["part"]] = adapter[name].float()
            else:
                self._replaced[key] = adapter[name]
        if unknown:
            raise ConfigError(
                "The adapter changes what its base's files do not name so, or in a way that is not "
                "supported. Name the base that it was trained on as '_pretrained_'; if it is that "
                f"already: {_WITH_PEFT}\n  {shortened(unknown)}"
            )
        for key, tensors in parts.items():
            self._updates[key] = self._update(key, tensors, config)

    def resized(self) -> list[tuple[int, int]]:
        """Return the old and the new number of rows of entries whose rows the adapter changed."""
        shapes = [(self._base.spec(key).shape, t.shape) for key, t in self._replaced.items()]
        return [(old[0], new[0]) for old, new in shapes if old and new and old[0] != new[0]]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the adapter and of its base."""
        return (*self._adapter.files, *self._base.files)

    def __getitem__(self, key: str) -> Tensor:
        spec = self.spec(key)
        return self.read(key, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def spec(self, key: str) -> TensorSpec:
        """Return the entry's shape and the dtype that it has in the base."""
        if key in self._replaced:
            return TensorSpec(tuple(self._replaced[key].shape), self._base.spec(key).dtype)
        return self._base.spec(key)

    def tied_to(self, key: str) -> str:
        """Return the base's tie, where the adapter changes neither end of it."""
        first = self._base.tied_to(key)
        changed = {key, first} & (self._replaced.keys() | self._updates.keys())
        return key if changed else first

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, computed over the rows that hold them."""
        update = self._updates.get(key)
        if update is None:
            return self._stored(key, start, stop)
        columns = update.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = self._sum(key, first, last)
        if update.magnitude is not None and update.transposed:
            rows = rows * self._column_scale(key, update.magnitude)
        elif update.magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * (update.magnitude[first:last, None] / norms)
        return rows.view(-1)[start - first * columns : stop - first * columns]

    def _stored(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements without the low-rank product: the adapter's own, or else the base's."""
        if key in self._replaced:
            return self._replaced[key].reshape(-1)[start:stop]
        return self._base.read(key, start, stop)

    def _sum(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of an entry with the low-rank product."""
        update = self._updates[key]
        columns = update.right.shape[1]
        rows = self._stored(key, first * columns, last * columns).view(-1, columns)
        return rows.float() + update.left[first:last] @ update.right

    def _column_scale(self, key: str, magnitude: Tensor) -> Tensor:
        """Return the factors of all columns; the whole entry is read for them, but once."""
        if key not in self._column_scales:
            rows = self._sum(key, 0, self.spec(key).shape[0])
            self._column_scales[key] = magnitude / torch.linalg.vector_norm(rows, dim=0)
        return self._column_scales[key]

    def _key(self, name: str) -> str | None:
        """Return the base's key for a name in the adapter; their prefixes may differ."""
        if name in self._base:
            return name
        found = [key for key in self._base if key.endswith(f".{name}") or name.endswith(f".{key}")]
        return found[0] if len(found) == 1 else None

    def _update(self, key: str, tensors: Mapping[str, Tensor], config: AdapterConfig) -> _Update:
        embedding = "lora_embedding_A" in tensors
        try:
            a = tensors["lora_embedding_A" if embedding else "lora_A"]
            b = tensors["lora_embedding_B" if embedding else "lora_B"]
        except KeyError as error:
            raise ConfigError(f"The adapter is not whole: '{key}' lacks {error}.") from error
        # A convolution's B has a kernel of one.
        left, right = (part.flatten(1) if part.ndim > 1 else part[None] for part in (b, a))
        shape = self.spec(key).shape
        transposed = embedding or config.transposed
        if transposed:
            left, right = right.T, left.T
        rows, columns = math.prod(shape[:1]), math.prod(shape[1:])
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is not None:
            magnitude = magnitude.flatten()  # a convolution's is [1, rows, 1, 1]
        rank = right.shape[0]
        fits = left.shape == (rows, rank) and right.shape == (rank, columns)
        if magnitude is not None:
            fits = fits and len(magnitude) == (columns if transposed else rows)
        if not fits:
            parts = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
            raise ConfigError(
                f"The adapter does not fit its base model: '{key}' is {list(shape)}, and for it "
                f"the adapter has {parts}."
            )
        factor = config.scaling(key.removesuffix(".weight"), a.shape[0])
        return _Update(left * factor, right, magnitude, transposed)
