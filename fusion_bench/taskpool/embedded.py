"""The embedded texts, whose rows are known without ``datasets``."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusion_bench.sealed import remembered
from fusion_bench.zoo import language
from fusion_bench.zoo.language.tables import rows

#: The target of their config nodes.
EMBEDDED_TEXTS = "fusion_bench.zoo.language.load_dataset"


class Columns(Mapping[str, Any]):
    """Columns by their names, whose types are looked up when somebody asks for one."""

    def __init__(self, names: list[str], types: Callable[[], Mapping[str, Any]]):
        self._names = names
        self._types = types

    def __getitem__(self, name: str) -> Any:
        return self._types()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def embedded_rows(name: str, split: str, *, keeps: bool = True) -> list[dict[str, Any]]:
    """Return the rows of an embedded split, which are drawn once.

    Args:
        name: of the data set.
        split: of it.
        keeps: whether they are kept for the next run.
    """
    about = ["rows", language.RECIPES["llama-tiny"].key(), name, split]  # by what draws them
    kept = remembered("facts", about, lambda: json.dumps(rows(name, split)), keeps=keeps)
    found: list[dict[str, Any]] = json.loads(kept)
    return found


def embedded_split(node: Any) -> tuple[str, list[dict[str, Any]]] | None:
    """Return the name and the rows of an embedded split of texts and whole numbers; else None.

    The rows are what the dataset would hold, which need not be made for them.

    Raises:
        FusionBenchError: there is no such data set or split.
    """
    if not isinstance(node, Mapping) or node.get("_target_") != EMBEDDED_TEXTS:
        return None
    given = {name: value for name, value in node.items() if name != "_target_"}
    known = "name" in given and given.keys() <= {"name", "split"}
    if not known or not all(map(_is_text, given.values())):
        return None
    name, split = given["name"], given.get("split", "test")
    language.check_dataset(name, split)
    found = embedded_rows(name, split)
    return (split, found) if all(map(_is_plain, found[0].values())) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain(value: Any) -> bool:
    """Return whether a dataset returns a value as it was put in, as it does no real number."""
    return isinstance(value, str | int) or (isinstance(value, list) and all(map(_is_text, value)))
