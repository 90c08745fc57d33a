"""Turns overrides as people type them into Hydra's: other names of configs, models as a list."""

import re
from collections.abc import Collection, Iterator

import yaml

from fusion_bench.catalog import GROUPS, full_name
from fusion_bench.problems import ConfigError, within
from fusion_bench.recipes import named_after

_CHOICE = re.compile(rf"([+]*)({'|'.join(GROUPS.values())})(@[\w.]+)?=([\w+./ ,-]+)")
_MODELS = re.compile(r"modelpool\.models=([\[{].*)", re.DOTALL)
#: What Hydra takes as a key without quotes.
_PLAIN_KEY = re.compile(r"[\w.@/ -]+")
_BOOLEAN = "tag:yaml.org,2002:bool"


def choice(word: str, known: Collection[str]) -> str:
    """Return ``method=ties`` as ``method=ties_merging``, for each name of a sweep.

    Args:
        word: an override; one that chooses no config of these groups is returned as it is.
        known: the names of the user's own configs, which come first.
    """
    if not (match := _CHOICE.fullmatch(word)):
        return word
    sign, group, place, names = match.groups()
    return f"{sign}{group}{place or ''}=" + ",".join(
        name if name in known else full_name(group, name)
        for name in map(str.strip, names.split(","))
    )


class _Loader(yaml.SafeLoader):
    """Reads ``no``, ``yes``, ``on`` and ``off`` as texts, as Hydra does on the command line."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in own if tag != _BOOLEAN]
    for first, own in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("true|false", re.IGNORECASE), list("tTfF"))


def models(word: str) -> Iterator[str]:
    """Yield the overrides for ``modelpool.models=[path, …]`` or ``={name: path, …}``.

    The models replace those that the config has. Those of a list are named after their paths.

    Raises:
        ConfigError: a name that Hydra cannot take.
    """
    try:
        match = _MODELS.fullmatch(word)
        found = None if match is None else _Loader(match[1]).get_single_data()
    except yaml.YAMLError:
        found = None
    if isinstance(found, list) and found and all(isinstance(path, str) for path in found):
        with within("modelpool", "models"):
            found = named_after(found)
    if not isinstance(found, dict):
        yield word
        return
    yield "++modelpool.models=null"
    yield f"++modelpool.models={in_grammar(found)}"


def in_grammar(value: object) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, dict):
        for key in value:
            if not _PLAIN_KEY.fullmatch(str(key)):
                raise ConfigError(
                    f"'{key}' cannot be a name on the command line.",
                    "Use letters, digits, '.', '-' and '_'.",
                )
        return "{" + ",".join(f"{key}: {in_grammar(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(in_grammar, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))  # type: ignore[call-overload]
