"""JSON schemas of config files, by which an editor completes, explains and checks a YAML.

What a schema refuses, a run refuses; a run refuses more. A file that begins with a defaults list is
only a part of a config, and so is a choice of a config group: they may lack what others bring.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from docstring_parser import parse_from_object

from fusion_bench.catalog import PROGRAM
from fusion_bench.configs import CONFIG_DIR, merged, suites
from fusion_bench.schemas import (
    INTERPOLATION,
    PACKAGES,
    Json,
    class_schema,
    mapping_schema,
)
from fusion_bench.tasks import Task
from fusion_bench.weights import MergePolicy

_DRAFT = "http://json-schema.org/draft-07/schema#"
#: The schema of whole configs, to whose definitions the others refer.
CONFIG = "config.json"
#: Config groups whose files are a node; its summary.
_SECTIONS = {
    "method": "The method that merges the models.",
    "modelpool": "The models to merge, and what to do where they differ.",
    "taskpool": "The tasks on which the models are evaluated; null: none.",
    "search": "A search for the method's options on the validation split.",
    "fabric": "Devices, processes and precision; the arguments of lightning.Fabric.",
}
_GROUPS = ("method", "modelpool", "taskpool", "fabric")
#: Packages of which a config may call only what is known here.
_CLOSED = r"fusion_bench|hydra|omegaconf"
_HARDWARE = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")
_STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "dp", "fsdp", "deepspeed")


#: Keys of FusionBench's configs, which are understood beside ours.
_THEIRS: Json = {
    "path": {
        "anyOf": [{"type": "object"}, {"type": "string"}],
        "description": "Folders, of which log_dir is the run's.",
    },
    "print_config": {"type": "boolean", "description": "Print the config before the run."},
    "print_function_call": {"type": "boolean", "description": "Without effect."},
}


def schema_files(names: Iterable[str]) -> dict[str, Json]:
    """Return the schema of each kind of file, by the schema's own file name.

    Args:
        names: of all classes and functions that a config may call.

    Raises:
        ConfigError: a name that a config may not call.
    """
    classes = {name: class_schema(name) for name in names}
    classes[PROGRAM]["properties"] |= _THEIRS
    for key, choices in (("accelerator", _HARDWARE), ("strategy", _STRATEGIES)):
        own = classes["lightning.Fabric"]["properties"][key]
        own["anyOf"].insert(0, {"enum": list(choices)})
    definitions = {
        "interpolation": INTERPOLATION,
        **_RULES,
        **_parts(classes),
        "defaults": _defaults(),
        **{f"{group}_choice": _choice(group, classes) for group in _GROUPS},
        "complete": _complete(classes),
        **classes,
    }
    files = {
        CONFIG: {**_config(classes), "definitions": definitions},
        # One reference each: the language server follows every one into another file anew.
        **{f"{group}.json": {"$ref": f"{CONFIG}#/definitions/{group}_choice"} for group in _GROUPS},
        "policy.json": {"$ref": f"{CONFIG}#/definitions/policy"},
        "dataset.json": _DATASET,
        "suite.json": _SUITE,
        "hydra.json": _HYDRA,
    }
    titles = {"config": "A config of fusion_bench"}
    return {
        name: {"$schema": _DRAFT, "title": titles.get(stem, f"A {stem} of fusion_bench"), **schema}
        for name, schema in files.items()
        for stem in [name.removesuffix(".json")]
    }


def _config(classes: Mapping[str, Json]) -> Json:
    """Return the schema of a whole config: a program, its defaults list, and Hydra's settings."""
    programs = [name for name in classes if name.startswith("fusion_bench.programs.")]
    programs = [name for name in programs if "dry_run" in classes[name]["properties"]]
    complete = {"$ref": "#/definitions/complete"}
    # A search gives options of the method, so that its node need not be complete.
    searched = {"properties": {"method": {}}, "additionalProperties": complete}
    return {
        "type": "object",
        "properties": {
            "_target_": _target(programs, classes, "programs"),
            "defaults": {"$ref": "#/definitions/defaults"},
            "hydra": {
                "description": "Settings of Hydra itself: output directories, sweeps, launchers."
            },
        },
        "allOf": [
            *_called(programs),
            *_brought("", programs),
            *(each for group in _GROUPS[:3] for each in _chosen(group, _names(group, classes))),
            {
                "if": {"required": ["_target_"]},
                "else": {"properties": _without_target(classes[PROGRAM])},
            },
            {
                "if": {"required": ["defaults"]},
                "else": {
                    "required": ["_target_"],
                    "if": {"required": ["search"]},
                    "then": searched,
                    "else": complete,
                },
            },
        ],
    }


def _choice(group: str, classes: Mapping[str, Json]) -> Json:
    """Return the schema of the files of a config group."""
    names = _names(group, classes)
    return {
        "type": "object",
        "properties": {"defaults": {"$ref": "#/definitions/defaults"}},
        "allOf": [{"$ref": f"#/definitions/{group}"}, *_brought(group, names)],
    }


def _parts(classes: Mapping[str, Json]) -> Json:
    """Return the definitions of what programs, pools and tasks consist of."""
    nodes = {
        section: _node(_names(section, classes), classes, f"{section} node", summary, section)
        for section, summary in _SECTIONS.items()
    }
    # Without a target, it is Fabric.
    nodes["fabric"]["allOf"] = [
        {
            "if": {
                "type": "object",
                "properties": {"_target_": {"pattern": _pattern("lightning.Fabric")}},
            },
            "then": {"$ref": "#/definitions/lightning.Fabric"},
        }
    ]
    tasks = [name for name in _names("taskpool", classes, "") if name.endswith("Task")]
    loaders = [name for name in classes if name.rpartition(".")[2].startswith("load_")]
    return {
        **nodes,
        "model": {
            "description": "A directory, file or repository on the Hub, zoo:NAME, a node with "
            "_target_, or an adapter's path and base.",
            "type": ["string", "object"],
            "properties": {
                "_target_": {
                    "description": "What makes the model.",
                    "anyOf": [
                        {"enum": ["transformers.CLIPVisionModel.from_pretrained"]},
                        {"type": "string"},
                    ],
                },
                "path": {"description": "The adapter: a directory or repository."},
                "base": {"description": "The model on which the adapter was trained."},
            },
        },
        "models": _by_name("models by name", "_pretrained_ is what they were tuned from.", "model"),
        "dataset": _node(loaders, classes, "dataset node", "A dataset, by what loads it."),
        "datasets": _by_name("datasets by name", "Each has the name of its task.", "dataset"),
        "task": _node(tasks, classes, "task node", "A task of any kind."),
        "tasks": _by_name("tasks by name", "Each is a node.", "task"),
        "part": {
            "words": "name or node",
            "description": "A directory or repository, or a node with _target_.",
            "type": ["string", "object", "null"],
        },
        "policy": _settings(MergePolicy, "place"),
        "setting": _settings(Task, "by_name"),
        "settings": _by_name("settings by name", "What differs from the known task.", "setting"),
        "space": {
            "words": "lists of values",
            **_or_interpolation("object"),
            "additionalProperties": _or_interpolation("array"),
        },
        "ranges": {"words": "options with ranges in them", **_or_interpolation("object")},
        "base": {
            "type": "object",
            "properties": {
                section: {"$ref": f"#/definitions/{section}"}
                for section in ("modelpool", "taskpool")
            },
        },
        "bases": _by_name("pools by name", "A model pool and a task pool each.", "base"),
        "methods": {
            "words": "list of methods",
            **_or_interpolation("array", "null"),
            "items": {
                "anyOf": [
                    {"enum": _choices("method")},
                    {"$ref": "#/definitions/method"},
                    {"type": "string"},
                ]
            },
        },
    }


def _node(
    names: list[str], classes: Mapping[str, Json], words: str, summary: str, section: str = ""
) -> Json:
    """Return the schema of a node, which may be of a class that is not known here."""
    return {
        "title": words,
        "words": words,
        "description": summary,
        **_or_interpolation("object", "null"),
        "properties": {"_target_": _target(names, classes, section)},
        "allOf": _called(names),
    }


def _target(names: list[str], classes: Mapping[str, Json], section: str) -> Json:
    """Return the schema of a ``_target_``: a known class, or one of another package."""
    known = _names(section, classes, "") if section else names
    own = "|".join(_pattern(name) for name in known)
    return {
        "anyOf": [
            {
                "type": "string",
                "pattern": rf"^\?\?\?$|\$\{{|{own}|^(?!({_CLOSED})\.)",
                "patternErrorMessage": "fusion_bench has no such class.",
            },
            *(
                {"const": name, **{key: classes[name][key] for key in ("title", "description")}}
                for name in names
            ),
        ],
    }


def _called(names: Iterable[str]) -> list[Json]:
    """Return a condition for each class: where it is called, its arguments are checked."""
    return [
        {
            "if": {
                "type": "object",
                "properties": {"_target_": {"pattern": _pattern(name)}},
                "required": ["_target_"],
            },
            "then": {"$ref": f"#/definitions/{name}"},
        }
        for name in names
    ]


def _brought(group: str, names: Iterable[str]) -> list[Json]:
    """Return the same for files whose defaults list brings the ``_target_``."""
    known = dict(_targets(group))
    found = {name: [choice for choice, own in known.items() if own == name] for name in names}
    return [
        {
            "if": {
                "properties": {
                    "defaults": {"type": "array", "contains": {"enum": _places(group, choices)}}
                },
                "required": ["defaults"],
                "not": {"required": ["_target_"]},
            },
            "then": {"$ref": f"#/definitions/{name}"},
        }
        for name, choices in found.items()
        if choices
    ]


def _chosen(group: str, names: Iterable[str]) -> list[Json]:
    """Return the same for a section whose ``_target_`` is that of the one choice of its group."""
    entry: Json = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": rf"^((override|optional) )*/?{group}$"},
    }
    found: dict[str, list[str]] = {}
    for choice, name in _targets(group):
        found.setdefault(name, []).append(choice)
    conditions = []
    for name in (name for name in names if name in found):
        chosen = {**entry, "additionalProperties": {"enum": found[name]}}
        defaults = {
            "type": "array",
            "contains": chosen,
            "items": {"anyOf": [{"not": entry}, chosen]},
        }
        section = {"type": "object", "not": {"required": ["_target_"]}}
        conditions.append(
            {
                "if": {
                    "properties": {"defaults": defaults, group: section},
                    "required": ["defaults", group],
                },
                "then": {"properties": {group: {"$ref": f"#/definitions/{name}"}}},
            }
        )
    return conditions


def _places(group: str, choices: Iterable[str]) -> list[str]:
    """Return how a defaults list may name these for its own place."""
    if not group:
        return [f"{root}{choice}" for choice in choices for root in ("", "/")]
    return [f"/{group}/{choice}@_here_" for choice in choices]


def _complete(classes: Mapping[str, Json]) -> Json:
    """Return the schema of a value of whose nodes none lacks a key that it needs."""
    needed = {name: own for name, schema in classes.items() if (own := _demands(schema))}
    return {
        "if": {
            "type": "object",
            "required": ["_target_"],
            "not": {"anyOf": [{"required": ["_partial_"]}, {"required": ["_args_"]}]},
        },
        "then": {
            "allOf": [
                {**condition, "then": needed[name]}
                for name, condition in zip(needed, _called(needed), strict=True)
            ]
        },
        "additionalProperties": {"$ref": "#/definitions/complete"},
        "items": {"$ref": "#/definitions/complete"},
    }


def _demands(schema: Json) -> Json:
    """Return what a class demands of a whole node: its keys, and nodes with a target."""
    called: Json = {"required": ["_target_"]}
    inside: Json = {}
    for key, own in schema["properties"].items():
        kind = own.get("$ref", "").rpartition("/")[2]
        if kind in ("method", "modelpool", "taskpool", "search"):
            inside[key] = called
        elif kind in ("datasets", "tasks"):
            inside[key] = {"additionalProperties": called}
        elif kind == "models":
            adapter = {"properties": {"path": {}, "base": {}}, "additionalProperties": False}
            inside[key] = {"additionalProperties": {"if": called, "else": adapter}}
        if kind and key in schema["needs"] and key != "method":  # without one, nothing is merged
            inside[key] = {**inside.get(key, {}), "type": ["object", "array", "string"]}
    needs = {"required": schema["needs"]} if schema["needs"] else {}
    return {**needs, **({"properties": inside} if inside else {})}


def _defaults() -> Json:
    """Return the schema of a defaults list."""
    choice = {
        group: {
            "description": _SECTIONS[group],
            "anyOf": [{"enum": _choices(group)}, {"type": ["string", "array", "null"]}],
        }
        for group in _GROUPS
    }
    return {
        "description": "What is composed, in this order; _self_ is this file.",
        "type": "array",
        "items": {
            "anyOf": [
                {"enum": ["_self_", *(name for name, _ in _targets(""))]},
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {
                        **choice,
                        **{f"override {group}": own for group, own in choice.items()},
                        **{f"override /{group}": own for group, own in choice.items()},
                    },
                    "patternProperties": {
                        rf"^((override|optional) )*/?{group}(@.*)?$": own
                        for group, own in choice.items()
                    },
                },
            ]
        },
    }


#: What the rules of ``where`` consist of.
_RULES: Json = {
    "match": {
        "words": "pattern or list of patterns",
        "description": "Which entries the rule is for: key patterns, in which * matches anything.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
        ],
    },
    "gradient": {
        "words": "gradient",
        "type": "object",
        "properties": {
            "gradient": {
                "description": "Values along the layers, from the first to the last.",
                "type": "array",
                "minItems": 1,
            }
        },
        "required": ["gradient"],
        "additionalProperties": False,
    },
    "gradients": {
        "words": "mapping of models",
        "description": "A number or a gradient for each model.",
        "type": "object",
        "additionalProperties": {
            "anyOf": [
                {"type": "number"},
                {"$ref": "#/definitions/gradient"},
                {"$ref": "#/definitions/interpolation"},
            ]
        },
    },
}


def _by_name(words: str, summary: str, inner: str) -> Json:
    return {
        "words": words,
        "description": summary,
        **_or_interpolation("object", "null"),
        "additionalProperties": {"$ref": f"#/definitions/{inner}"},
    }


def _or_interpolation(*types: str) -> Json:
    return {
        "type": [*types, "string"],
        "pattern": INTERPOLATION["pattern"],
        "patternErrorMessage": f"This is a text, not a {_WORDS[types[0]]}.",
    }


_WORDS = {"object": "mapping", "array": "list"}


def _settings(kind: type, *left_out: str) -> Json:
    """Return the schema of a mapping of a dataclass's fields."""
    meanings = {
        one.arg_name: " ".join((one.description or "").replace("``", "").split())
        for one in parse_from_object(kind).params
    }
    schema = mapping_schema(f"fusion_bench.{kind.__name__}", kind, "", meanings)
    for key in ("_target_", *left_out):
        del schema["properties"][key]
    del schema["needs"], schema["patternProperties"]
    summary = (kind.__doc__ or "").partition("\n")[0]
    return {**schema, **_or_interpolation("object", "null"), "description": summary}


def _without_target(schema: Json) -> Json:
    return {key: own for key, own in schema["properties"].items() if key != "_target_"}


def _names(section: str, classes: Mapping[str, Json], ends: str = "Pool") -> list[str]:
    """Return the classes for a section, of a task pool's package those that are pools."""
    if section == "fabric":
        return ["lightning.Fabric"]
    package = {"search": "programs"}.get(section, section)
    names = [name for name in classes if name.startswith(f"fusion_bench.{package}.")]
    if section == "search" and ends:
        return [name for name in names if "space" in classes[name]["properties"]]
    if section == "taskpool":
        names = [name for name in names if name.endswith(ends)]
    return names + [name for name in classes if _is_users(name)]


def _is_users(name: str) -> bool:
    return name.partition(".")[0] not in ("fusion_bench", "datasets", "lightning")


def _pattern(name: str) -> str:
    """Return the pattern of a ``_target_``, which may also name the module of a class of ours."""
    if name == "lightning.Fabric":
        return r"^lightning\.(fabric\.)?Fabric$"
    package, _, last = name.rpartition(".")
    ours = package in {f"fusion_bench.{own}" for own in PACKAGES}
    between = r"\.(\w+\.)*" if ours else r"\."
    return f"^{re.escape(package)}{between}{last}$"


def _targets(group: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the class of each config of a group, or of each whole config."""
    folder = CONFIG_DIR / group
    for file in sorted(folder.rglob("*.yaml") if group else folder.glob("*.yaml")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if target := merged(file).get("_target_"):
            yield name, str(target)
    for own, name, made in suites():
        if group and own.startswith(f"{group}/"):
            template = made["defaults"][0].strip("/").partition("@")[0]
            node = merged(Path(template).with_suffix(".yaml"))
            yield f"{own.removeprefix(group).strip('/')}/{name}", str(node["_target_"])


def _choices(group: str) -> list[str]:
    """Return the names of a group's configs, templates left out."""
    return [name for name, _ in _targets(group) if not Path(name).name.startswith("_")]


_TEXTS: Json = {"type": "array", "items": {"type": "string"}}
_DATASET: Json = {
    "description": "A dataset of images, which stands for a choice for each split.",
    "type": "object",
    "properties": {
        "_target_": {"description": "What loads it; by default datasets.load_dataset."},
        "path": {"description": "A repository on the Hub, or a directory.", "type": "string"},
        "name": {"description": "The configuration, where there are several.", "type": "string"},
        "splits": {
            "description": "The config group of each split, and what the dataset calls it.",
            "type": "object",
            "properties": {split: {"type": "string"} for split in ("train", "validation", "test")},
            "additionalProperties": {"type": "string"},
        },
    },
    "required": ["splits"],
}
_SUITE: Json = {
    "description": "Models and tasks that belong together; stands for a choice for each.",
    "type": "object",
    "properties": {
        "model": {"description": "The group below model/.", "type": "string"},
        "modelpool": {"description": "The group below modelpool/.", "type": "string"},
        "taskpool": {"description": "The group below taskpool/.", "type": "string"},
        "dataset": {"description": "The group below dataset/.", "type": "string"},
        "pretrained": {"description": "The base; {architecture} is put in.", "type": "string"},
        "finetuned": {
            "description": "A model; {architecture} and {task} are put in.",
            "type": "string",
        },
        "suffixes": {
            "description": "Each architecture, and how the names of its task pools end.",
            "type": "object",
            "additionalProperties": {"type": "string"},
        },
        "suites": {
            "description": "The tasks of each suite.",
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "extends": {"description": "A suite whose tasks come first.", "type": "string"},
                    "tasks": {"description": "Names of datasets.", **_TEXTS},
                },
                "required": ["tasks"],
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}
_SUITE["required"] = list(_SUITE["properties"])
_PLUGINS = "hydra_plugins.hydra_"
_HYDRA: Json = {
    "description": "A choice of a group of Hydra's own: launcher, sweeper, callbacks, output.",
    "type": "object",
    "properties": {
        "_target_": {
            "description": "The class of the launcher, sweeper or callback.",
            "anyOf": [
                {
                    "enum": [
                        f"{_PLUGINS}joblib_launcher.joblib_launcher.JoblibLauncher",
                        f"{_PLUGINS}ray_launcher.ray_launcher.RayLauncher",
                        f"{_PLUGINS}submitit_launcher.submitit_launcher.LocalLauncher",
                        f"{_PLUGINS}submitit_launcher.submitit_launcher.SlurmLauncher",
                        f"{_PLUGINS}optuna_sweeper.optuna_sweeper.OptunaSweeper",
                        "hydra_plugins.fusion_bench_grid.GridSweeper",
                    ]
                },
                {"type": "string"},
            ],
        }
    },
}
