"""Limits the size of a config, before Hydra copies it.

YAML aliases and defaults lists may expand a few hundred bytes beyond any memory. (Interpolations
are counted in ``fusion_bench.resolving``.)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra.plugins.config_source import ConfigResult

from fusion_bench.problems import ConfigError
from fusion_bench.resolving import CHARACTERS

#: Of one file. A sweep over thousands of values, or a pool of a thousand models, is far below.
_BYTES = 2**20
_VALUES = 20_000
_DEPTH = 50
_DIGITS = 1_000
_INTERPOLATED = 10_000
#: Of what a config is composed of, each file counted as often as it is taken.
_FILES = 1_000
_ALL_VALUES = 5 * _VALUES


@dataclass
class _Size:
    """The size of a part of a YAML file, with expanded aliases."""

    values: int = 0
    characters: int = 0
    depth: int = 0
    anchor: str | None = None

    def take(self, part: "_Size") -> None:
        self.values += part.values
        self.characters += part.characters
        self.depth = max(self.depth, part.depth + 1)


@dataclass
class _Counted(ConfigResult):
    """A config and the number of values in its file."""

    values: int = 0


class FileConfigSource(file_config_source.FileConfigSource):
    """Reads configs from files like Hydra, and refuses large ones.

    It takes the place of Hydra's own, which leaves it to whichever of that name is there.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config.

        Raises:
            ConfigError: it, or what it stands for, is too large.
        """
        path = Path(self.path, self._normalize_file_name(config_path)).resolve()
        values = check_file(path) if path.is_file() else 0
        result = super().load_config(config_path)
        return _Counted(**vars(result), values=values)


def check_file(path: Path) -> int:
    """Return the number of values of a YAML file; invalid YAML is left to the parser.

    Raises:
        ConfigError: they are too many, nested too deeply or too long.
    """
    with path.open("rb") as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise _too_large(f"'{path}'", f"has more than {_BYTES:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text. Save it as UTF-8.") from error
    return check_text(text, f"'{path}'")


def check_text(text: str, where: str) -> int:
    """Return the number of values of a YAML text; ``where`` names it in messages.

    Raises:
        ConfigError: as above.
    """
    for loader in (getattr(yaml, "CSafeLoader", yaml.SafeLoader), yaml.SafeLoader):
        try:
            return _measured(text, loader, where)
        except yaml.YAMLError:  # the two parsers do not refuse quite the same
            continue
    return 0


def _measured(text: str, loader: "type[yaml.SafeLoader | yaml.CSafeLoader]", where: str) -> int:
    """Measure a YAML text from its parser events."""
    anchored: dict[str, _Size] = {}
    whole = _Size()
    levels = [whole]
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Size(values=1, anchor=event.anchor))
            if event.anchor:
                anchored[event.anchor] = _Size(values=_VALUES)  # as long as it is not at its end
            part = None
        elif isinstance(event, yaml.CollectionEndEvent):
            part = levels.pop()
        elif isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and len(event.value) > _DIGITS and _is_number(event.value):
                raise _too_large(where, f"has a number with more than {_DIGITS:,} digits")
            if "${" in event.value and len(event.value) > _INTERPOLATED:
                long = f"has interpolations in a text of more than {_INTERPOLATED:,} characters"
                raise _too_large(where, long)
            part = _Size(1, len(event.value), anchor=event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            part = replace(anchored.get(str(event.anchor), _Size()), anchor=None)
        else:
            continue
        if part is not None:
            if part.anchor:
                anchored[part.anchor] = part
            levels[-1].take(part)
        if len(levels) > _DEPTH or levels[-1].depth > _DEPTH:
            raise _too_large(where, f"has more than {_DEPTH} nested lists and mappings")
        if levels[-1].values > _VALUES:
            raise _too_large(where, f"expands to more than {_VALUES:,} values")
        if levels[-1].characters > CHARACTERS:
            raise _too_large(where, f"expands to more than {CHARACTERS:,} characters")
    return whole.values


def _is_number(text: str) -> bool:
    return not text.strip("0123456789+-_.:")  # base 60 takes its time


def _too_large(where: str, why: str) -> ConfigError:
    return ConfigError(f"{where} {why}. Shorten it, or do not use it.")


def bounded(repository: CachingConfigRepository) -> CachingConfigRepository:
    """Return the config repository of one composition, with size limits."""
    files, values, load = 0, 0, repository.load_config

    def load_config(config_path: str) -> ConfigResult | None:
        nonlocal files, values
        result = load(config_path)
        files += 1
        values += result.values if isinstance(result, _Counted) else 0
        if files > _FILES or values > _ALL_VALUES:
            raise ConfigError(
                f"'{config_path}': the config exceeds {_FILES:,} files or {_ALL_VALUES:,} values "
                "through its defaults lists. Shorten these lists."
            )
        return result

    repository.load_config = load_config  # type: ignore[method-assign]
    return repository
