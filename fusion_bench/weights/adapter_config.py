"""The settings of LoRA adapters, as PEFT writes them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_bench.problems import ConfigError
from fusion_bench.storage import read_json
from fusion_bench.weights.formats import foreign_adapter

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
#: What else can be done with an adapter.
WITH_PEFT = "Merge it into its base with PEFT (merge_and_unload) and use the result."


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
    dora: bool = False
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
            raise ConfigError(f"{reason} {WITH_PEFT}")
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
            dora=bool(content.get("use_dora")),
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
