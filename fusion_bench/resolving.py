"""Resolves a config's interpolations within limits, and writes texts that are none.

If each of forty keys refers twice to the previous key, the last one exceeds any memory. OmegaConf
has no limit, so each reference is counted during resolution.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.base import Container, Node
from omegaconf.errors import OmegaConfBaseException

from fusion_bench.problems import ConfigError

#: So many references may be followed, and so many more for each that is written: a chain of paths,
#: each of which begins with the one before, needs fewer.
_FEW, _FOR_EACH = 1_000, 10
_DEPTH = 100
CHARACTERS = 2**22

_node, _resolver = Container._resolve_node_interpolation, Container._evaluate_custom_resolver


@dataclass
class _Count:
    limit: int
    references: int = 0
    characters: int = 0
    error: ConfigError | None = None

    def add(self, name: str, found: Any) -> None:
        self.references += 1
        self.characters += len(found) if isinstance(found, str) else 0
        if self.references > self.limit or self.characters > CHARACTERS:
            self.error = ConfigError(
                f"${{{name}}}: the interpolations of this config expand to more than "
                f"{self.limit:,} values or {CHARACTERS:,} characters. Write out the values."
            )
            raise self.error


_count: ContextVar[_Count | None] = ContextVar("_count", default=None)


@contextmanager
def bounded(config: Any = None) -> Iterator[None]:
    """Limit the size of resolved interpolations within the block.

    Raises:
        ConfigError: they do; whatever was made of this on the way.
    """
    count = _Count(_FEW + _FOR_EACH * (_written(config) if OmegaConf.is_config(config) else 0))
    token = _count.set(count)
    try:
        yield
    except Exception as error:
        if count.error is not None and error is not count.error:
            raise count.error from error
        raise
    finally:
        _count.reset(token)


def _written(config: Any) -> int:
    if isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict | list):
        return sum(map(_written, config.values() if isinstance(config, dict) else config))
    return config.count("${") if isinstance(config, str) else 0


def resolve_all(config: DictConfig) -> None:
    """Resolve all that is possible now, to check the limits early.

    Raises:
        ConfigError: it would be too large.
    """
    with bounded(config):
        _resolve(config, 0)


def _resolve(node: DictConfig | ListConfig, depth: int) -> None:
    if depth > _DEPTH:
        raise ConfigError(
            f"{node._get_full_key(None)[:60]}: an interpolation refers to itself. Write out the "
            "value."
        )
    for key in range(len(node)) if isinstance(node, ListConfig) else [*node]:
        try:
            child = node[key]
        except OmegaConfBaseException:  # of no value yet, or wrong, which is told when it is used
            if (count := _count.get()) is not None and count.error is not None:
                raise
            continue
        if isinstance(child, DictConfig | ListConfig):
            _resolve(child, depth + 1)


def to_container(node: Any, *, throw_on_missing: bool = False) -> Any:
    """Return a config as plain data, resolved.

    Raises:
        ConfigError: it would be too large.
    """
    with bounded(node):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=throw_on_missing)


def yaml_of(config: Mapping[str, Any]) -> str:
    """Return the YAML of a resolved config, which resolves to the same: ``${`` in it is text."""
    escaped = _escaped(config)
    if not _is_plain(escaped):
        return OmegaConf.to_yaml(escaped)
    # The same without OmegaConf's nodes, which take longer than the writing.
    return yaml.dump(
        escaped,
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        Dumper=get_omega_conf_dumper(),
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _count_node(self: Container, inter_key: str, memo: set[int] | None) -> Node:
    found = _node(self, inter_key, memo)
    if (count := _count.get()) is not None:
        count.add(inter_key, found._value())
    return found


def _count_resolver(
    self: Container,
    key: Any,
    node: Node,
    inter_type: str,
    inter_args: tuple[Any, ...],
    inter_args_str: tuple[str, ...],
) -> Any:
    count = _count.get()
    if count is not None and inter_type == "oc.create":
        for text in inter_args:
            if isinstance(text, str) and "&" in text and "*" in text:
                count.error = ConfigError(
                    "${oc.create:…}: its text may contain aliases that expand beyond memory. "
                    "Write out the config."
                )
                raise count.error
    found = _resolver(self, key, node, inter_type, inter_args, inter_args_str)
    if count is not None:
        count.add(f"{inter_type}:{','.join(inter_args_str)}"[:80], found)
    return found


Container._resolve_node_interpolation = _count_node  # type: ignore[method-assign]
Container._evaluate_custom_resolver = _count_resolver  # type: ignore[method-assign]
