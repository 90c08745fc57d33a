"""The text of a recipe, and the YAML in it; both are a stranger's."""

from pathlib import Path
from typing import Any

import yaml

from fusion_bench.command import is_there
from fusion_bench.problems import ConfigError, Place, Problem, Problems

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


def is_recipe(text: str) -> bool:
    """Tell whether a text is a recipe of mergekit, by its first keys; it may have mistakes."""
    try:
        node = next(iter(yaml.safe_load_all(text)), None)
    except (yaml.YAMLError, RecursionError, ValueError):
        return False
    keys = node.keys() if isinstance(node, dict) else ()
    return "_target_" not in keys and bool({"merge_method", "experts", "slices"} & {*keys})


def nodes_of(text: str) -> list[Any]:
    """Return the YAML documents in a text.

    Raises:
        FusionBenchError: no YAML, none, one that is too large, or keys that are given twice.
    """
    loader = _Loader(text)
    nodes, twice = [], []
    try:
        while loader.check_data():
            loader.twice = []
            node = loader.get_data()
            if node is not None:
                nodes.append(node)
                twice.append(loader.twice)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the recipe is no YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    if not nodes:
        raise ConfigError("the recipe is empty.", "Give a 'merge_method' and 'models'.")
    several = len(nodes) > 1
    Problems(
        problem.inside(index) if several else problem
        for index, own in enumerate(twice)
        for problem in own
    ).raise_all()
    _refuse_large(nodes)
    return nodes


class _Loader(yaml.SafeLoader):
    """Reads plain values, and notes keys that a mapping has twice: YAML's last would win."""

    twice: list[Problem]

    def construct_document(self, node: yaml.Node) -> Any:
        self._look_for_twins(node)
        return super().construct_document(node)

    def _look_for_twins(self, root: yaml.Node) -> None:
        seen: set[int] = set()  # what an alias names is looked at once
        nodes: list[tuple[Place, yaml.Node]] = [((), root)]
        while nodes:
            place, node = nodes.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                nodes += reversed([((*place, i), own) for i, own in enumerate(node.value)])
            elif isinstance(node, yaml.MappingNode):
                lines: dict[str, list[int]] = {}
                for key, _ in node.value:
                    if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                        lines.setdefault(key.value, []).append(key.start_mark.line + 1)
                self.twice += [
                    Problem((*place, key), _twice(own), "Remove all but one.")
                    for key, own in lines.items()
                    if len(own) > 1
                ]
                nodes += reversed([((*place, str(key.value)), own) for key, own in node.value])


def _twice(lines: list[int]) -> str:
    *before, last = map(str, lines)
    return f"it is given {len(lines)} times, in the lines {', '.join(before)} and {last}."


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
