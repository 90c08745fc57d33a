"""Values of our options, as a recipe of mergekit has them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fusion_bench.forms import leaves
from fusion_bench.recipes.levels import beginnings
from fusion_bench.recipes.methods import MODULES, Parameter


def theirs(meant: Parameter, value: Any) -> Any:
    """Return a value of ours as mergekit has it."""
    if meant.kind == "truth" and meant.values:
        found = [key for key, own in meant.values.items() if same(own, value)]
        return found[0] if found else value in (True, "inverse_keep")
    if meant.option == "threshold" and value > 1:
        value = value / 100
    return float(f"{1 - value:.15g}") if meant.complement else value


def of_model(value: Any, model: str, index: int) -> Any:
    """Return the value of one model; None where there is none."""
    if isinstance(value, Mapping) and "gradient" not in value:
        return value.get(model)
    return value[index] if isinstance(value, list) else value


def contained(pattern: str) -> str | None:
    """Return the text of a pattern ``*text*``; None for any other pattern."""
    if not (match := re.fullmatch(r"\*(.+)\*", pattern)):
        return None
    plain = re.sub(r"\[([*?[])\]", "", match[1])
    return None if re.search(r"[*?\[]", plain) else re.sub(r"\[([*?[])\]", r"\1", match[1])


def is_special(name: str) -> bool:
    """Tell whether a model of a pool takes no part in the merge, by its name."""
    return name.startswith("_") or name.endswith("_")


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same; so are what turns a text off, and what is empty."""
    if {one, other} == {False, "none"} if _plain(one) and _plain(other) else False:
        return True
    if all(own is None or own in ({}, []) for own in (one, other)):
        return True
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _plain(value: Any) -> bool:
    return isinstance(value, str | bool | int | float)


def module_of(stack: str | list[str]) -> str | None:
    """Return the module of a recipe whose tensors are those of a stack; None where there is none.

    Args:
        stack: what the names of the tensors begin with.
    """
    begun = {stack} if isinstance(stack, str) else {*stack}
    short = min(begun, key=len)
    known = [name for name in (*MODULES, short) if begun == {*beginnings(name)}]
    whole = [name for name in (*MODULES, short) if begun <= {*beginnings(name)}]
    return next(iter([*known, *whole]), None)


def numbers_in(value: Any) -> Iterator[float]:
    """Return the numbers of an option: of models, of gradients."""
    return (own for own in leaves(value) if isinstance(own, int | float))
