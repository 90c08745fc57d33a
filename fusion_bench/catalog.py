"""What there is to choose from, known without importing any of it: methods, models, tasks, configs.

``config/catalog.json`` and ``config/schema/`` are written by ``tools/write_catalog.py``.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from fusion_bench.configs import CONFIG_DIR, without_schema_line
from fusion_bench.problems import FusionBenchError
from fusion_bench.trust import config_folders

Kind = Literal["methods", "models", "tasks", "datasets", "configs"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: The config group of each kind; a config of its own has none.
GROUPS: Mapping[Kind, str] = {"methods": "method", "models": "modelpool", "tasks": "taskpool"}

#: The main program, whose keys a config has that names no program itself.
PROGRAM = "fusion_bench.programs.FabricModelFusionProgram"

#: Keys of a method that hold for all entries, so that no rule of its ``where`` gives them.
OF_ALL_ENTRIES = ("_target_", "where", "show_pbar", "inplace", "base_method")

#: Names in papers and in other programs.
_ALIASES: Mapping[str, str] = {
    "average": "simple_average",
    "avg": "simple_average",
    "simple_average_for_causallm": "simple_average",
    "linear/simple_average_for_causallm": "simple_average",
    "mean": "simple_average",
    "uniform_soup": "model_soup/uniform",
    "greedy_soup": "model_soup/greedy",
    "learned_soup": "model_soup/learned",
    "linear": "linear/weighted_average",
    "weighted": "linear/weighted_average",
    "lerp": "linear/linear_interpolation",
    "wise_ft": "linear/linear_interpolation",
    "ta": "task_arithmetic",
    "ties": "ties_merging",
    "dare": "dare/task_arithmetic",
    "dare_linear": "dare/task_arithmetic",
    "dare_task_arithmetic": "dare/task_arithmetic",
    "dare_average": "dare/simple_average",
    "dare_ties": "dare/ties_merging",
    "della_ties": "della/della",
    "multislerp": "slerp/multi_slerp",
    "tsv": "task_singular_vector/TaskSingularVectorMerging",
    "tsvm": "task_singular_vector/TaskSingularVectorMerging",
    "tsv_m": "task_singular_vector/TaskSingularVectorMerging",
    "consensus_ta": "tall_mask/consensus",
    "fisher": "fisher_merging/clip_fisher_merging",
    "regmean++": "regmean_plusplus/clip_regmean_plusplus",
    "emr": "emr_merging/emr_merging",
    "pcb": "pcb_merging/pcb_merging",
    "isoc": "isotropic_merging/iso_c",
    "isocts": "isotropic_merging/iso_cts",
    "ensemble": "ensemble/simple_ensemble",
}

_TARGET = re.compile(r"^_target_: *(\S+)", re.MULTILINE)
#: The first line that describes a YAML.
_COMMENT = re.compile(r"^# (?!yaml-language-server|@package)(.*?)\.?$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One thing to choose.

    Attributes:
        kind: of what.
        name: as a config and the command line have it.
        summary: what it is or does, in a line.
        target: the class that it calls; empty where that says nothing.
        needs: what a method needs beside the models, or where the others come from.
        cost: how long a method takes beside an average: ``low`` (up to 5 times), ``medium`` (up to
            50), ``high``, or ``learns`` where it goes through data.
        paper: of a method, with its address.
        page: of the documentation, below ``docs/``.
        file: below ``config/``, where it is a file of its own.
    """

    kind: Kind
    name: str
    summary: str
    target: str = ""
    needs: str = ""
    cost: str = ""
    paper: str = ""
    page: str = ""
    file: str = ""


@dataclass(frozen=True)
class Option:
    """An argument of a class that a config may call.

    Attributes:
        name: the key.
        type: in words: ``number``, ``text or null``, ``one of mean, sum``.
        default: as YAML has it; ``None`` also where the option is required.
        required: whether it must be given.
        meaning: what it does.
        choices: all its values, where they are few.
    """

    name: str
    type: str
    default: Any
    required: bool
    meaning: str
    choices: tuple[Any, ...] = ()


@cache
def entries() -> tuple[Entry, ...]:
    """Return all that there is, kind by kind in the order of the documentation."""
    read = json.loads((CONFIG_DIR / "catalog.json").read_text(encoding="utf-8"))
    found = [Entry(kind, **entry) for kind in KINDS for entry in read[kind]]
    return (*found, *_own_methods({entry.name for entry in found if entry.kind == "methods"}))


def _own_methods(known: Collection[str]) -> Iterator[Entry]:
    """Yield the methods that the user's own code brings, of which ours have no name."""
    for folder in config_folders():
        group = folder / "method"
        for file in sorted(group.rglob("*.yaml")):
            name = file.relative_to(group).with_suffix("").as_posix()
            text = file.read_text(encoding="utf-8", errors="replace")
            if name not in known and (
                target := re.search(r"^_target_: *(\S+)", text, re.MULTILINE)
            ):
                summary = re.search(
                    r"^# (?!yaml-language-server|@package)(.*?)\.?$", text, re.MULTILINE
                )
                said = summary[1] if summary else "a method of your own"
                yield Entry("methods", name, said, target[1], file=str(file))


def of_kind(kind: Kind) -> Iterator[Entry]:
    """Yield the entries of one kind."""
    return (entry for entry in entries() if entry.kind == kind)


@cache
def definitions() -> Mapping[str, Any]:
    """Return the JSON schema of each class that a config may call, by its ``_target_``."""
    text = (CONFIG_DIR / "schema" / "config.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)["definitions"]
    return found


def options(target: str) -> list[Option]:
    """Return the options of a ``_target_``; none of a class that is not ours."""
    schema = definitions().get(target, {"properties": {}})
    required = schema.get("needs", ())
    return [
        Option(
            name,
            in_words(own),
            own.get("default"),
            name in required,
            own.get("description", "").replace("``", ""),
            tuple(choices_of(own)),
        )
        for name, own in schema["properties"].items()
        if name != "_target_"
    ]


def choices_of(schema: Mapping[str, Any]) -> list[Any]:
    """Return the values that a schema lists, ``true`` and ``false`` among them."""
    if schema.get("type") == "boolean":
        return [True, False]
    inner = [choice for own in schema.get("anyOf", ()) for choice in choices_of(own)]
    return [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ()), *inner]


_WORDS = {
    "boolean": "true or false",
    "number": "number",
    "integer": "whole number",
    "string": "text",
    "null": "null",
    "object": "mapping",
}


def in_words(schema: Mapping[str, Any]) -> str:
    """Return what a value of a schema is: ``number``, ``list of texts``, ``mean, sum or max``."""
    return " or ".join(dict.fromkeys(_kinds(schema))) or "any"


def _kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    if name := str(schema.get("$ref", "")).rpartition("/")[2]:
        if name != "interpolation":
            yield definitions()[name].get("words", "mapping")
    elif "anyOf" in schema:
        for own in schema["anyOf"]:
            yield from _kinds(own)
    elif "enum" in schema or "const" in schema:
        *most, last = map(str, schema.get("enum", [schema.get("const")]))
        yield f"{', '.join(most)} or {last}" if most else last
    elif schema.get("type") == "array":
        inner = in_words(schema.get("items", {}))
        yield "list" if inner == "any" else f"list of {inner}s"
    elif "type" in schema:
        yield _WORDS.get(schema["type"], schema["type"])


def find(name: str, kinds: Sequence[Kind] = KINDS) -> Entry:
    """Return the entry that a person means by ``name``.

    Besides full names it knows the last part of one, where no other ends alike, and the names that
    papers and other programs use; capitals and dashes do not matter.

    Raises:
        FusionBenchError: no entry, with the nearest; or several.
    """
    if found := unambiguous(name, kinds):
        return found
    what = kinds[0].removesuffix("s") if len(kinds) == 1 else "config or model"
    remedy, *lines = suggestion(name, kinds)
    raise FusionBenchError(f"There is no {what} '{name}'.", remedy, details=lines)


def suggestion(name: str, kinds: Sequence[Kind]) -> list[str]:
    """Return a sentence, and a line for each of the entries nearest to ``name``."""
    nearest = near(name, kinds, choices=len(kinds) == 1)
    width = max(len(entry.name) for entry in nearest)
    listing = f"fusion_bench ls {kinds[0]}" if len(kinds) == 1 else "fusion_bench ls"
    return [
        f"The nearest of those that '{listing}' lists:",
        *(f"{entry.name:{width}}  {entry.summary}" for entry in nearest),
    ]


def unambiguous(name: str, kinds: Sequence[Kind]) -> Entry | None:
    """Return the one entry that ``name`` can mean, if there is one."""
    plain = _plain(name)
    alias = _ALIASES.get(plain, "") if "methods" in kinds else ""
    tests = (
        lambda entry: entry.name == name,
        lambda entry: entry.kind == "methods" and entry.name == alias,
        lambda entry: _plain(entry.name) == plain,
        lambda entry: _plain(entry.name).rpartition("/")[2] == plain,
        lambda entry: _plain(entry.name).partition("/")[0] == plain,
    )
    known = [entry for entry in entries() if entry.kind in kinds]
    for test in tests:
        found = [entry for entry in known if test(entry)]
        if len(found) == 1:
            return found[0]
    return None


def full_name(group: str, name: str) -> str:
    """Return the config of a group that a person means by ``name``; else ``name`` itself."""
    kinds = [kind for kind, own in GROUPS.items() if own == group]
    found = unambiguous(name, kinds) if kinds else None
    return found.name if found and found.target else name


def near(name: str, kinds: Sequence[Kind], count: int = 3, *, choices: bool = False) -> list[Entry]:
    """Return the entries that a person may have meant, the likeliest first.

    With ``choices``, a single model is none: it cannot be chosen in the place of a pool.
    """
    known = [
        entry
        for entry in entries()
        if entry.kind in kinds and (entry.target or not (choices and entry.kind == "models"))
    ]
    return sorted(known, key=lambda entry: -_likeness(_plain(name), entry))[:count]


def _likeness(name: str, entry: Entry) -> float:
    """Return how likely ``name`` stands for an entry: by its beginning, letters, and meaning."""
    own = _plain(entry.name)
    aliases = [alias for alias, config in _ALIASES.items() if config == entry.name]
    names = [own, *own.split("/"), *(aliases if entry.kind == "methods" else ())]
    begun = max(each.startswith(name) or name.startswith(each) for each in names)
    letters = max(SequenceMatcher(None, name, each).ratio() for each in names)
    words = set(re.findall(r"\w{3,}", f"{entry.summary} {entry.paper}".lower()))
    asked = set(re.findall(r"[^\W_]{3,}", name))
    known = [word for word in asked if any(other.startswith(word) for other in words)]
    meaning = len(known) / max(len(asked), 1)
    return 1.0 * begun + (name in own) + letters + 0.8 * meaning


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def text_of(entry: Entry) -> str:
    """Return an entry's YAML without its line for editors; empty for a part of a larger file.

    Raises:
        OSError: the file is not there.
    """
    if not entry.file:
        return ""
    return without_schema_line(Path(CONFIG_DIR / entry.file).read_text(encoding="utf-8"))
