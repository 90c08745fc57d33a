r"""LoRA adapters as models: the base's tensors with $s \cdot BA$ added where the adapter has one.

Hu et al., LoRA, https://arxiv.org/abs/2106.09685; DoRA: Liu et al., https://arxiv.org/abs/2402.09353;
rank-stabilised scaling: Kalajdzievski, https://arxiv.org/abs/2312.03732.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_bench.problems import ConfigError
from fusion_bench.storage import read_json
from fusion_bench.weights.align import shortened
from fusion_bench.weights.formats import foreign_adapter
from fusion_bench.weights.mapping import Origin, TensorSpec, Weights

_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_(?P<part>delta|original)")

#: Ways to begin that change the base too, which the adapter's files then do not tell.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Settings that make another thing of the product than LoRA, or change what is not a module.
_OTHER_KINDS = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "target_parameters",
)
_WITH_PEFT = "Merge it into its base with PEFT (merge_and_unload) and use the result."


def _refused(content: Mapping[str, Any]) -> str | None:
    """Return why an adapter is not supported."""
    begin = content.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_CHANGES_BASE):
        return f"it was initialised with {begin}, which changes the base model."
    if content.get("alora_invocation_tokens"):
        return "it works on some tokens only (aLoRA) and cannot be merged."
    if content.get("layer_replication"):
        return "it repeats layers of its base."
    if other := next((name for name in _OTHER_KINDS if content.get(name)), None):
        return f"its '{other}' is not supported."
    if content.get("lora_bias") and content.get("use_dora"):
        return "PEFT does not support lora_bias together with use_dora."
    return None


def _token_indices(setting: Any) -> dict[str, tuple[int, ...]]:
    """Return each module's separately trained rows; those of the embedding under ''.

    Raises:
        ValueError: what are no rows, or the same twice.
    """
    named = setting if isinstance(setting, Mapping) else {"": setting} if setting else {}
    for rows in named.values():
        plain = all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows)
        if not plain or len(set(rows)) < len(rows):
            raise ValueError(rows)
    return {str(name): tuple(rows) for name, rows in named.items()}


def _bounded_pattern(pattern: str) -> str:
    """Return a compiled pattern of modules' names, if its search time is bounded.

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
    """The settings of an ``adapter_config.json`` that affect the weights.

    Raises:
        ConfigError: from ``read``, for an adapter of another kind than LoRA.
    """

    base: str | None
    alpha: float
    rank_stabilised: bool
    transposed: bool
    alpha_pattern: Mapping[str, float]
    revision: str | None = None
    bias: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    task: str | None = None
    base_class: str | None = None

    @classmethod
    def read(cls, path: Path) -> "AdapterConfig":
        """Read the file."""
        try:
            return cls.of(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"'{path}': {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"'{path}' is not the configuration of a LoRA adapter.") from error

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "AdapterConfig":
        """Return what the content of such a file says.

        Raises:
            ConfigError: an adapter of another kind than LoRA.
            ValueError, KeyError, TypeError, AttributeError, OverflowError: no such content.
        """
        kind = content["peft_type"]
        if kind != "LORA":
            raise ConfigError(foreign_adapter(str(kind)))
        if reason := _refused(content):
            raise ConfigError(f"{reason} {_WITH_PEFT}")
        base = content.get("base_model_name_or_path")
        revision = content.get("revision")
        for name in (base, revision):
            if not (name is None or isinstance(name, str)):
                raise TypeError(name)
        if content.get("lora_alpha") is None:
            raise ConfigError("'lora_alpha' is missing, by which the products are scaled.")
        task, library = content.get("task_type"), content.get("auto_mapping") or {}
        of_transformers = str(library.get("parent_library")).startswith("transformers")
        return cls(
            base=base or None,
            alpha=float(content["lora_alpha"]),
            rank_stabilised=bool(content.get("use_rslora")),
            transposed=bool(content.get("fan_in_fan_out")),
            alpha_pattern={
                _bounded_pattern(pattern): float(value)
                for pattern, value in dict(content.get("alpha_pattern") or {}).items()
            },
            revision=revision or None,
            bias=bool(content.get("lora_bias")),
            tokens=_token_indices(content.get("trainable_token_indices")),
            saved=tuple(map(str, content.get("modules_to_save") or ())),
            task=None if task is None else str(task),
            base_class=library.get("base_model_class") if of_transformers else None,
        )

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

    def rows(self, module: str) -> tuple[int, ...] | None:
        """Return the separately trained rows of a module, or ``None``."""
        fitting = [name for name in self.tokens if module.endswith(name)]
        return self.tokens[max(fitting, key=len)] if fitting else None


@dataclass(frozen=True)
class _Update:
    """The low-rank update of an entry, ``left @ right``.

    A ``magnitude`` gives each output its norm. The outputs are the rows, or the columns of an entry
    that is stored ``transposed``.
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor | None = None
    transposed: bool = False


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


def _equal_updates(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two updates are equal; one may be transposed, for an embedding."""

    def plain(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        swapped = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
        return {swapped.get(p, p): t.T if p in swapped else t for p, t in own.items()}

    if "lora_A" in one and "lora_A" in other:
        return False  # two layers, none of which is an embedding
    one, other = plain(one), plain(other)
    # What is all zeros, or no matrix, may be alike by chance.
    return one.keys() == other.keys() and all(
        tensor.ndim == 2 and bool(tensor.any()) and torch.equal(tensor, other[part])
        for part, tensor in one.items()
    )


def _is_copied_twice(
    name: str,
    own: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    saved: tuple[str, ...],
) -> bool:
    """Return whether a whole copy equals that of another entry of the same copied module."""
    if own.keys() != {""}:
        return False
    levels = name.split(".")
    modules = [".".join(levels[:count]) for count in range(1, len(levels))]
    return any(
        key.startswith(f"{module}.") and "" in other and torch.equal(own[""], other[""])
        for module in modules
        if module.endswith(saved)
        for key, other in parts.items()
    )


def _refuse_half_biases(
    parts: Mapping[str, Mapping[str, Tensor]], config: AdapterConfig, idle: set[str]
) -> None:
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
        self._replaced: dict[str, Tensor] = {}
        self._updates: dict[str, _Update] = {}
        self._column_scales: dict[str, Tensor] = {}
        self._rows: dict[str, _Rows] = {}
        self._names: dict[str, list[str]] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        unknown: dict[str, dict[str, Tensor]] = {}
        for name in adapter:
            entry, part = part_of(name)
            key = self._key(entry)
            there = unknown if key is None else parts
            there.setdefault(key or entry, {})[part] = adapter[name]
            if key is not None:
                self._names.setdefault(key, []).append(name)
        # The output layer that is tied to the embedding is stored beside it, and in the base not.
        for entry in [
            e for e in unknown if any(_equal_updates(unknown[e], p) for p in parts.values())
        ]:
            del unknown[entry]
        # So is what a copied module has under two names.
        for entry in [e for e in unknown if _is_copied_twice(e, unknown[e], parts, config.saved)]:
            del unknown[entry]
        # A layer without a bias has a shift of zeros where other layers of the adapter have one.
        idle = set()
        for entry in [e for e, own in unknown.items() if "bias" in own and not own["bias"].any()]:
            del unknown[entry]
            if weight := self._key(f"{entry.removesuffix('.bias')}.weight"):
                idle.add(f"{weight.removesuffix('.weight')}.bias")
        self._refuse_unknown([name for name in adapter if part_of(name)[0] in unknown])
        _refuse_half_biases(parts, config, idle)
        self._replaced = {key: own[""] for key, own in parts.items() if "" in own}
        for key, own in parts.items():
            if "delta" in own:
                self._rows[key] = self._trained_rows(key, own["delta"], config)
            low_rank = {p: own[p].float() for p in own if p.startswith("lora_")}
            if "bias" in own:
                rank = parts[f"{key.removesuffix('.bias')}.weight"]["lora_A"].shape[0]
                self._updates[key] = self._shift(key, own["bias"].float(), rank, config)
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
        """Return elements without the update: from the adapter, or else from the base."""
        if key in self._replaced:
            stored = self._replaced[key].reshape(-1)[start:stop]
        else:
            stored = self._base.read(key, start, stop)
        return self._rows[key].over(stored, start) if key in self._rows else stored

    def _sum(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of an entry with the low-rank product."""
        update = self._updates[key]
        columns = update.right.shape[1]
        rows = self._stored(key, first * columns, last * columns).view(-1, columns)
        return rows.float() + update.left[first:last] @ update.right

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
            f"is set already, do this. {_WITH_PEFT}\n  {lines}"
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

    def _shift(self, key: str, bias: Tensor, rank: int, config: AdapterConfig) -> _Update:
        """Return the update of a layer's bias, as a matrix with one column."""
        shape = self.spec(key).shape
        if bias.shape != shape:
            raise ConfigError(
                f"The adapter does not fit its base model: '{key}' is {list(shape)}, and for it "
                f"the adapter has {list(bias.shape)}."
            )
        factor = config.scaling(key.removesuffix(".bias"), rank)
        return _Update(bias[:, None] * factor, torch.ones(1, 1))

    def _update(self, key: str, tensors: Mapping[str, Tensor], config: AdapterConfig) -> _Update:
        embedding = "lora_embedding_A" in tensors
        try:
            a = tensors["lora_embedding_A" if embedding else "lora_A"]
            b = tensors["lora_embedding_B" if embedding else "lora_B"]
        except KeyError as error:
            raise ConfigError(f"The adapter is incomplete: '{key}' lacks {error}.") from error
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
