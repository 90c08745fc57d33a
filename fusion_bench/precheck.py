"""Finds mistyped keys and values of a config by the schemas, before anything slow is imported."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from jsonschema import Draft7Validator

from fusion_bench.catalog import OF_ALL_ENTRIES, choices_of, definitions
from fusion_bench.forms import rule_problem, several
from fusion_bench.problems import Place, Problem, did_you_mean

_HYDRA_KEYS = {"_target_", "_recursive_", "_convert_", "_partial_", "_args_"}
_WORDS = {
    "boolean": "true or false",
    "number": "a number",
    "integer": "a whole number",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def problems(config: object) -> list[Problem]:
    """Return a problem for each key that a class does not take, and each value of another type.

    Args:
        config: a resolved config. Classes that have no schema are left alone.
    """
    found = list(_problems(config, ()))
    # A method may take the seed over from the program.
    told = {problem.reason for problem in found if problem.place == ("seed",)}
    found = [_of_pool(problem, config) for problem in found]
    return [one for one in found if one.place[1:][-1:] != ("seed",) or one.reason not in told]


def _of_pool(problem: Problem, config: object) -> Problem:
    """Return the problem of a key of a method that is the pool's, or that has several values."""
    if len(problem.place) != 2 or problem.place[0] != "method" or not isinstance(config, Mapping):
        return problem
    method, pool, key = config["method"], config.get("modelpool"), problem.place[1]
    if isinstance(method[key], list) and not problem.remedy:
        return replace(problem, remedy=several(str(key)))
    target = str(pool.get("_target_")) if isinstance(pool, Mapping) else ""
    named = str(method["_target_"])
    if key in definitions()[named]["properties"] or "." not in target:
        return problem
    if key not in (definitions().get(target) or {"properties": ()})["properties"]:
        return problem
    value = method[key]
    said = f"={value}" if isinstance(value, str) else ""
    return replace(problem, remedy=f"It is a key of the pool: give 'modelpool.{key}{said}'.")


def _problems(node: object, place: Place) -> Iterator[Problem]:
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _problems(child, (*place, index))
    if not isinstance(node, Mapping):
        return
    target = str(node.get("_target_"))
    schema = definitions().get(target) if "." in target else None
    if schema is not None:
        for found in _own_problems(node, target.rpartition(".")[2], schema):
            yield found.inside(*place)
    for name, child in node.items():
        yield from _problems(child, (*place, str(name)))


def _own_problems(
    node: Mapping[str, Any], name: str, schema: Mapping[str, Any]
) -> Iterator[Problem]:
    known = schema["properties"]
    for key, value in node.items():
        if key in _HYDRA_KEYS:
            continue
        if key not in known:
            if not schema["additionalProperties"]:
                near = did_you_mean(str(key), known.keys() - _HYDRA_KEYS)
                yield Problem((key,), f"{name} takes no such key.", near)
        elif key == "loggers" and isinstance(value, Mapping | str) and "_target_" not in value:
            remedy = "Choose one: 'fabric/loggers=csv_logger', and set its keys beside that."
            yield Problem((key,), f"'{value}' names no logger.", remedy)
        elif key == "where" and isinstance(value, list):
            yield from _rule_problems(value, name, known)
        elif "where" in known and (wrong := rule_problem(key, value)) is not None:
            yield wrong
        elif not _holds_nodes(value) and not _fits(value, known[key]):
            yield Problem((key,), *_mismatch(value, known[key]))


def _rule_problems(rules: list[Any], name: str, properties: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with options that are given by rules, as with those of the class."""
    known = properties["where"]["anyOf"][0]["items"].get("properties", {})
    for index, rule in enumerate(rules):
        if not isinstance(rule, Mapping):
            yield Problem(("where", index), f"'{rule}' is not a mapping.")
            continue
        for key, value in rule.items():
            place = ("where", index, str(key))
            if key in OF_ALL_ENTRIES:
                reason = f"'{key}' holds for the whole model."
                yield Problem(place, reason, "Set it outside of 'where'.")
            elif key not in known:
                near = did_you_mean(str(key), known)
                yield Problem(place, f"{name} has no such option.", near)
            elif key == "optional" and not isinstance(value, bool):
                yield Problem(place, f"'{value}' is not true or false.")
            elif key in properties and not _inner(value) and not _fits(value, properties[key]):
                yield Problem(place, *_mismatch(value, properties[key]))


def _inner(value: object) -> bool:
    """Return whether a value has values of its own for models or layers; the method reads them."""
    listed = isinstance(value, list) and any(isinstance(own, Mapping) for own in value)
    return listed or isinstance(value, Mapping)


def _holds_nodes(value: object) -> bool:
    """Return whether a value becomes something else before the class sees it."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_holds_nodes, value.values()))
    return isinstance(value, list) and any(map(_holds_nodes, value))


def _fits(value: object, schema: Mapping[str, Any]) -> bool:
    if "$ref" in schema:  # a node, which is looked at by itself
        return True
    whole = {**schema, "definitions": {"interpolation": False}}  # all are resolved
    return bool(Draft7Validator(whole).is_valid(value))


def _mismatch(value: object, schema: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a value, and how to fix it."""
    choices = [choice for choice in choices_of(schema) if isinstance(choice, str)]
    if isinstance(value, str) and choices:
        return f"'{value}' is unknown.", did_you_mean(value, choices)
    wanted = dict.fromkeys(_wanted(schema))
    return f"{'null' if value is None else repr(str(value))} is not {' or '.join(wanted)}.", ""


def _wanted(schema: Mapping[str, Any]) -> Iterator[str]:
    for own in schema.get("anyOf", ()):
        yield from _wanted(own)
    if "enum" in schema or "const" in schema:
        yield " or ".join(map(str, choices_of(schema)))
    elif "type" in schema:
        items = schema.get("items", {}).get("type")
        yield _WORDS[schema["type"]] + (" of numbers" if items == "number" else "")
