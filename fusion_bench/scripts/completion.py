"""Completion in bash, zsh and fish: verbs, choices of config groups, options of what is chosen.

``argcomplete`` talks with the shell, and calls this when the user presses TAB. Nothing slow is
imported.
"""

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import argcomplete
import yaml

from fusion_bench.catalog import (
    GROUPS,
    KINDS,
    PROGRAM,
    Kind,
    Option,
    entries,
    full_name,
    of_kind,
    options,
    unambiguous,
)
from fusion_bench.command import file_as_options
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.scripts import verbs

#: The groups and, for each, what ``fusion_bench ls`` calls its choices.
_KINDS: Mapping[str, Kind] = {group: kind for kind, group in GROUPS.items()}
_FLAGS = {
    "--config-name": "the config to run",
    "--config-path": "the folder of your configs",
    "--cfg": "print the config instead of running it",
    "--multirun": "run once for each of several values",
    "--plugins": "let a config use classes of your file",
    "--allow": "let a config use classes of your installed package",
    "--trust-remote-code": "let models run code that they bring",
    "--help": "show help",
    "--version": "show the version",
    "--hydra-help": "show all options of Hydra",
}
#: A completion and what it means.
Offered = dict[str, str]


def complete() -> None:
    """Answer the shell, which asks with ``COMP_LINE``; ends the process."""
    line = os.environ.get("COMP_LINE", "")
    words = line[: int(os.environ.get("COMP_POINT", len(line)))].split()
    verb = words[1] if len(words) > 1 and words[1] in verbs.VERBS else ""
    finished = verb and (len(words) > 2 or line.endswith(" "))
    parser = _verb_parser(verb) if finished else _parser()
    argcomplete.autocomplete(parser)


def _verb_parser(verb: str) -> ArgumentParser:
    parser = verbs.parser_of(verb, with_name=True)
    known = {
        "name": _names(KINDS),
        "method": _names(("methods",)),
        "tasks": _names(("tasks",)),
        "config": _with_files(_names(("configs",))),
        "source": _with_files(_names(())),
        "overrides": _overrides,
        "models": _with_files(_models),
    }
    for action in parser._actions:
        if completer := known.get(action.dest):
            action.completer = completer  # type: ignore[attr-defined]
        elif action.dest in ("word", "parts"):
            action.completer = argcomplete.completers.SuppressCompleter()  # type: ignore[attr-defined]
    return parser


def _parser() -> ArgumentParser:
    """Return a parser for all that is no verb: Hydra's options and overrides."""
    parser = ArgumentParser(prog="fusion_bench", add_help=False)
    for flag, meaning in _FLAGS.items():
        takes = flag in ("--config-name", "--config-path", "--cfg", "--allow", "--plugins")
        stored = "store" if takes else "store_true"
        action = parser.add_argument(flag, help=meaning, action=stored)
        if flag == "--config-name":
            action.completer = _names(("configs",))  # type: ignore[attr-defined]
        elif flag == "--cfg":
            action.choices = ["job", "hydra", "all"]
    words = parser.add_argument("words", nargs="*")
    words.completer = _words  # type: ignore[attr-defined]
    return parser


def _names(kinds: Sequence[Kind]) -> Any:
    def completer(prefix: str, **_: object) -> Offered:
        return {entry.name: entry.summary for entry in entries() if entry.kind in kinds}

    return completer


def _models(prefix: str, parsed_args: Any, **_: object) -> Offered:
    """Offer the models that are built here, and settings."""
    built = (entry for entry in entries() if entry.kind == "models" and entry.name[:4] == "zoo:")
    return {**{entry.name: entry.summary for entry in built}, **_overrides(prefix, parsed_args)}


def _with_files(completer: Any) -> Any:
    def both(prefix: str, parsed_args: Any, **_: object) -> Offered:
        return {**completer(prefix, parsed_args=parsed_args), **_files(prefix)}

    return both


def _words(prefix: str, parsed_args: Any, **_: object) -> Offered:
    """Offer verbs, files and overrides."""
    before = list(parsed_args.words or [])
    found = _overrides(prefix, parsed_args)
    if not before:
        found = {**verbs.VERBS, **found, **_files(prefix)}
    return found


def _files(prefix: str) -> Offered:
    """Return YAMLs, reports, and folders."""
    folder = Path(prefix).parent if not prefix.endswith("/") else Path(prefix)
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return {}
    folders = {f"{path}/": "a folder" for path in inside if path.is_dir()}
    kinds = {".yaml": "a config", ".yml": "a config", ".json": "a report"}
    return folders | {str(path): kinds[path.suffix] for path in inside if path.suffix in kinds}


def _overrides(prefix: str, parsed_args: Any, **others: object) -> Offered:
    """Offer keys, or the values of a key that is there already."""
    given = [word for word in _typed_words() if word != prefix]
    key, equals, value = prefix.partition("=")
    sign = key[: len(key) - len(key.lstrip("+~"))]
    key = key.lstrip("+~")
    if equals:
        head, comma, __ = value.rpartition(",")
        return {
            f"{sign}{key}={head}{comma}{choice}": meaning
            for choice, meaning in _values(key, given).items()
        }
    return {f"{sign}{name}": meaning for name, meaning in _keys(key, given).items()}


def _typed_words() -> list[str]:
    return os.environ.get("COMP_LINE", "").split()[1:]


def _values(key: str, words: Sequence[str]) -> Offered:
    """Return the values of a key: choices of a group, or of an option."""
    group = key.partition("@")[0]
    if group in _KINDS:
        return {entry.name: entry.summary for entry in of_kind(_KINDS[group]) if entry.target}
    parent, _, name = key.rpartition(".")
    for option in _options(parent, words):
        if option.name == name:
            return {_as_typed(choice): option.meaning for choice in option.choices}
    return {}


def _as_typed(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _keys(key: str, words: Sequence[str]) -> Offered:
    """Return the keys that begin as ``key`` does."""
    parent = key.rpartition(".")[0]
    found = {}
    for option in _options(parent, words):
        name = f"{parent}.{option.name}" if parent else option.name
        node = option.name in _KINDS or option.type.endswith("node")
        if node and parent:
            found[f"{option.type.partition(' ')[0]}@{name}="] = option.meaning
        found[f"{name}{'.' if node else '='}"] = option.meaning
    if not parent:
        found |= {
            f"{group}=": f"choose one of 'fusion_bench ls {_KINDS[group]}'" for group in _KINDS
        }
        # Options of a nested method.
        found |= {
            f"method@method.{option.name}=": option.meaning
            for option in _options("method", words)
            if option.type == "method node"
        }
    return found


def _options(place: str, words: Sequence[str]) -> list[Option]:
    """Return the options of what stands at a place of the config."""
    if not place:
        return options(PROGRAM)
    target = _target(place, words)
    return options(target) if target else []


def _target(place: str, words: Sequence[str]) -> str:
    """Return the class of a node: the one that the words choose, else the config's own."""
    group, _, inner = place.partition(".")
    if group not in _KINDS:
        return ""
    name = _chosen(group, group, words)
    if not inner:
        return _target_of(group, name)
    nested = _chosen("method", place, words)
    if nested:
        return _target_of("method", nested)
    file = CONFIG_DIR / group / f"{full_name(group, name)}.yaml"
    brought = _default(_read(file), inner)
    return _target_of("method", brought) if brought else ""


def _chosen(group: str, place: str, words: Sequence[str]) -> str:
    """Return the choice of a group that the words or the config make for a place."""
    keys = (group, f"{group}@{place}")
    for word in reversed(words):
        key, equals, value = word.partition("=")
        if equals and key in keys and (key != group or place == group):
            return value.rpartition(",")[2]
    if place != group:
        return ""
    return _default(_config(words), group)


def _target_of(group: str, name: str) -> str:
    """Return the class of a choice, or the class that ``name`` is itself."""
    if name.startswith("fusion_bench."):
        return name
    found = unambiguous(name, [_KINDS[group]]) if name else None
    return found.target if found else ""


def _config(words: Sequence[str]) -> Mapping[str, Any]:
    """Return the config that is run, as its file has it."""
    expanded = file_as_options(list(words))
    path, name = str(CONFIG_DIR), "fabric_model_fusion"
    for flag, value in pairwise(expanded):
        if flag in ("--config-path", "-cp"):
            path = value
        elif flag in ("--config-name", "-cn"):
            name = value
    found = _read(Path(path) / f"{name}.yaml") or _read(CONFIG_DIR / f"{name}.yaml")
    return found


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _default(config: Mapping[str, Any], key: str) -> str:
    """Return what a config has at a key: a choice of its defaults list, or a class."""
    node = config.get(key)
    if isinstance(node, Mapping) and "_target_" in node:
        return str(node["_target_"])
    found = ""
    for default in config.get("defaults") or ():
        if isinstance(default, str) and default != "_self_":
            found = _default(_read(CONFIG_DIR / f"{default}.yaml"), key) or found
        for name, choice in default.items() if isinstance(default, Mapping) else ():
            place = str(name).removeprefix("override ").lstrip("/")
            if place == key or place.partition("@")[2] == key:
                found = str(choice)
    return found
