"""The text of a recipe, and the YAML in it; both are a stranger's."""

from pathlib import Path
from typing import Any

import yaml

from fusion_bench.command import is_there
from fusion_bench.problems import ConfigError

#: No recipe is longer, in bytes, or holds more values.
_LONGEST = 4 * 2**20
_MOST_VALUES = 200_000
_DEEPEST = 40


def read_text(file: Path) -> str:
    """Return the text of a recipe.

    Raises:
        ConfigError: there is no such file, or it is too large or no text.
    """
    if not is_there(file) or not file.is_file():
        raise ConfigError(f"there is no recipe '{file}'.", "Name a YAML file.")
    if file.stat().st_size > _LONGEST:
        raise ConfigError(f"'{file}' is too large for a recipe.", "Name a YAML file.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{file}' is no text in UTF-8.", "Name a YAML file.") from error


def nodes_of(text: str) -> list[Any]:
    """Return the YAML documents in a text.

    Raises:
        ConfigError: no YAML, none, or one that is too large.
    """
    try:
        nodes = [node for node in yaml.safe_load_all(text) if node is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the recipe is no YAML: {' '.join(str(error).split())}") from error
    if not nodes:
        raise ConfigError("the recipe is empty.", "Give a 'merge_method' and 'models'.")
    _refuse_large(nodes)
    return nodes


def _refuse_large(node: object) -> None:
    """Refuse a document that is deep or, through its aliases, long."""
    level: list[object] = [node]
    count = 0
    for _ in range(_DEEPEST):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        count += len(level)
        if count > _MOST_VALUES:
            break
        if not level:
            return
    raise ConfigError("the recipe is too large.", "Write it without aliases in aliases.")
