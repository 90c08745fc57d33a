"""JSON schemas of configs, made from the signatures and docstrings of what a config may call.

An editor's language server reads them, and so does ``fusion_bench.catalog``, which then needs no
import of the classes.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from importlib import import_module
from typing import Any, get_type_hints

from docstring_parser import DocstringStyle, parse
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from fusion_bench.catalog import PROGRAM
from fusion_bench.trust import find

#: JSON, as ``json.dumps`` takes it.
Json = dict[str, Any]

#: The packages whose public classes get a schema each.
PACKAGES = ("method", "modelpool", "taskpool", "programs")
#: Public names that no config calls: contracts, and parts that others make.
_NO_NODES = {
    *("LearningData", "PatchHead", "Task", "TaskDescription", "TuningImages"),
    *("SweptSearch", "TensorwiseAlgorithm"),
}
#: Keys whose value is a node of one package.
_SECTIONS = {
    "method": "method",
    "base_method": "method",
    "modelpool": "modelpool",
    "taskpool": "taskpool",
    "search": "programs",
    "fabric": "fabric",
}
#: Arguments that the command line gives, not the config.
_NOT_CONFIGURED = ("parts", "problems", "output_dir")
#: How a docstring says that an argument is described at another class.
_ELSEWHERE = re.compile(r"\b(?:[Aa]s (?:in|of|those of)|the options of) ``(\w+)``")
_INTERPOLATION: Json = {"type": "string", "pattern": r"^(\?\?\?$|.*\$\{)"}
_HYDRA_KEYS: Json = {r"^_(recursive|convert|partial|args)_$": {}}


def targets() -> Iterator[str]:
    """Yield what a config may call of this package; importing it takes seconds."""
    for package in PACKAGES:
        name = f"fusion_bench.{package}"
        yield from (f"{name}.{own}" for own in import_module(name).__all__ if own not in _NO_NODES)


def config_schema(names: Iterable[str]) -> Json:
    """Return the schema of a whole config, with a definition for each of ``names`` and section.

    Args:
        names: the ``_target_``s that it knows.

    Raises:
        ConfigError: a name that a config may not call.
    """
    classes = {name: class_schema(name) for name in names}
    definitions: Json = {
        "interpolation": _INTERPOLATION,
        "fabric": _section([], "The arguments of lightning.Fabric."),
        **{
            section: _section(
                [name for name in classes if name.startswith(f"fusion_bench.{section}.")],
                f"A node of fusion_bench.{section}.",
            )
            for section in PACKAGES
        },
        **classes,
    }
    definitions["node"] = _section(list(classes), "What _target_ names is called with these keys.")
    whole = _section([name for name in classes if name.startswith("fusion_bench.programs.")], "")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of fusion_bench",
        "type": "object",
        "if": {"required": ["_target_"]},
        "then": whole,
        "else": {"properties": _loose(classes[PROGRAM]["properties"])},
        "definitions": definitions,
    }


def class_schema(name: str) -> Json:
    """Return the schema of a node that calls ``name``.

    Raises:
        ConfigError: a name that a config may not call.
    """
    function = find(name)
    summary, meanings = _documented(function)
    hints = _hints(function)
    properties: Json = {"_target_": {"const": name, "description": summary}}
    required, closed = [], True
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            closed = closed and parameter.kind is not parameter.VAR_KEYWORD
            continue
        key = parameter.name
        if key in _NOT_CONFIGURED and name.startswith("fusion_bench.programs."):
            continue
        own: Json = _value_schema(key, hints.get(key, MISSING))
        if meaning := meanings.get(key):
            own["description"] = meaning
        if parameter.default is parameter.empty:
            required.append(key)
        elif (default := _plain(parameter.default)) is not MISSING:
            own["default"] = default
        properties[key] = own
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": ["_target_", *required],
        "patternProperties": _HYDRA_KEYS,
        "additionalProperties": not closed,
    }


def _documented(function: Any) -> tuple[str, Mapping[str, str]]:
    """Return a callable's first line, and its arguments' meanings, inherited ones too."""
    summary, meanings = "", dict[str, str]()
    others = dict[str, None]()
    for own in inspect.getmro(function) if inspect.isclass(function) else (function,):
        text = own.__doc__ or ""
        if not text.strip() or own.__module__ == "builtins":
            continue
        documented = parse(inspect.cleandoc(text), DocstringStyle.GOOGLE)
        summary = summary or documented.short_description or ""
        others |= dict.fromkeys(_ELSEWHERE.findall(text))
        for one in documented.params:
            meaning = " ".join((one.description or "").split())
            if meaning and not _ELSEWHERE.search(meaning):
                meanings.setdefault(one.arg_name, meaning)
    for other in others:
        near = getattr(import_module(function.__module__.rpartition(".")[0]), other, None)
        if near is not None and near is not function:
            meanings = {**_documented(near)[1], **meanings}
    return summary, meanings


def _section(names: list[str], description: str) -> Json:
    """Return the schema of a node that calls one of ``names``; other targets may have any keys."""
    properties: Json = {"_target_": {"type": "string"}}
    if names:
        properties["_target_"] = {"anyOf": [{"enum": names}, {"type": "string"}]}
    return {
        "type": ["object", "null"],
        "description": description,
        "properties": properties,
        "allOf": [
            {
                "if": {"properties": {"_target_": {"const": name}}, "required": ["_target_"]},
                "then": {"$ref": f"#/definitions/{name}"},
            }
            for name in names
        ],
    }


def _loose(properties: Json) -> Json:
    """Return the properties of a program, of which a defaults list may bring the rest."""
    return {key: value for key, value in properties.items() if key != "_target_"}


def _value_schema(key: str, hint: Any) -> Json:
    """Return the schema of an argument, whose value may also be an interpolation."""
    if key in _SECTIONS:
        return {"$ref": f"#/definitions/{_SECTIONS[key]}"}
    schema = {} if hint is MISSING else _of_type(hint)
    if not schema:
        return {}
    return {"anyOf": [schema, {"$ref": "#/definitions/interpolation"}]}


def _of_type(hint: Any) -> Json:
    """Return the schema of a type; an empty one for a class that no YAML can write."""
    try:
        schema = TypeAdapter(hint).json_schema()
    except PydanticUserError:
        return {}
    return schema if "$defs" not in schema else {}


def _hints(function: Any) -> Mapping[str, Any]:
    wanted = function.__init__ if inspect.isclass(function) else function
    try:
        return get_type_hints(wanted)
    except NameError:  # a type that is imported for type checkers alone
        return {
            name: parameter.annotation
            for name, parameter in inspect.signature(function).parameters.items()
            if not isinstance(parameter.annotation, str)
        }


def _plain(value: object) -> Any:
    """Return a default as JSON has it; ``MISSING`` for an object."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return MISSING if MISSING in items else items
    if isinstance(value, Mapping) and not value:
        return {}
    return MISSING
