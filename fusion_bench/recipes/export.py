"""From the config of a run back to a recipe of mergekit, where there is one that means the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_bench.catalog import options
from fusion_bench.forms import plain_yaml
from fusion_bench.problems import Problem, Problems
from fusion_bench.recipes.export_moe import TARGET, mixture_of
from fusion_bench.recipes.methods import METHODS, Method, Parameter
from fusion_bench.recipes.values import (
    contained,
    is_special,
    module_of,
    numbers_in,
    of_model,
    same,
    theirs,
)

_METHODS = "fusion_bench.method."
_MERGED = "fusion_bench.modelpool.MergedModel"
_BASE = "_pretrained_"
#: Options that change no weight, or that both have for themselves.
_OWN = ("_target_", "_recursive_", "show_pbar", "inplace", "where", "seed")
_COMPUTED = "float32"


@dataclass(frozen=True)
class Exported:
    """A recipe of mergekit.

    Attributes:
        text: the YAML.
        notes: where mergekit's result may differ.
    """

    text: str
    notes: tuple[str, ...]


def export(config: Mapping[str, Any]) -> Exported:
    """Return a recipe that means the same as the ``method`` and ``modelpool`` of a config.

    Args:
        config: a resolved config.

    Raises:
        FusionBenchError: with every setting that no recipe can have, at its place.
    """
    problems = Problems()
    if not isinstance(config.get("method"), Mapping):
        problems.add([Problem(("method",), "there is none, so that nothing is merged.")])
    if not isinstance(config.get("modelpool"), Mapping):
        problems.add([Problem(("modelpool",), "there is none.")])
    problems.raise_all()
    made = _Export(config["method"], config["modelpool"], problems)
    document = made.document()
    problems.raise_all()
    documents = [*made.stages, document]
    return Exported(
        plain_yaml(*documents, width=100),
        tuple(dict.fromkeys(made.notes)),
    )


@dataclass
class _Export:
    """The export of one merge."""

    method: Mapping[str, Any]
    pool: Mapping[str, Any]
    problems: Problems
    place: tuple[str | int, ...] = ()
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the document; problems are collected."""
        models = self.pool.get("models")
        self._models = dict(models) if isinstance(models, Mapping) else {}
        self._paths = {name: self._path(str(name), node) for name, node in self._models.items()}
        if self.method.get("_target_") == TARGET:
            if self.place or self.stages:
                self._wrong(("method",), "mergekit makes mixtures alone, and not in stages.")
            merged = [name for name in self._models if not is_special(name)]
            return mixture_of(self.method, self.pool, self._paths, merged, self.problems)
        if self.method.get("_target_") == _METHODS + "StackedLayers":
            document = self._sliced()
        else:
            document = self._whole()
        dtype = (self.pool.get("policy") or {}).get("dtype")
        if dtype is not None:
            document["dtype"] = _COMPUTED
            document |= {"out_dtype": dtype} if dtype != _COMPUTED else {}
        else:
            self.notes.append(
                "there is no policy.dtype: mergekit computes in the base's type, and rounds more."
            )
        document |= self._tokens()
        if (template := self.pool.get("chat_template")) is not None:
            document["chat_template"] = template
        policy = self.pool.get("policy") or {}
        for key in ("on_missing", "on_extra", "on_vocabulary"):
            if policy.get(key, "error") != "error":
                self._wrong(("modelpool", "policy", key), "mergekit has no such choice.")
        return document

    def _path(self, name: str, node: Any) -> str:
        """Return a model as a recipe names it."""
        place = ("modelpool", "models", name)
        if isinstance(node, str):
            return node
        if isinstance(node, Mapping) and node.get("_target_") == _MERGED:
            inner = _Export(node["method"], node["modelpool"], self.problems)
            inner.place, inner.stages, inner.notes = (*self.place, *place), self.stages, self.notes
            return self._stage(name.strip("_") or "stage", inner.document())
        if isinstance(node, Mapping) and "path" in node and "_target_" not in node:
            base = node.get("base")
            if isinstance(base, str):
                whole = self._models.get(base, base)
                return f"{self._path(base, whole)}+{node['path']}"
        self._wrong(place, "a recipe names models by their paths, with an adapter or without.")
        return name

    def _stage(self, name: str, document: dict[str, Any]) -> str:
        """Return the name of a stage, which is added unless it is there."""
        for own in self.stages:
            if {key: value for key, value in own.items() if key != "name"} == document:
                return str(own["name"])
        while any(own["name"] == name for own in self.stages):
            name += "-2"
        self.stages.append({"name": name, **document})
        return name

    def _whole(self) -> dict[str, Any]:
        """Return the body of a merge of whole models."""
        names = [name for name in self._models if not is_special(name)]
        found = self._named(self.method, ("method",))
        if found is None:
            return {}
        name, method = found
        self._refuse_number(name, method, len(names), ("modelpool", "models"))
        own, common = self._parameters(name, method, self.method, names, ("method",))
        models = [
            {"model": self._paths[each], **({"parameters": p} if (p := own[each]) else {})}
            for each in names
        ]
        document: dict[str, Any] = {"merge_method": name}
        if (base := self._base(name, method, models)) is not None:
            document["base_model"] = base
        document["models"] = models
        return document | ({"parameters": common} if common else {})

    def _refuse_number(
        self, name: str, method: Method, count: int, place: tuple[str | int, ...]
    ) -> None:
        """Refuse another number of models than the method takes."""
        if (reason := method.wrong_number(f"mergekit's {name}", count)) is not None:
            self._wrong(place, reason)

    def _base(self, name: str, method: Method, models: list[dict[str, Any]]) -> str | None:
        """Return the base; where it would be one of the models, it is left out of the sum."""
        base = self._paths.get(_BASE)
        listed = any(each["model"] == base for each in models)
        if base is None or method.base not in ("model", "donor") or listed:
            if base is None and method.base == "end":
                place = ("modelpool", "models", _BASE)
                self._wrong(place, f"missing; mergekit's {name} begins there.")
            return base
        if name == "linear":
            models.append({"model": base, "parameters": {"weight": 0.0}})
            return base
        self.notes.append("mergekit takes config and tokenizer from the first model here.")
        return None

    def _sliced(self) -> dict[str, Any]:
        """Return the body of a merge of slices."""
        slices, used = list[dict[str, Any]](), set()
        modules: dict[str, dict[str, Any]] = {}
        common = self.method.get("base_method") or {"_target_": _METHODS + "PassthroughAlgorithm"}
        for index, part in enumerate(self.method.get("slices") or ()):
            place = ("method", "slices", index)
            given = part.get("base_method")
            node = given or common
            where = (*place, "base_method") if given else ("method", "base_method")
            module = None
            if part.get("stack") is not None and (module := module_of(part["stack"])) is None:
                reason = f"'{part['stack']}' is none of a recipe's modules."
                self._wrong((*place, "stack"), reason, "Give one beginning of names: encoder.")
            if (found := self._named(node, where)) is None:
                continue
            name, method = found
            used.add(name)
            models, base = part["models"], part.get("base")
            if base is None and method.base in ("origin", "end"):
                base = _BASE
            merged = [each for each in models if each != base or method.base in ("model", "donor")]
            self._refuse_number(name, method, len(merged), (*place, "models"))
            own, levels = self._parameters(name, method, node, merged, where)
            sources = []
            for each, layers in models.items():
                if layers is None and module is None:
                    reason = "a recipe wants the numbers of the layers."
                    self._wrong((*place, "models", each), reason, "Give [first, end].")
                parameters = own.get(each)
                extra = {"parameters": parameters} if parameters else {}
                ranges = {} if layers is None else {"layer_range": layers}
                sources.append({"model": self._paths.get(each, each), **ranges, **extra})
            parameters = {"parameters": levels} if levels else {}
            if module is not None and all(layers is None for layers in models.values()):
                modules[module] = {"models": sources, **parameters}
                continue
            made: dict[str, Any] = {"sources": sources}
            made |= {} if base is None else {"base_model": self._paths.get(base, base)}
            inner = modules.setdefault(module, {"slices": []}) if module else {"slices": slices}
            inner.setdefault("slices", []).append({**made, **parameters})
        if len(used) > 1:
            reason = f"a recipe has one method, and here are {', '.join(sorted(used))}."
            self._wrong(("method", "slices"), reason, "Merge the slices in stages.")
        document: dict[str, Any] = {"merge_method": next(iter(used), "passthrough")}
        if _BASE in self._paths:
            document["base_model"] = self._paths[_BASE]
        if modules and slices:
            self._wrong(
                ("method", "slices"), "some have a stack, and others none.", "Give all one."
            )
        return {**document, **({"modules": modules} if modules else {"slices": slices})}

    def _named(self, node: Mapping[str, Any], place: tuple[str | int, ...]) -> Any:
        """Return mergekit's name of a method, and the method."""
        if str(node.get("_target_")) == _METHODS + "SimpleAverageAlgorithm":
            return "linear", METHODS["linear"]
        target = str(node.get("_target_", "")).removeprefix(_METHODS)
        known = {name: own for name, own in METHODS.items() if own.target == target}
        if not known:
            self._wrong(place, f"mergekit has no {target}.", f"It has: {', '.join(METHODS)}.")
            return None
        values = self._values(node)
        fits = _fits(values)
        differing = {
            name: [
                key
                for key, own in method.fixed.items()
                if not same(values.get(key), own) and not (key == "gives_way" and fits)
            ]
            for name, method in known.items()
        }
        name = min(differing, key=lambda each: len(differing[each]))
        for key in differing[name]:
            fixed = known[name].fixed[key]
            reason = f"'{values.get(key)}' is not as in mergekit's {name}."
            self._wrong((*place, key), reason, f"Its variant is {{here}}{key}={fixed}.")
        allowed = {own.option for own in known[name].parameters.values()} | set(known[name].fixed)
        defaults = self._defaults(node)
        for key, value in values.items():
            if key not in allowed and key not in _OWN and not same(value, defaults.get(key)):
                self._wrong((*place, key), f"mergekit's {name} has no such setting.")
        if "seed" in defaults:
            self.notes.append(f"{name} draws other elements there, whatever the seed.")
        return name, known[name]

    def _defaults(self, node: Mapping[str, Any]) -> dict[str, Any]:
        return {own.name: own.default for own in options(str(node.get("_target_")))}

    def _values(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of a node, defaults too."""
        return {**self._defaults(node), **node}

    def _parameters(
        self,
        name: str,
        method: Method,
        node: Mapping[str, Any],
        models: Sequence[str],
        place: tuple[str | int, ...],
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the parameters of each model, and those of all."""
        values, common = self._values(node), dict[str, Any]()
        own: dict[str, dict[str, Any]] = {each: {} for each in models}
        for parameter, meant in method.parameters.items():
            if meant.option is None:
                continue
            if meant.option == "axis":
                axis = values.get("axis")
                by_axis = {"nuslerp_flatten": axis is None, "nuslerp_row_wise": axis == 0}
                if by_axis[parameter] != meant.default:
                    common[parameter] = by_axis[parameter]
                continue
            value = values.get(meant.option)
            for index, each in enumerate(models if meant.of_model else [""]):
                stated = self._setting(meant, value, node, place, each, index)
                if stated in (meant.default, []):  # an average has no such option
                    continue
                (own[each] if meant.of_model else common)[parameter] = stated
        return own, common

    def _setting(
        self,
        meant: Parameter,
        value: Any,
        node: Mapping[str, Any],
        place: tuple[str | int, ...],
        model: str,
        index: int,
    ) -> Any:
        """Return what a recipe says of a parameter, of one model or of all."""
        conditions = list(self._conditions(meant, node, place, model, index))
        if not conditions or "filter" in conditions[-1]:
            last = of_model(value, model, index)
            if last is None and meant.option == "weights":
                last = 1.0
            if last is not None:
                conditions.append({"value": theirs(meant, last)})
        if len(conditions) == 1 and "filter" not in conditions[0]:
            return conditions[0]["value"]
        return conditions

    def _conditions(
        self,
        meant: Parameter,
        node: Mapping[str, Any],
        place: tuple[str | int, ...],
        model: str,
        index: int,
    ) -> Iterator[dict[str, Any]]:
        """Yield a condition for each rule that sets the option, up to one for all tensors."""
        for number, rule in enumerate(node.get("where") or ()):
            if meant.option not in rule:
                continue
            value = of_model(rule[meant.option], model, index)
            if value is None:
                continue
            if isinstance(value, Mapping):
                stated: Any = [theirs(meant, own) for own in value["gradient"]]
            else:
                stated = theirs(meant, value)
            match = rule.get("match", "*")
            for pattern in [match] if isinstance(match, str) else match:
                if set(pattern) == {"*"}:
                    yield {"value": stated}
                    return
                if (text := contained(pattern)) is None:
                    reason = f"'{pattern}': mergekit only knows parts of names, as '*mlp*'."
                    self._wrong((*place, "where", number, "match"), reason)
                else:
                    yield {"filter": text, "value": stated}

    def _tokens(self) -> dict[str, Any]:
        """Return the keys of the tokenizer."""
        given = self.pool.get("tokenizer")
        if given is None:
            return {}
        if isinstance(given, str):
            return {"tokenizer_source": self._token_source(given)}
        if not isinstance(given, Mapping) or "_target_" in given:
            self._wrong(("modelpool", "tokenizer"), "a recipe names a model.")
            return {}
        tokens = {}
        for token, row in (given.get("tokens") or {}).items():
            source = row.get("source")
            if isinstance(source, str):
                source = self._paths.get(source, source)
            elif isinstance(source, Mapping) and "model" in source:
                model = source["model"]
                source = {**source, "model": self._paths.get(model, model)}
            tokens[token] = {**row, **({} if source is None else {"source": source})}
        made: dict[str, Any] = {"source": self._token_source(str(given.get("source") or "union"))}
        made |= {"tokens": tokens} if tokens else {}
        if (multiple := given.get("pad_to_multiple_of")) is not None:
            made["pad_to_multiple_of"] = multiple
        return {"tokenizer": made}

    def _token_source(self, source: str) -> str:
        return source if source in ("base", "union") else self._paths.get(source, source)

    def _wrong(self, place: tuple[str | int, ...], reason: str, remedy: str = "") -> None:
        self.problems.add([Problem((*self.place, *place), reason, remedy)])


def _fits(values: Mapping[str, Any]) -> bool:
    """Tell whether no shares are more than 1 together, so that none gives way to the other."""
    nodes = [values, *(values.get("where") or ())]
    most = [
        max((number for node in nodes for number in numbers_in(node.get(key))), default=0)
        for key in ("density", "gamma")
    ]
    return sum(most) <= 1
