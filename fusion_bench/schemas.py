"""JSON schemas of what a config may call, made from signatures and docstrings.

``fusion_bench.editor`` makes schemas of whole files from them, which an editor's language server
reads, and ``fusion_bench.catalog`` needs no import of the classes.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from importlib import import_module
from pkgutil import walk_packages
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from fusion_bench.catalog import OF_ALL_ENTRIES
from fusion_bench.trust import find

#: JSON, as ``json.dumps`` takes it.
Json = dict[str, Any]

#: The packages whose public classes get a schema each.
PACKAGES = ("method", "modelpool", "taskpool", "programs")
#: What a config may call beside them.
_OTHERS = (
    "fusion_bench.zoo.load_dataset",
    "fusion_bench.zoo.dense.load_dataset",
    "fusion_bench.zoo.language.load_dataset",
    "datasets.load_dataset",
    "datasets.load_from_disk",
    "lightning.Fabric",
)
#: Public names that no config calls: contracts, and parts that others make.
_NO_NODES = {
    *("LearningData", "PatchHead", "Task", "TaskDescription", "TuningImages"),
    *("SweptSearch", "TensorwiseAlgorithm"),
}
#: Definitions of the schema of whole files, for the values of these arguments.
_DEFINED = {
    "method": "method",
    "base_method": "method",
    "modelpool": "modelpool",
    "taskpool": "taskpool",
    "search": "search",
    "fabric": "fabric",
    "models": "models",
    "classifiers": "models",
    "policy": "policy",
    "train_datasets": "datasets",
    "val_datasets": "datasets",
    "test_datasets": "datasets",
    "dataset": "dataset",
    "head": "part",
    "processor": "part",
    "tokenizer": "part",
    "clip_model": "part",
    "data_processor": "part",
    "space": "space",
    "bases": "bases",
}
#: The same for arguments that other classes have for something else.
_DEFINED_OF_CLASS = {
    ("CLIPVisionModelTaskPool", "tasks"): "settings",
    ("ImageClassificationTaskPool", "tasks"): "settings",
    ("TaskPool", "tasks"): "tasks",
    ("ScalingStudy", "methods"): "methods",
    ("EvolutionSearch", "space"): "ranges",
}
#: Arguments that the command line gives, or a pool, and no config.
_NOT_CONFIGURED = {"programs": ("parts", "problems", "output_dir"), "zoo": ("recipe",)}
#: The arguments of other libraries that configs give; of the rest these libraries tell.
_THEIRS: Mapping[str, Mapping[str, str]] = {
    "lightning.Fabric": {
        "accelerator": "the kind of device; auto takes the best that there is.",
        "strategy": "how several devices share the work; auto suits most runs.",
        "devices": "how many devices, or a list of their numbers.",
        "num_nodes": "how many machines.",
        "precision": "of the models when they are evaluated or learned from.",
        "plugins": "plugins of lightning, as nodes.",
        "callbacks": "callbacks of lightning, as nodes.",
        "loggers": "one logger or a list of them, as nodes.",
    },
    "datasets.load_dataset": {
        "path": "a repository on the Hub, a directory, or a format such as json, csv, imagefolder.",
        "name": "the configuration, where the dataset has several.",
        "split": "the split, or a part of it such as train[:1000].",
        "data_dir": "the directory of the data files.",
        "data_files": "the data files: a path, a list, or split to path.",
        "revision": "branch, tag or commit on the Hub.",
        "streaming": "read while the run goes on; tasks need the whole split.",
    },
    "datasets.load_from_disk": {
        "dataset_path": "the directory that save_to_disk wrote.",
        "split": "which of its splits, where it has several.",
        "keep_in_memory": "copy it to memory.",
    },
}
_THEIR_SUMMARIES = {
    "lightning.Fabric": "Devices, processes and precision of a run.",
    "datasets.load_dataset": "A dataset on the Hub or in files.",
    "datasets.load_from_disk": "A dataset that was saved with save_to_disk.",
}
#: Those among them whose types they check as annotated.
_CHECKED = ("lightning.Fabric",)
#: How a docstring says that an argument is described at another class.
_ELSEWHERE = re.compile(r"\b(?:[Aa]s (?:in|of|those of)|the options of) ``(\w+)``")
#: What stands for a value: an interpolation, one that is still to be given, and what is a truth
#: value or a number in YAML 1.1, as which configs are read, and a text in YAML 1.2, as editors do.
INTERPOLATION: Json = {
    "type": "string",
    "pattern": r"^\?\?\?$|\$\{|^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$|^[-+]?\d[\d.]*_[\d_.]*$",
}
_KEYS: Json = {r"^_(recursive|convert|partial|args)_$": {}, "^defaults$": {}}
#: What makes an object.
_NODE: Json = {"type": "object", "required": ["_target_"]}


def targets() -> Iterator[str]:
    """Yield what a config may call without asking; importing it takes seconds."""
    for package in PACKAGES:
        name = f"fusion_bench.{package}"
        yield from (f"{name}.{own}" for own in import_module(name).__all__ if own not in _NO_NODES)
    yield from _OTHERS


def users_targets(package: str) -> Iterator[str]:
    """Yield the public classes that a package or module of a user's own defines.

    Raises:
        ImportError: it, or a module in it, cannot be imported.
    """
    module = import_module(package)
    inner = walk_packages(getattr(module, "__path__", ()), f"{package}.")
    for name in (package, *(found.name for found in inner if not found.name.endswith("__main__"))):
        for own in vars(import_module(name)).values():
            if inspect.isclass(own) and not own.__name__.startswith("_"):
                shown = name == package and own.__module__.startswith(f"{package}.")
                if shown or own.__module__ == name:
                    yield f"{name}.{own.__name__}"


def is_ours(name: str) -> bool:
    """Tell whether a target is of this package."""
    return name.startswith("fusion_bench.")


def class_schema(name: str) -> Json:
    """Return the schema of a node that calls ``name``.

    Which keys a whole node needs is under ``needs``, because the node of a file that begins with a
    defaults list is only a part. Of classes that are not ours only the keys are checked.

    Raises:
        ConfigError: a name that a config may not call.
    """
    function = find(name)
    summary, meanings = _documented(function)
    theirs = _THEIRS.get(name)
    summary = _THEIR_SUMMARIES.get(name, summary)
    return mapping_schema(name, function, summary, theirs or meanings, theirs is not None)


def mapping_schema(
    name: str, function: Any, summary: str, meanings: Mapping[str, str], only: bool = False
) -> Json:
    """Return the schema of a mapping that gives the arguments of ``function``.

    Args:
        name: its ``_target_``.
        function: what is called.
        summary: what it is.
        meanings: what its arguments are for.
        only: tell of no other arguments than those in ``meanings``.
    """
    hints = _hints(function)
    properties: Json = {"_target_": {"description": summary}}
    needs, closed = [], True
    package = name.split(".")[1] if is_ours(name) else ""
    for parameter in inspect.signature(function).parameters.values():
        key = parameter.name
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            closed = closed and parameter.kind is not parameter.VAR_KEYWORD
            continue
        if key in _NOT_CONFIGURED.get(package, ()):
            continue
        if only and key not in meanings:
            closed = False
            continue
        own = _value_schema(name, key, hints.get(key, MISSING))
        if meaning := meanings.get(key):
            own["description"] = meaning
        if parameter.default is parameter.empty:
            needs.append(key)
        elif (default := _plain(parameter.default)) is not MISSING:
            own["default"] = default
        properties[key] = own
    if "where" in properties and is_ours(name):
        properties["where"]["anyOf"][0]["items"] = _rule_schema(name, properties)
    if only:
        properties |= {key: {"description": meanings[key]} for key in meanings.keys() - properties}
    return {
        "title": name.rpartition(".")[2],
        "type": "object",
        "description": summary,
        "properties": properties,
        "needs": needs,
        "patternProperties": _KEYS | ({"^hydra$": {}} if package == "programs" else {}),
        "additionalProperties": not closed,
    }


def _rule_schema(name: str, properties: Json) -> Json:
    """Return the schema of a rule of ``where``: a pattern, and options of the class itself."""
    options = [key for key in properties if key not in OF_ALL_ENTRIES]
    forms = [{"$ref": "#/definitions/gradient"}, {"$ref": "#/definitions/gradients"}]

    def value(key: str) -> Json:
        own = {"$ref": f"#/definitions/{name}/properties/{key}"}
        return {"anyOf": [own, *forms[: 2 if _by_model(properties[key]) else 1]]}

    own = {
        "match": {"$ref": "#/definitions/match"},
        "optional": {"type": "boolean", "description": "Whether the patterns may match nothing."},
    }
    return {
        "type": "object",
        "properties": {**own, **{k: value(k) for k in options}},
        "additionalProperties": False,
    }


def _by_model(schema: Json) -> bool:
    """Return whether a value may be a mapping of models to numbers."""
    number = {"additionalProperties": {"type": "number"}, "type": "object"}
    return schema == number or any(map(_by_model, schema.get("anyOf", ())))


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


def _value_schema(name: str, key: str, hint: Any) -> Json:
    """Return the schema of an argument, whose value may also be an interpolation."""
    if is_ours(name):
        own = _DEFINED_OF_CLASS.get((name.rpartition(".")[2], key)) or _DEFINED.get(key)
        if own and not (own == "part" and hint not in (Any, MISSING)):
            return {"$ref": f"#/definitions/{own}"}
    schema = {} if hint is MISSING else _of_type(hint)
    if not schema:
        return {}
    if is_ours(name) or name in _CHECKED:
        return {"anyOf": [schema, {"$ref": "#/definitions/interpolation"}]}
    return {"anyOf": [schema, {}]}  # offered; the program does not check the types of others


def _of_type(hint: Any) -> Json:
    """Return the schema of a type; an object is made by a node, and ``Any`` has an empty one."""
    if hint is Any:
        return {}
    try:
        schema = TypeAdapter(hint).json_schema()
    except PydanticUserError:
        return _of_parts(hint)
    return schema if "$defs" not in schema else _NODE


def _of_parts(hint: Any) -> Json:
    origin, inner = get_origin(hint), [_of_type(own) for own in get_args(hint)]
    if origin in (Union, UnionType):
        return {"anyOf": inner} if all(inner) else {}
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return {"type": "array", "items": inner[0]}
    return {} if origin else _NODE


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
