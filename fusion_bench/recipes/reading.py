"""Reads mergekit's YAML, with all mistakes at once and their places."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fusion_bench.forms import unquoted
from fusion_bench.problems import Place, Problem, Problems, did_you_mean, key_of
from fusion_bench.recipes.document import (
    Condition,
    Module,
    Parameters,
    Recipe,
    Reference,
    Scalar,
    Setting,
    Slice,
    Source,
    Tokenizer,
    Tokens,
)
from fusion_bench.recipes.keys import IDLE_KEY, refused_key
from fusion_bench.recipes.methods import METHODS, PARAMETERS

T = TypeVar("T")

_BODIES = ("models", "slices", "modules")
_KEYS = (
    *("merge_method", *_BODIES, "base_model", "dtype", "out_dtype", "parameters"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)
#: The types that a recipe may name, and their short names.
DTYPES = ("float16", "bfloat16", "float32", "float64")
ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "half": "float16"}


def documents(nodes: Sequence[object], problems: Problems) -> list[Recipe]:
    """Return the documents of a recipe, as far as they can be read.

    Args:
        nodes: as YAML has them.
        problems: takes all mistakes, with their places.

    Raises:
        ConfigError: nothing could be read.
    """
    found = []
    for index, node in enumerate(nodes):
        reader = _Reader(problems, (index,) if len(nodes) > 1 else ())
        if (recipe := reader.recipe(node)) is not None:
            found.append(recipe)
    if not found:
        problems.raise_all()
    return found


class _Reader:
    """Reads one document; every mistake is added to ``problems`` with its place."""

    def __init__(self, problems: Problems, place: Place):
        self.problems = problems
        self.place = place
        self.notes: list[str] = []

    def recipe(self, node: object) -> Recipe | None:
        """Return the document, as far as it can be read."""
        place = self.place
        top = self._mapping(node, _KEYS, place)
        if top is None:
            return None
        method = top.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            reason = f"'{method}' is no method that mergekit has." if method else "missing."
            self._wrong((*place, "merge_method"), reason, did_you_mean(str(method or ""), METHODS))
        given = [key for key in _BODIES if top.get(key) is not None]
        if len(given) != 1:
            what = "none" if not given else " and ".join(given)
            self._wrong(place, f"the recipe has {what} of: {', '.join(_BODIES)}.", "Give one.")
        if top.get("tokenizer_source") is not None and top.get("tokenizer") is not None:
            reason = "there is also 'tokenizer_source'."
            self._wrong((*place, "tokenizer"), reason, "Give one of the two.")
        modules = self._modules(top, given[0]) if given else ()
        name = top.get("name")
        return Recipe(
            method=str(method),
            modules=tuple(modules),
            base=self._optional(top, "base_model", place, self._reference),
            parameters=self._parameters(top.get("parameters"), (*place, "parameters")),
            dtype=self._optional(top, "dtype", place, self._dtype),
            out_dtype=self._optional(top, "out_dtype", place, self._dtype),
            tokenizer=self._tokenizer(top),
            chat_template=self._optional(top, "chat_template", place, self._text),
            name=None if name is None else str(name),
            place=place,
            notes=tuple(self.notes),
        )

    def _modules(self, top: Mapping[str, Any], body: str) -> Iterator[Module]:
        place = self.place
        if body != "modules":
            yield Module(None, *self._body(top, place), {}, place)
            return
        inner = (*place, "modules")
        modules = self._mapping(top["modules"], None, inner) or {}
        if not modules:
            self._wrong(inner, "there is no module.", "Name one.")
        for name, node in modules.items():
            own = (*inner, str(name))
            keys = ("models", "slices", "parameters")
            if (module := self._mapping(node, keys, own)) is None:
                continue
            given = [key for key in _BODIES[:2] if module.get(key) is not None]
            if len(given) != 1:
                self._wrong(own, "a module has either 'models' or 'slices'.", "Give one.")
                continue
            parameters = self._parameters(module.get("parameters"), (*own, "parameters"))
            alone = None if len(modules) == 1 else str(name)
            yield Module(alone, *self._body(module, own), parameters, own)

    def _body(self, node: Mapping[str, Any], place: Place) -> tuple[tuple[Slice, ...], bool]:
        """Return the slices of a body, and whether it is one of whole models."""
        if node.get("models") is not None:
            own = (*place, "models")
            sources = [
                source
                for index, inner in enumerate(self._list(node["models"], own))
                if (source := self._source(inner, (*own, index), sliced=False)) is not None
            ]
            return (Slice(tuple(sources), None, {}, own),), True
        own = (*place, "slices")
        slices = [
            part
            for index, inner in enumerate(self._list(node.get("slices"), own))
            if (part := self._slice(inner, (*own, index))) is not None
        ]
        return tuple(slices), False

    def _slice(self, node: object, place: Place) -> Slice | None:
        keys = ("sources", "base_model", "parameters")
        if (own := self._mapping(node, keys, place)) is None:
            return None
        inner = (*place, "sources")
        sources = [
            source
            for index, each in enumerate(self._list(own.get("sources"), inner))
            if (source := self._source(each, (*inner, index), sliced=True)) is not None
        ]
        counts = {b - a for a, b in (s.layers for s in sources if s.layers is not None)}
        if len(counts) > 1:
            numbers = ", ".join(map(str, sorted(counts)))
            self._wrong(inner, f"the sources have {numbers} layers.", "Give each equally many.")
        base = self._optional(own, "base_model", place, self._reference)
        parameters = self._parameters(own.get("parameters"), (*place, "parameters"))
        return Slice(tuple(sources), base, parameters, place)

    def _source(self, node: object, place: Place, *, sliced: bool) -> Source | None:
        keys = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
        if isinstance(node, str) and node:
            self._wrong(place, f"'{node}' is no mapping.", f"Write '{{model: {node}}}'.")
            return None
        if (own := self._mapping(node, keys, place)) is None:
            return None
        layers = self._layers(own.get("layer_range"), (*place, "layer_range")) if sliced else None
        if own.get("model") is None:
            self._wrong((*place, "model"), "missing.", "Name a model.")
            return None
        model = self._optional(own, "model", place, self._reference)
        parameters = self._parameters(own.get("parameters"), (*place, "parameters"))
        return None if model is None else Source(model, layers, parameters, place)

    def _layers(self, node: object, place: Place) -> tuple[int, int] | None:
        if (
            not isinstance(node, list)
            or len(node) != 2
            or not all(type(end) is int for end in node)
            or not 0 <= node[0] < node[1]
        ):
            said = "missing." if node is None else f"{node} is no range of layers."
            self._wrong(place, said, "Give the first layer and the one after the last: [0, 8].")
            return None
        return node[0], node[1]

    def _reference(self, node: object, place: Place) -> Reference | None:
        if isinstance(node, str) and node:
            with self.problems.collect(*place):
                return Reference.parse(node)
            return None
        if isinstance(node, bool | int | float):
            self._wrong(place, *unquoted(node))
            return Reference(str(node))  # so that it is not told to be missing, too
        keys = ("model", "lora", "override_architecture", "path", "revision")
        if (own := self._mapping(node, keys, place)) is None:
            return None
        model: object = own if "path" in own else own.get("model")
        lora = own.get("lora")
        if own.get("override_architecture") is not None:
            self.notes.append(
                "override_architecture is not needed: layers are found by the names in the files."
            )
        found = self._path(model, (*place, "model"))
        adapter = None if lora is None else self._path(lora, (*place, "lora"))
        if found is None or (adapter is None and lora is not None):
            return None
        return Reference(*found, *(adapter or ()))

    def _path(self, node: object, place: Place) -> tuple[str, str | None] | None:
        """Return a path and its revision, given as text or as a mapping."""
        if isinstance(node, str) and node:
            name, at, behind = node.partition("@")
            return name, behind if at else None
        path = node.get("path") if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and isinstance(path, str) and path:
            revision = node.get("revision")
            return path, None if revision is None else str(revision)
        if isinstance(node, bool | int | float):
            self._wrong(place, *unquoted(node))
            return str(node), None
        self._wrong(place, f"'{node}' names no model.", "Give a path, or {path, revision}.")
        return None

    def _parameters(self, node: object, place: Place) -> Parameters:
        if node is None:
            return {}
        own = self._mapping(node, None, place)
        for name in own or ():
            if name not in PARAMETERS:
                reason = "no method of mergekit's takes it."
                self._wrong((*place, str(name)), reason, did_you_mean(str(name), PARAMETERS))
        found = {}
        for name, value in (own or {}).items():
            if name in PARAMETERS and value is not None:
                inner = (*place, name)
                # Of a setting that is told to be wrong it is not also told that it is missing.
                found[name] = self._setting(value, inner) or Setting((), inner)
        return found

    def _setting(self, node: object, place: Place) -> Setting | None:
        if isinstance(node, Mapping):
            return self._conditions([node], place, alone=True)
        if isinstance(node, list) and any(isinstance(own, Mapping) for own in node):
            return self._conditions(node, place)
        value = self._value(node, place)
        return None if value is None else Setting((Condition(value),), place)

    def _conditions(self, nodes: list[Any], place: Place, *, alone: bool = False) -> Setting | None:
        found = []
        for index, node in enumerate(nodes):
            inner = place if alone else (*place, index)
            if (own := self._mapping(node, ("filter", "value"), inner)) is None:
                return None
            if "value" not in own:
                self._wrong((*inner, "value"), "missing.", "Give the value.")
                return None
            value = self._value(own["value"], (*inner, "value"))
            if value is None:
                return None
            filtered = own.get("filter")
            anything = filtered is None or str(filtered) in ("*", "")
            found.append(Condition(value, None if anything else str(filtered)))
        return Setting(tuple(found), place)

    def _value(self, node: object, place: Place) -> Scalar | tuple[Scalar, ...] | None:
        if isinstance(node, list):
            if node and all(isinstance(own, Scalar) for own in node):
                return tuple(node)
            self._wrong(place, f"{node} is no list of values.", "Give numbers, such as [0, 1].")
            return None
        if isinstance(node, Scalar):
            return node
        self._wrong(place, f"'{node}' is no value.", "Give a number, a list of numbers or filters.")
        return None

    def _tokenizer(self, top: Mapping[str, Any]) -> Tokenizer | None:
        place = (*self.place, "tokenizer_source")
        if (source := top.get("tokenizer_source")) is not None:
            named = self._tokens_of(source, place)
            return None if named is None else Tokenizer(named, place=place)
        place = (*self.place, "tokenizer")
        if (node := top.get("tokenizer")) is None:
            return None
        own = self._mapping(node, ("source", "tokens", "pad_to_multiple_of"), place)
        if own is None:
            return None
        source = self._tokens_of(own.get("source") or "union", (*place, "source"))
        tokens = self._mapping(own.get("tokens") or {}, None, (*place, "tokens")) or {}
        for token in tokens:
            if isinstance(token, bool) or token is None:
                self._wrong((*place, "tokens", str(token)), *unquoted(token))
        found = {
            str(token): said
            for token, each in tokens.items()
            if (said := self._token(each, (*place, "tokens", str(token)))) is not None
        }
        multiple = own.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            self._wrong((*place, "pad_to_multiple_of"), f"'{multiple}' is no number of rows.")
            multiple = None
        return None if source is None else Tokenizer(source, found, multiple, place)

    def _tokens_of(self, node: object, place: Place) -> str | Reference | None:
        if node in ("base", "union"):
            return str(node)
        if isinstance(node, str) and node.startswith("model:"):
            node = node.removeprefix("model:")
        return self._reference(node, place)

    def _token(self, node: object, place: Place) -> Tokens | None:
        if (own := self._mapping(node, ("source", "force"), place)) is None:
            return None
        force, source = own.get("force") or False, own.get("source")
        if not isinstance(force, bool):
            self._wrong((*place, "force"), f"'{force}' is not true or false.")
            return None
        inner = (*place, "source")
        if source is None:
            return Tokens(force=force)
        if not isinstance(source, Mapping) or "kind" not in source:
            model = self._reference(source, inner)
            return None if model is None else Tokens(model, force=force)
        if source["kind"] == "zero":
            self._mapping(source, ("kind",), inner)
            return Tokens(zero=True, force=force)
        if source["kind"] != "model_token":
            hint = did_you_mean(str(source["kind"]), ("zero", "model_token"))
            self._wrong((*inner, "kind"), f"'{source['kind']}' is unknown.", hint)
            return None
        self._mapping(source, ("kind", "model", "token", "token_id"), inner)
        model = self._reference(source.get("model"), (*inner, "model"))
        named = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
        if len(named) != 1:
            self._wrong(inner, "it names no token.", "Give 'token' or 'token_id'.")
        elif isinstance(named[0], bool):
            self._wrong((*inner, "token"), *unquoted(named[0]))
        return Tokens(model, token=named[0], force=force) if model and len(named) == 1 else None

    def _dtype(self, node: object, place: Place) -> str | None:
        name = str(node).removeprefix("torch.")
        name = ALIASES.get(name, name)
        if name not in DTYPES:
            self._wrong(place, f"'{node}' is no type of weights.", did_you_mean(name, DTYPES))
            return None
        return name

    def _text(self, node: object, place: Place) -> str | None:
        if isinstance(node, str):
            return node
        self._wrong(place, f"'{node}' is no text.")
        return None

    def _optional(
        self,
        own: Mapping[str, Any],
        key: str,
        place: Place,
        read: Callable[[object, Place], T | None],
    ) -> T | None:
        return None if own.get(key) is None else read(own[key], (*place, key))

    def _list(self, node: object, place: Place) -> list[Any]:
        if isinstance(node, list) and node:
            return node
        self._wrong(place, "missing." if not node else "it is no list.", "Give a list.")
        return []

    def _mapping(
        self, node: object, known: Collection[str] | None, place: Place
    ) -> Mapping[str, Any] | None:
        """Return a mapping; None for anything else.

        Of its keys that are not known, those are refused that may be meant to say something.
        """
        if not isinstance(node, Mapping):
            remedy = f"Known: {', '.join(known)}." if known else ""
            self._wrong(place, f"'{node}' is no mapping.", remedy)
            return None
        for key in node:
            if known is None or key in known:
                continue
            own = (*place, str(key))
            if (refused := refused_key(str(key), known)) is not None:
                self._wrong(own, *refused)
            else:
                self.notes.append(f"{key_of(own)}: {IDLE_KEY}")
        return node

    def _wrong(self, place: Place, reason: str, remedy: str = "") -> None:
        self.problems.add([Problem(place, reason, remedy)])
