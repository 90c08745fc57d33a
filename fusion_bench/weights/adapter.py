r"""LoRA adapters as models: the base's tensors with $s \cdot BA$ added where the adapter has one.

Hu et al., LoRA, https://arxiv.org/abs/2106.09685; DoRA: Liu et al., https://arxiv.org/abs/2402.09353;
rank-stabilised scaling: Kalajdzievski, https://arxiv.org/abs/2312.03732.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion_bench.problems import ConfigError
from fusion_bench.weights.adapter_config import WITH_PEFT, AdapterConfig
from fusion_bench.weights.align import shortened
from fusion_bench.weights.mapping import Origin, TensorSpec, Weights

_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_(?P<part>delta|original)")

#: An adapter's tensors for one entry, by the part that they play.
_Names = Mapping[str, str]


@dataclass(frozen=True)
class _Update:
    """The low-rank update of an entry, ``factor * left @ right``, read when it is applied.

    Attributes:
        adapter: has the tensors.
        left: the name of B; of the shift of a bias that is all.
        right: the name of A.
        factor: the scaling.
        columns: of the entry.
        transposed: whether the entry is stored as [in, out], and both tensors are swapped.
        magnitude: the name of what gives each output its norm. The outputs are the rows, or the
            columns of an entry that is stored ``transposed``.
    """

    adapter: Weights
    left: str
    right: str | None
    factor: float
    columns: int = 1
    transposed: bool = False
    magnitude: str | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of the product, in float32."""
        if self.right is None:
            return self.adapter.read(self.left, first, last)[:, None].float() * self.factor
        b, a = (_matrix(self.adapter[name]) for name in (self.left, self.right))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return (left[first:last].float() * self.factor) @ right.float()

    def norms(self) -> Tensor | None:
        """Return the outputs' norms; of a convolution they are [1, rows, 1, 1] in the file."""
        if self.magnitude is None:
            return None
        return self.adapter[self.magnitude].float().flatten()


def _matrix(tensor: Tensor) -> Tensor:
    """Return a factor as a matrix; a convolution's B has a kernel of one."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[None]


@dataclass(frozen=True)
class _Rows:
    """Replacements of some rows of an entry."""

    rows: tuple[int, ...]
    values: Tensor

    def over(self, stored: Tensor, start: int) -> Tensor:
        """Return elements of the flattened entry, from ``start`` on, with these rows in place."""
        width = self.values.shape[1]
        laid = stored.to(torch.promote_types(stored.dtype, self.values.dtype), copy=True)
        for row, values in zip(self.rows, self.values, strict=True):
            first = row * width - start
            begin, end = max(first, 0), min(first + width, len(laid))
            if begin < end:
                laid[begin:end] = values[begin - first : end - first]
        return laid


def part_of(name: str) -> tuple[str, str]:
    """Return the entry that an adapter's tensor belongs to, and the tensor's role."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    plain = plain.replace(".modules_to_save.", ".")
    if found := _TOKENS.fullmatch(plain):
        return f"{found['module']}.weight", found["part"]
    if found := _BIAS.fullmatch(plain):
        return f"{found['module']}.bias", "bias"
    if found := _PART.fullmatch(plain):
        return f"{found['module']}.weight", found["part"]
    return plain.replace(".token_adapter.", "."), ""


def _equal_updates(adapter: Weights, names: _Names, others: _Names) -> bool:
    """Return whether two updates are equal; one may be transposed, for an embedding."""

    def plain(own: _Names) -> dict[str, Tensor]:
        swapped = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
        tensors = {part: adapter[name] for part, name in own.items()}
        return {swapped.get(p, p): t.T if p in swapped else t for p, t in tensors.items()}

    if "lora_A" in names and "lora_A" in others:
        return False  # two layers, none of which is an embedding
    sizes = (sorted(adapter.spec(name).numel for name in own.values()) for own in (names, others))
    if next(sizes) != next(sizes):
        return False
    one, other = plain(names), plain(others)
    # What is all zeros, or no matrix, may be alike by chance.
    return one.keys() == other.keys() and all(
        tensor.ndim == 2 and bool(tensor.any()) and torch.equal(tensor, other[part])
        for part, tensor in one.items()
    )


def _copied_twice(
    adapter: Weights, entry: str, own: _Names, parts: Mapping[str, _Names], saved: tuple[str, ...]
) -> bool:
    """Return whether a whole copy equals that of another entry of the same copied module."""
    if own.keys() != {""}:
        return False
    levels = entry.split(".")
    modules = [".".join(levels[:count]) for count in range(1, len(levels))]
    inside = tuple(f"{module}." for module in modules if module.endswith(saved))
    return any(
        key.startswith(inside)
        and "" in other
        and adapter.spec(own[""]) == adapter.spec(other[""])
        and torch.equal(adapter[own[""]], adapter[other[""]])
        for key, other in parts.items()
    )


def _refuse_half_biases(parts: Mapping[str, _Names], config: AdapterConfig, idle: set[str]) -> None:
    """Refuse biases without products or without ``lora_bias``, and vice versa; some are zeros."""
    wanted = {f"{k.removesuffix('.weight')}.bias" for k, own in parts.items() if "lora_B" in own}
    there = {key for key, own in parts.items() if "bias" in own} | idle
    if there and not config.bias:
        raise ConfigError(
            "The adapter is incomplete: it has biases of its products, 'lora_B.bias', but its "
            f"adapter_config.json does not set lora_bias.\n  {shortened(sorted(there))}"
        )
    if config.bias and there != wanted:
        raise ConfigError(
            "The adapter is incomplete: its adapter_config.json sets lora_bias, but "
            f"'lora_B.bias' or the product is missing for\n  {shortened(sorted(there ^ wanted))}"
        )


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
        self._replaced: dict[str, str] = {}
        self._updates: dict[str, _Update] = {}
        self._column_scales: dict[str, Tensor] = {}
        self._rows: dict[str, _Rows] = {}
        self._names: dict[str, list[str]] = {}
        parts: dict[str, dict[str, str]] = {}
        unknown: dict[str, dict[str, str]] = {}
        for name in adapter:
            entry, part = part_of(name)
            key = self._key(entry)
            there = unknown if key is None else parts
            there.setdefault(key or entry, {})[part] = name
            if key is not None:
                self._names.setdefault(key, []).append(name)
        # The output layer that is tied to the embedding is stored beside it, and in the base not.
        for entry in [
            entry
            for entry, own in unknown.items()
            if any(_equal_updates(adapter, own, other) for other in parts.values())
        ]:
            del unknown[entry]
        # So is what a copied module has under two names.
        for entry in [
            e for e in unknown if _copied_twice(adapter, e, unknown[e], parts, config.saved)
        ]:
            del unknown[entry]
        # A layer without a bias has a shift of zeros where other layers of the adapter have one.
        idle = set()
        for entry in [
            e for e, own in unknown.items() if "bias" in own and not adapter[own["bias"]].any()
        ]:
            del unknown[entry]
            if weight := self._key(f"{entry.removesuffix('.bias')}.weight"):
                idle.add(f"{weight.removesuffix('.weight')}.bias")
        self._refuse_unknown([name for name in adapter if part_of(name)[0] in unknown])
        _refuse_half_biases(parts, config, idle)
        self._replaced = {key: own[""] for key, own in parts.items() if "" in own}
        for key, own in parts.items():
            if "delta" in own:
                self._rows[key] = self._trained_rows(key, adapter[own["delta"]], config)
            low_rank = {p: own[p] for p in own if p.startswith("lora_")}
            if "bias" in own:
                a = parts[f"{key.removesuffix('.bias')}.weight"]["lora_A"]
                self._updates[key] = self._shift(key, own["bias"], adapter.spec(a), config)
            elif low_rank:
                self._updates[key] = self._update(key, low_rank, config)
        if config.tokens and not self._rows:
            raise ConfigError(
                "The adapter is incomplete: its trainable_token_indices name tokens, but "
                "'token_adapter.trainable_tokens_delta' is missing."
            )
        by_tie = {base.tied_to(key): rows for key, rows in self._rows.items()}
        for key in base if by_tie else ():
            if key not in parts and base.tied_to(key) in by_tie:
                self._rows[key] = by_tie[base.tied_to(key)]

    def resized(self) -> list[tuple[int, int]]:
        """Return the old and new row counts of entries that the adapter resized."""
        shapes = [(self._base.spec(key).shape, self.spec(key).shape) for key in self._replaced]
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
            shape = self._adapter.spec(self._replaced[key]).shape
            return TensorSpec(shape, self._base.spec(key).dtype)
        return self._base.spec(key)

    def tied_to(self, key: str) -> str:
        """Return the base's tie if the adapter changes neither entry."""
        first = self._base.tied_to(key)
        changed = {key, first} & (self._replaced.keys() | self._updates.keys())
        alike = self._rows.get(key) is self._rows.get(first)
        return first if alike and not changed else key

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the base's entries, and the adapter's that change or replace them."""
        base = () if key in self._replaced else self._base.origins(key)
        return (*base, *(Origin(self._adapter, name) for name in self._names.get(key, ())))

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, computed over the rows that hold them."""
        update = self._updates.get(key)
        if update is None:
            return self._stored(key, start, stop)
        columns = update.columns
        first, last = start // columns, -(-stop // columns)
        rows = self._sum(key, first, last)
        magnitude = update.norms()
        if magnitude is not None and update.transposed:
            rows = rows * self._column_scale(key, magnitude)
        elif magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * (magnitude[first:last, None] / norms)
        return rows.view(-1)[start - first * columns : stop - first * columns]

    def _stored(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements without the update: from the adapter, or else from the base."""
        if key in self._replaced:
            stored = self._adapter.read(self._replaced[key], start, stop)
        else:
            stored = self._base.read(key, start, stop)
        return self._rows[key].over(stored, start) if key in self._rows else stored

    def _sum(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of an entry with the low-rank product."""
        update = self._updates[key]
        columns = update.columns
        rows = self._stored(key, first * columns, last * columns).view(-1, columns)
        return rows.float() + update.rows(first, last)

    def _column_scale(self, key: str, magnitude: Tensor) -> Tensor:
        """Return the factors of all columns; the whole entry is read once for them."""
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

    def _refuse_unknown(self, names: list[str]) -> None:
        """Refuse tensors that match no module of the base."""
        if not names:
            return
        lines = shortened([f"'{name}'" for name in names])
        if all(part_of(name)[1] == "bias" for name in names):
            raise ConfigError(
                "The adapter has biases (lora_bias) for layers that have none in its base. PEFT "
                f"cannot merge them either: the model has no parameter for them.\n  {lines}"
            )
        raise ConfigError(
            "The adapter changes modules that its base's files do not have under this name, or "
            "in an unsupported way. Set '_pretrained_' to the base that it was trained on; if it "
            f"is set already, do this. {WITH_PEFT}\n  {lines}"
        )

    def _trained_rows(self, key: str, values: Tensor, config: AdapterConfig) -> _Rows:
        """Return the separately trained tokens of an embedding."""
        rows = config.rows(key.removesuffix(".weight"))
        if rows is None:
            raise ConfigError(
                f"The adapter is incomplete: it has trained tokens of '{key}', but the "
                "trainable_token_indices of its adapter_config.json do not list them."
            )
        shape = self.spec(key).shape
        width = math.prod(shape[1:])
        if values.shape != (len(rows), width) or not shape or max(rows, default=0) >= shape[0]:
            raise ConfigError(
                f"The adapter does not fit its base model: '{key}' is {list(shape)}, and for it "
                f"the adapter has {list(values.shape)} for the tokens {list(rows)[:20]}."
            )
        return _Rows(rows, values)

    def _shift(self, key: str, name: str, a: TensorSpec, config: AdapterConfig) -> _Update:
        """Return the update of a layer's bias, as a matrix with one column."""
        shape, bias = self.spec(key).shape, self._adapter.spec(name)
        if bias.shape != shape:
            raise ConfigError(
                f"The adapter does not fit its base model: '{key}' is {list(shape)}, and for it "
                f"the adapter has {list(bias.shape)}."
            )
        factor = config.scaling(key.removesuffix(".bias"), a.shape[0])
        return _Update(self._adapter, name, None, factor)

    def _update(self, key: str, names: _Names, config: AdapterConfig) -> _Update:
        shapes = {part: self._adapter.spec(name).shape for part, name in names.items()}
        embedding = "lora_embedding_A" in names
        try:
            a = names["lora_embedding_A" if embedding else "lora_A"]
            b = names["lora_embedding_B" if embedding else "lora_B"]
        except KeyError as error:
            raise ConfigError(f"The adapter is incomplete: '{key}' lacks {error}.") from error
        specs = (self._adapter.spec(name).shape for name in (b, a))
        left, right = (_matrix(torch.empty(own, device="meta")).shape for own in specs)
        shape = self.spec(key).shape
        transposed = embedding or config.transposed
        if transposed:
            left, right = right[::-1], left[::-1]
        rows, columns = math.prod(shape[:1]), math.prod(shape[1:])
        magnitude = names.get("lora_magnitude_vector")
        rank = right[0]
        fits = tuple(left) == (rows, rank) and tuple(right) == (rank, columns)
        if magnitude is not None:
            outputs = columns if transposed else rows
            fits = fits and self._adapter.spec(magnitude).numel == outputs
        if not fits:
            parts = ", ".join(f"{part} {list(own)}" for part, own in shapes.items())
            raise ConfigError(
                f"The adapter does not fit its base model: '{key}' is {list(shape)}, and for it "
                f"the adapter has {parts}."
            )
        a_rows = self._adapter.spec(a).shape[0]
        factor = config.scaling(key.removesuffix(".weight"), a_rows)
        return _Update(self._adapter, b, a, factor, columns, transposed, magnitude)
