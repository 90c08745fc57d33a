"""Forms of values in a config that several rooms have to know: rules, and settings of tokens."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import yaml

from fusion_bench.problems import Problem

#: Keys of a pool's ``tokenizer`` that is not a node, but says where tokens come from.
TOKEN_KEYS = ("source", "base", "tokens", "pad_to_multiple_of")


class _Plain(yaml.SafeDumper):
    """Writes what stands in several places out in each, without anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        """Write a list of numbers, such as a range of layers, in one line."""
        numbers = bool(sequence) and all(isinstance(own, int | float) for own in sequence)
        return super().represent_sequence(tag, sequence, True if numbers else flow_style)


def plain_yaml(*documents: object, width: int = 80) -> str:
    """Return YAML for people, in the given order and without anchors."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=width)


def unquoted(value: object) -> tuple[str, str]:
    """Return what is wrong with a name that YAML does not read as a text, and how to fix it."""
    if isinstance(value, bool):
        words = "yes, on or true" if value else "no, off or false"
        reason = f"YAML reads an unquoted {words} as {str(value).lower()}, and not as a name."
        return reason, "Put it in quotes."
    if value is None:
        return "YAML reads an unquoted null as nothing, and not as a name.", "Put it in quotes."
    return (
        f"YAML reads an unquoted {value} as a number or a date, and not as a name.",
        "Put it in quotes.",
    )


def rule_problem(name: str, value: object) -> Problem | None:
    """Return the problem of a gradient outside of ``where``, or of a ``where`` that is one rule."""
    if name == "where" and isinstance(value, Mapping):
        return Problem((name,), "it is not a list of rules.", "Put it in a list: [{…}].")
    if name == "where" or not _has_gradient(value):
        return None
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    remedy = f"In place of it, give '{{here}}where=[{{{name}: {flow}}}]'."
    return Problem((name,), "a gradient has to be in a rule.", remedy)


def _has_gradient(value: object) -> bool:
    if isinstance(value, Mapping):
        return "gradient" in value or any(map(_has_gradient, value.values()))
    return isinstance(value, list) and any(map(_has_gradient, value))


def leaves(node: object) -> Iterator[object]:
    """Yield what stands in the lists and mappings of a node, and is none itself."""
    if isinstance(node, Mapping | list):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from leaves(value)
    else:
        yield node


def several(option: str) -> str:
    """Return how a model of each value of a method's option is made, for a list in its place."""
    return f"For a model of each, choose method=family and give it as method.options.{option}."


def says_of_tokens(node: Mapping[Any, Any]) -> bool:
    """Return whether a pool's ``tokenizer`` says where tokens come from, maybe with mistakes."""
    if not node.keys().isdisjoint(TOKEN_KEYS):
        return True
    return "_target_" not in node and any(get_close_matches(str(key), TOKEN_KEYS) for key in node)
