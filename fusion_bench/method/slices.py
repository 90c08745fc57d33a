"""Slices of layers: how they are written."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusion_bench.instantiate import instantiate
from fusion_bench.method.contract import Composing, FusionMethod, ModelPool
from fusion_bench.method.emr_merging import EMRMerging
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.method.family import Family
from fusion_bench.method.passthrough import PassthroughAlgorithm
from fusion_bench.method.plain import Runs, as_method, class_name
from fusion_bench.method.tall_mask import TallMaskTaskArithmeticAlgorithm
from fusion_bench.problems import FusionBenchError, Place, Problems, did_you_mean, within
from fusion_bench.weights import is_special

BASE = "_pretrained_"
#: The place of the method of slices without their own.
COMMON = ("base_method",)
_SEVERAL = (Family, EMRMerging, TallMaskTaskArithmeticAlgorithm)
_KEYS = ("models", "base", "base_method", "stack")


@dataclass(frozen=True)
class Slice:
    """Layers of some models, merged by a method into as many new layers.

    Attributes:
        models: name to the layers ``(start, stop)``; ``None`` for all. They are merged.
        base: the model that the method sees as the pretrained one.
        base_layers: its layers; ``None`` for those of the models.
        method: merges them.
        stack: names, of which one is that of the stack or begins it; empty for the only one.
        place: in the config.
        method_place: of the method.
    """

    models: Mapping[str, tuple[int, int] | None]
    base: str | None
    base_layers: tuple[int, int] | None
    method: FusionMethod
    stack: tuple[str, ...]
    place: Place
    method_place: Place

    @property
    def names(self) -> list[str]:
        """All models, the base first."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.models]))


def read_slices(slices: object, default: object) -> list[Slice]:
    """Return what a config says about slices.

    Args:
        slices: a list of mappings.
        default: the method of slices without their own; ``None`` for none.

    Raises:
        FusionBenchError: with each mistake.
    """
    if not isinstance(slices, Sequence) or isinstance(slices, str) or not slices:
        raise FusionBenchError(
            f"{slices!r} is not a list of slices.",
            "Give some, such as [{models: {a: [0, 4]}}, {models: {b: [2, 6]}}].",
            place=("slices",),
        )
    problems, found = Problems(), []
    common = None
    with problems.collect("base_method"):
        common = None if default is None else _method(default)
    for index, node in enumerate(slices):
        with problems.collect("slices", index):
            found.append(_slice(node, common, ("slices", index)))
    problems.raise_all()
    return found


def _slice(node: object, default: FusionMethod | None, place: Place) -> Slice:
    if not isinstance(node, Mapping):
        raise FusionBenchError(f"{node!r} is not a mapping.", "Give the slice's models.")
    problems = Problems()
    for key in node:
        with problems.collect():
            if key not in _KEYS:
                raise FusionBenchError(
                    "there is no such key.", did_you_mean(str(key), _KEYS), place=(str(key),)
                )
    named = node.get("models")
    if not isinstance(named, Mapping) or not named:
        raise FusionBenchError(
            "missing; a slice needs models, each with its layers.",
            "Give them by name, such as {a: [0, 4]}.",
            place=("models",),
        )
    models: dict[str, tuple[int, int] | None] = {}
    for name, layers in named.items():
        with problems.collect("models", str(name)):
            models[str(name)] = _layers(layers)
    method, own = default, node.get("base_method")
    with problems.collect("base_method"):
        if own is not None:
            method = _method(own)
        elif method is None and len(named) == 1:
            method = PassthroughAlgorithm()
        if method is None:
            raise FusionBenchError(
                f"missing; {', '.join(map(str, named))} must be merged.",
                "Name a method here, or a base_method for all slices.",
            )
    problems.raise_all()
    assert method is not None
    base, stack = node.get("base"), node.get("stack") or ()
    if base is None and (method.needs.base or (BASE in models and len(models) > 1)):
        base = BASE
    return Slice(
        base=None if base is None else str(base),
        # A base among others is not merged, and alone it is.
        base_layers=models.pop(str(base), None) if len(models) > 1 else None,
        models=models,
        method=method,
        stack=(stack,) if isinstance(stack, str) else tuple(map(str, stack)),
        place=place,
        method_place=COMMON if own is None else (*place, "base_method"),
    )


def _layers(layers: object) -> tuple[int, int] | None:
    if layers is None:
        return None
    ends = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 0 <= ends[0] < ends[1]:
        raise FusionBenchError(
            f"{layers!r} is no range of layers.",
            "Give the first layer and the one behind the last, such as [0, 4] for the first four.",
        )
    return ends[0], ends[1]


def _method(node: object) -> FusionMethod:
    made = instantiate(node, "method")
    if not isinstance(made, Runs):
        raise FusionBenchError(f"{node!r} is not a method.", "Give one as a config node.")
    method = as_method(made)
    inner: object = method
    while isinstance(inner, Composing) and not isinstance(inner, Family):
        inner = inner.base_method
    if isinstance(inner, _SEVERAL):
        raise FusionBenchError(
            f"{class_name(method)} makes several models, and a slice is part of one.",
            "Choose another method.",
        )
    if method.needs.split is not None or isinstance(method, EnsembleAlgorithm):
        raise FusionBenchError(
            f"{class_name(method)} needs whole models, and a slice is none.",
            "Choose a method that merges weights without data.",
        )
    return method


def range_of(name: str, given: tuple[int, int] | None, count: int, stack: str) -> range:
    """Return which layers are meant.

    Raises:
        FusionBenchError: the model has no such layers; the place is the model's name.
    """
    start, stop = given or (0, count)
    if not count or stop > count:
        has = "has 1" if count == 1 else f"has {count}, 0 to {count - 1}"
        if not count:
            has = f"has no stack '{stack}'"
        raise FusionBenchError(
            f"there are no layers [{start}, {stop}): '{name}' {has}.",
            f"Give an end of at most {count}." if count else "",
            place=(name,),
        )
    return range(start, stop)


def check_names(slices: Iterable[Slice], pool: ModelPool) -> None:
    """Refuse models that are not in the pool.

    Raises:
        FusionBenchError: with each of them.
    """
    known = [*([BASE] if pool.has_pretrained else []), *pool.model_names]
    problems = Problems()
    for one in slices:
        for name in one.names:
            if name in known or (is_special(name) and name != BASE):
                continue
            place: Place = ("models", name) if name in one.models else ("base",)
            with problems.collect(*one.place):
                if name == BASE and place == ("base",):
                    raise FusionBenchError(
                        f"{class_name(one.method)} needs a pretrained model.",
                        "Name one of the pool's models as the slice's base, or add "
                        "'_pretrained_' to the pool.",
                        place=place,
                    )
                raise FusionBenchError(
                    f"Model '{name}' is not in the pool.", did_you_mean(name, known), place=place
                )
    problems.raise_all()


def chosen_stack(one: Slice, stacks: Collection[str], outside: Collection[str]) -> str | None:
    """Return the stack of a slice; ``None`` where it is of entries outside of layers.

    Args:
        one: the slice.
        stacks: of the model.
        outside: the entries outside of its stacks.

    Raises:
        FusionBenchError: an unknown one, or none where there are several.
    """
    found = [stack for stack in stacks if begins(one, stack) or not one.stack]
    exact = [stack for stack in found if stack in one.stack]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found and any(begins(one, key) for key in outside):
        return None
    with within(*one.place):
        if not one.stack:
            raise FusionBenchError(
                f"missing; the model has {len(found)} stacks of layers.",
                f"Choose one: {', '.join(found)}.",
                place=("stack",),
            )
        said = "' and no '".join(one.stack)
        raise FusionBenchError(
            f"'{said}' begins {len(found)} stacks."
            if found
            else f"the model has no stack '{said}'.",
            f"Choose one: {', '.join(found)}." if found else did_you_mean(one.stack[0], stacks),
            place=("stack",),
        )


def begins(one: Slice, name: str) -> bool:
    """Tell whether a stack or an entry has the name that a slice gives, or begins with it."""
    return any(not own or f"{name}.".startswith(f"{own}.") for own in one.stack)
