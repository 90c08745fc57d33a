"""Creates objects from config nodes."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any, Literal, Protocol, TypeVar, get_type_hints, runtime_checkable

from omegaconf import OmegaConf

from fusion_bench.forms import rule_problem, says_of_tokens, several, unquoted
from fusion_bench.pretrained import checked_node
from fusion_bench.problems import ConfigError, Place, Problem, Problems, did_you_mean, within
from fusion_bench.resolving import to_container
from fusion_bench.trust import argument_problems, find, is_users

T = TypeVar("T")

#: What pydantic misses, in plain words.
_WANTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a text",
    "sequence_str": "a list",
    "list_type": "a list",
    "is_instance_of": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "none_required": "null",
}
#: Where the classes for a section of the program's config are.
_SECTIONS = {
    "method": "fusion_bench.method.",
    "modelpool": "fusion_bench.modelpool.",
    "taskpool": "fusion_bench.taskpool.",
    "search": "fusion_bench.programs.",
    "fabric": "lightning.",
}
#: Keys that we take beside a library's own: the task pools give ``load_from_disk`` a split.
_BESIDE = {"datasets.load_from_disk": {"split"}}
#: What each of these is made of, where a YAML forgets to say so.
_EXAMPLES = {
    "method": "fusion_bench.method.SimpleAverageAlgorithm",
    "modelpool": "fusion_bench.modelpool.CLIPVisionModelPool",
    "taskpool": "fusion_bench.taskpool.CLIPVisionModelTaskPool",
    "search": "fusion_bench.programs.GridSearch",
    "models": "transformers.CLIPVisionModel.from_pretrained",
    "datasets": "datasets.load_dataset",
    "processor": "transformers.CLIPProcessor.from_pretrained",
    "tokenizer": "transformers.CLIPTokenizer.from_pretrained",
    "clip_model": "transformers.CLIPModel.from_pretrained",
    "data_processor": "transformers.CLIPImageProcessor.from_pretrained",
}
#: Keys of pools under which there are nodes by name, and nodes; whether a text may stand for one.
_NODES_BY_NAME = {
    "models": True,
    "classifiers": True,
    "train_datasets": False,
    "val_datasets": False,
    "test_datasets": False,
}
_NODES = ("processor", "tokenizer", "clip_model", "data_processor")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HYDRA_KEYS = {"_target_", "_recursive_", "_convert_", "_partial_", "_args_"}


@runtime_checkable
class TellsAllProblems(Protocol):
    """A target that takes the problems of its arguments, and raises them with its own."""

    tells_all_problems: Literal[True]


def instantiate(node: Any, section: str = "", **arguments: Any) -> Any:
    """Call what ``node`` names in ``_target_`` with the node's other keys and ``arguments``.

    Values without ``_target_`` are returned unchanged, so sections may also be objects. Nested
    nodes are called first, unless the node has ``_recursive_: false``.

    Args:
        node: of the config.
        section: the required kind of object: ``method``, ``modelpool`` …
        arguments: additional to those of the node.

    Raises:
        ConfigError: a target that may not be called or cannot be found, or keys that its signature
            does not take; all such problems of the node and of the nodes inside it are raised
            together.
    """
    plain = _plain(node)
    if not isinstance(plain, Mapping) or "_target_" not in plain:
        return plain
    if gathered := _gathered(plain, section, arguments):
        plain, arguments = gathered
    else:
        check(plain, section, **arguments)
    recursive = arguments.pop("_recursive_", plain.get("_recursive_", True))
    return _called(_guarded({**plain, "_recursive_": recursive}), arguments)


def _called(node: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Call a node's target; problems get the node's place."""
    inside = {name: value for name, value in node.items() if name not in _HYDRA_KEYS}
    positional = node.get("_args_") or ()
    if node.get("_recursive_", True):
        inside = _made(inside)
        with within("_args_"):
            positional = _made(list(positional))
    target = node["_target_"]
    function = target if callable(target) else find(target)
    wanted = partial(function, *positional, **{**inside, **arguments})
    return wanted if node.get("_partial_") else wanted()


def _made(value: Any) -> Any:
    """Return a value with the nodes in it called."""
    if isinstance(value, list):
        return [_made_at(index, item) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "_target_" in value:
        return _called(value, {})
    return {name: _made_at(name, item) for name, item in value.items()}


def _made_at(place: str | int, value: Any) -> Any:
    with within(place):
        return _made(value)


def _guarded(node: Any) -> Any:
    """Return a node whose ``from_pretrained`` calls run no code, at any depth."""
    if isinstance(node, list):
        return [_guarded_at(index, item) for index, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if node.get("_recursive_", True):
        node = {key: _guarded_at(key, value) for key, value in node.items()}
    named = str(node.get("_target_"))
    return checked_node(node) if named.startswith("transformers.") else node


def _guarded_at(place: str | int, value: Any) -> Any:
    with within(place):
        return _guarded(value)


def _plain(node: Any) -> Any:
    """Return a node with all nested configs as plain data; objects stay the same.

    Configs are resolved here, and nowhere else: a ``${`` that is left is text.
    """
    if OmegaConf.is_config(node):
        return to_container(node)
    if isinstance(node, Mapping):
        return {name: _plain(value) for name, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node


class SharedObjects:
    """Objects that several runs of one process share.

    The jobs of a sweep usually need the same models and datasets.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def get(self, about: Any, make: Callable[[], T]) -> T:
        """Return the object for ``about`` (JSON data), or create it."""
        name = json.dumps(about, sort_keys=True, default=str)
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def __deepcopy__(self, memo: Any) -> "SharedObjects":
        return self  # Hydra copies what it calls a function with

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}  # another process begins anew


def accepts(target: Any, name: str) -> bool:
    """Return whether a ``_target_`` takes an argument of that name."""
    return name in parameters(target)


def parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a ``_target_``; none if it cannot be called."""
    try:
        return inspect.signature(find(target) if isinstance(target, str) else target).parameters
    except (ConfigError, TypeError, ValueError):  # some builtins do not tell their signature
        return {}


def check(node: Any, section: str = "", **arguments: Any) -> None:
    """Check the keys of every ``_target_`` in a resolved ``node``.

    Raises:
        ConfigError: with a problem for each that cannot work, or may not be called.
    """
    Problems(_problems(node, section, (), arguments)).raise_all()


def check_part(node: Any, section: str) -> None:
    """Refuse a value that is not a config node: text, number, list, or no ``_target_``.

    Raises:
        ConfigError: it is one of these.
    """
    Problems(_part_problems(node, _EXAMPLES[section], texts=False)).raise_all()


def _part_problems(node: Any, example: str, *, texts: bool) -> Iterator[Problem]:
    if isinstance(node, Mapping):
        wrong = "_target_" not in node
    else:
        wrong = isinstance(node, bool | int | float | list) or (isinstance(node, str) and not texts)
    if not wrong:
        return
    if texts and isinstance(node, bool):
        yield Problem((), *unquoted(node))
        return
    what = "has no _target_" if isinstance(node, Mapping) else f"'{node}' is not a config node"
    yield Problem((), f"{what}.", f"Add one, such as '_target_: {example}'.")


def _gathered(
    node: Mapping[Any, Any], section: str, arguments: Mapping[str, Any]
) -> tuple[Mapping[Any, Any], dict[str, Any]] | None:
    """Return node and arguments for a target that collects all problems, also of its parts.

    It is called without the invalid keys, and gets their problems. ``None`` for other targets, or
    if a required key is missing.
    """
    target = node["_target_"]
    try:
        function = target if callable(target) else find(target)
    except ConfigError:
        return None
    if not isinstance(function, TellsAllProblems):
        return None
    wrong: dict[Any, Problem] = {}
    for problem in _signature_problems(node, section, arguments):
        wrong.setdefault(problem.place[0], problem)
    if wrong.keys() - node.keys():
        return None
    sound = {name: value for name, value in node.items() if name not in wrong}
    sound["_recursive_"] = False  # it makes its parts itself, and looks at them before
    return sound, {**arguments, "problems": list(wrong.values())}


def _problems(
    node: Any, section: str, place: Place, arguments: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield a problem for each invalid target or key in ``node``, at any depth."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            here = section if not place else str(place[-1])
            found = [*_signature_problems(node, section, arguments)]
            if here in ("modelpool", "taskpool") and not is_users(str(node["_target_"])):
                found += _pool_problems(node)
            yield from (problem.inside(*place) for problem in found)
        for name, child in node.items():
            yield from _problems(child, "", (*place, str(name)), {})
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _problems(child, "", (*place, index), {})
    elif isinstance(node, float) and not isfinite(node):
        said = "infinity" if node > 0 else "-infinity" if node < 0 else "NaN"
        yield Problem(place, f"{said} is not allowed.", "Give another.")
    elif isinstance(node, str) and _SURROGATE.search(node):
        reason = f"'{node}' is not valid UTF-8, so a report cannot contain it."
        yield Problem(place, reason, "Rename it.")


def _pool_problems(node: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each value in a pool that should be a node."""
    for name in _NODES:
        part = node.get(name)
        if name == "tokenizer" and isinstance(part, Mapping) and says_of_tokens(part):
            continue  # the pool tells what it says of tokens
        for problem in _part_problems(part, _EXAMPLES[name], texts=True):
            yield problem.inside(name)
    for group, texts in _NODES_BY_NAME.items():
        nodes = node.get(group)
        example = _EXAMPLES["datasets" if group.endswith("_datasets") else "models"]
        for name, child in nodes.items() if isinstance(nodes, Mapping) else ():
            if group == "models" and isinstance(child, Mapping):
                continue  # the pool tells what else a model may be: an adapter with its base
            if child is None:
                remedy = f"Give a node or remove the key: '~{{here}}{name}'."
                yield Problem((group, name), "null is not allowed.", remedy)
            for problem in _part_problems(child, example, texts=texts):
                yield problem.inside(group, name)


def _signature_problems(
    node: Mapping[str, Any], section: str, arguments: Mapping[str, Any]
) -> Iterator[Problem]:
    target = node["_target_"]
    try:
        function = target if callable(target) else find(target)
    except ConfigError as error:
        yield from (problem.inside("_target_") for problem in error.problems)
        return
    wanted = _SECTIONS.get(section, "")
    if isinstance(target, str) and not is_users(target) and not target.startswith(wanted):
        yield Problem(("_target_",), f"'{target}' is not a {section}.")
        return
    told = [*argument_problems(target, node)] if isinstance(target, str) else []
    yield from (Problem((name,), mistake) for name, mistake in told)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some builtins do not tell their signature
        return
    given = {name for name in node if name not in _HYDRA_KEYS} | set(arguments)
    given -= _BESIDE.get(str(target), set())
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in sorted(given - set(parameters) - {name for name, _ in told}):
            reason = f"{_short(target)} takes no such key."
            yield Problem((name,), reason, did_you_mean(name, parameters))
    plain = {name: value for name, value in node.items() if name in parameters}
    if "where" in parameters:
        wrong = {name: rule_problem(name, value) for name, value in plain.items()}
        yield from filter(None, wrong.values())
        plain = {name: value for name, value in plain.items() if wrong[name] is None}
    for problem in type_problems(function, plain):
        name = str(problem.place[0])
        is_list = section == "method" and isinstance(plain[name], list)
        yield replace(problem, remedy=several(name)) if is_list else problem
    if node.get("_partial_") or node.get("_args_"):
        return
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in given:
            yield Problem((name,), f"missing; {_short(target)} needs it.")


def type_problems(function: Any, given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each value whose type does not match the signature.

    Only plain values are looked at: a node becomes an object later.
    """
    if not str(getattr(function, "__module__", "")).startswith("fusion_bench."):
        return
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # a type that is imported for type checkers alone
        return
    for name, value in given.items():
        if name not in hints or _has_target(value):
            continue
        try:
            # A number may stand for its like, but a text for no number, and for no list of texts.
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except PydanticSchemaGenerationError:  # a class of somebody else's
            continue
        except ValidationError as error:
            if keys := _no_texts(value):
                yield from (Problem((name, str(key)), *unquoted(key)) for key in keys)
                continue
            kinds = [problem["type"] for problem in error.errors()]
            if "literal_error" not in kinds:  # the constructor tells the choices, and the nearest
                types = dict.fromkeys(_WANTED.get(kind, kind) for kind in kinds)
                said = "null" if value is None else f"'{value}'"
                yield Problem((name,), f"{said} is not {' or '.join(types)}.")


def _no_texts(value: Any) -> list[Any]:
    """Return the keys of a mapping that are no texts."""
    return [key for key in value if not isinstance(key, str)] if isinstance(value, Mapping) else []


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _short(target: Any) -> str:
    return str(target).rpartition(".")[2]
