"""Recipes of mergekit for mixtures of experts, translated to configs."""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

from fusion_bench.problems import (
    ConfigError,
    FusionBenchError,
    Place,
    Problem,
    Problems,
    did_you_mean,
    key_of,
)
from fusion_bench.recipes.document import Reference
from fusion_bench.recipes.keys import IDLE_KEY, refused_key
from fusion_bench.recipes.names import named_after
from fusion_bench.recipes.places import Places
from fusion_bench.recipes.reading import ALIASES, DTYPES

Node = dict[str, object]

_BASE = "_pretrained_"
_KEYS = (
    *("base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts"),
    "architecture",
)
_EXPERT = (
    *("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"),
    "model",
)
#: What an expert has, by mergekit's names.
RENAMED = {
    "positive_prompts": "positive_prompts",
    "negative_prompts": "negative_prompts",
    "noise_scale": "noise",
    "residual_scale": "scale",
}
#: mergekit's gates.
GATES: Mapping[str, Node] = {
    "hidden": {"gate": "hidden", "state": "last"},
    "hidden_last": {"gate": "hidden", "state": "last"},
    "hidden_avg": {"gate": "hidden", "state": "mean"},
    "cheap_embed": {"gate": "embedding"},
    "random": {"gate": "random"},
    "uniform_random": {"gate": "random"},
}
#: mergekit's names of layouts.
LAYOUTS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def is_mixture(node: object) -> TypeGuard[Mapping[str, object]]:
    """Return whether a document describes a mixture of experts, by its keys."""
    return isinstance(node, Mapping) and "experts" in node and "merge_method" not in node


def mixture(
    node: Mapping[str, object], pool: Mapping[str, object], names: Mapping[str, str]
) -> tuple[Node, Node, tuple[str, ...], Places]:
    """Return the nodes of the method and of the pool, what is surprising, and the places.

    Args:
        node: the document.
        pool: the ``_target_`` and other keys of the pool.
        names: paths of models to their names in the pool; others are named after their paths.

    Raises:
        FusionBenchError: all mistakes, with their places.
    """
    return _Mixture(node, names).translated(pool)


class _Mixture:
    """A document that is read; every mistake is kept with its place."""

    def __init__(self, node: Mapping[str, object], names: Mapping[str, str]):
        self._node = node
        self._names = names
        self._problems = Problems()
        self._notes: list[str] = []

    def translated(self, pool: Mapping[str, object]) -> tuple[Node, Node, tuple[str, ...], Places]:
        """Return method, pool, notes and places.

        Raises:
            FusionBenchError: all mistakes.
        """
        self._refuse_keys(self._node, _KEYS)
        base = self._reference(self._node.get("base_model"), "base_model")
        experts = self._experts("experts")
        shared = self._experts("shared_experts") if self._node.get("shared_experts") else []
        with self._problems.collect("experts"):
            if not experts:
                raise ConfigError("there is no expert.", "Name one.")
        with self._problems.collect("shared_experts"):
            if len(shared) > 1:
                raise ConfigError("there are several.", "Name one; no layout has more.")
        method: Node = {
            "_target_": "fusion_bench.method.MixtureOfExperts",
            **self._choice("gate_mode", "hidden", GATES),
            **self._layout(),
            "experts_per_token": self._node.get("experts_per_token", 2),
        }
        modelpool: Node = {**pool, "models": {}}
        with self._problems.collect("dtype"):
            if (dtype := self._dtype()) is not None:
                modelpool["policy"] = {"dtype": dtype}
        self._problems.raise_all()
        assert base is not None
        references = dict.fromkeys(own for own, _ in [*experts, *shared] if own != base)
        labels = {own.adapter_name or own.name: own for own in references}
        known = {path: self._names[path] for path in labels if path in self._names}
        fresh = {path: name for name, path in named_after([*labels]).items()} | known
        called = {own: fresh[path] for path, own in labels.items()} | {base: _BASE}
        modelpool["models"] = {_BASE: _model(base)} | {called[r]: _model(r) for r in references}
        if not references:  # copies of the base
            modelpool["models"] = {"model": _model(base)}
            called = {base: "model"}
        method["experts"] = [{"model": called[own], **more} for own, more in experts]
        if shared:
            own, more = shared[0]
            method["shared_expert"] = {"model": called[own], **more}
        return method, modelpool, tuple(self._notes), dict(_places(experts, shared, called))

    def _experts(self, key: str) -> list[tuple[Reference, Node]]:
        nodes, found = self._node.get(key), list[tuple[Reference, Node]]()
        if not isinstance(nodes, list):
            self._problems.add([Problem((key,), f"{nodes!r} is no list.", "Give one.")])
            return found
        for index, node in enumerate(nodes):
            with self._problems.collect(key, index):
                if not isinstance(node, Mapping):
                    raise ConfigError(f"{node!r} is no expert.", "Give its source_model.")
                self._refuse_keys(node, _EXPERT, key, index)
                model = node.get("source_model", node.get("model"))
                reference = self._reference(model, key, index, "source_model")
                if reference is not None:
                    found.append((reference, _options(node)))
        return found

    def _refuse_keys(
        self, node: Mapping[str, object], known: tuple[str, ...], *place: str | int
    ) -> None:
        for key in node:
            if key in known:
                continue
            own = (*place, str(key))
            if (refused := refused_key(str(key), known)) is not None:
                self._problems.add([Problem(own, *refused)])
            else:
                self._notes.append(f"{key_of(own)}: {IDLE_KEY}")

    def _reference(self, node: object, *place: str | int) -> Reference | None:
        try:
            if not isinstance(node, str) or not node:
                raise ConfigError("missing." if node is None else f"{node!r} is no model.")
            return Reference.parse(node)
        except FusionBenchError as error:
            self._problems.add(problem.inside(*place) for problem in error.problems)
            return None

    def _choice(self, key: str, default: str, choices: Mapping[str, Node]) -> Node:
        value = str(self._node.get(key) or default)
        if value not in choices:
            hint = did_you_mean(value, choices)
            self._problems.add([Problem((key,), f"'{value}' is unknown.", hint)])
            return {}
        if value == "uniform_random":
            self._notes.append("gate_mode: 'uniform_random' draws from a normal distribution.")
        return choices[value]

    def _layout(self) -> Node:
        if self._node.get("architecture") is None:
            return {}
        known: dict[str, Node] = {name: {"layout": own} for name, own in LAYOUTS.items()}
        return self._choice("architecture", "", known)

    def _dtype(self) -> str | None:
        node = self._node.get("dtype")
        if node is None:
            return None
        name = str(node).removeprefix("torch.")
        name = ALIASES.get(name, name)
        if name not in DTYPES:
            raise ConfigError(f"'{node}' is no type of weights.", did_you_mean(name, DTYPES))
        return name


def _places(
    experts: list[tuple[Reference, Node]],
    shared: list[tuple[Reference, Node]],
    called: Mapping[Reference, str],
) -> Iterator[tuple[Place, Place]]:
    """Yield keys of the config, and where in the document they come from."""
    yield ("modelpool", "models", _BASE), ("base_model",)
    yield ("modelpool", "policy", "dtype"), ("dtype",)
    plain = {"gate": "gate_mode", "state": "gate_mode", "layout": "architecture"}
    for ours, theirs in (plain | {"experts_per_token": "experts_per_token"}).items():
        yield ("method", ours), (theirs,)
    listed: list[tuple[Place, Place, Reference]]
    listed = [(("method", "experts", i), ("experts", i), own[0]) for i, own in enumerate(experts)]
    if shared:
        listed.append((("method", "shared_expert"), ("shared_experts", 0), shared[0][0]))
    for place, theirs_at, reference in reversed(listed):  # the first of a model counts
        yield place, theirs_at
        yield (*place, "model"), (*theirs_at, "source_model")
        for theirs, ours in RENAMED.items():
            yield (*place, ours), (*theirs_at, theirs)
        if called[reference] != _BASE:
            yield ("modelpool", "models", called[reference]), (*theirs_at, "source_model")


def _options(node: Mapping[str, object]) -> Node:
    """Return what an expert says besides its model; empty prompts stand for none."""
    found = {ours: node[own] for own, ours in RENAMED.items() if node.get(own) is not None}
    for key, value in found.items():
        if isinstance(value, list):
            found[key] = [text for text in value if text != ""]
    return {key: value for key, value in found.items() if value != []}


def _model(reference: Reference) -> object:
    """Return a model's node in the pool."""
    if reference.adapter is None:
        return reference.name
    return {"path": reference.adapter_name, "base": reference.name}
