"""What the options of a method are for which entries, for the plan of a run."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import Composing, FusionMethod, ModelPool, Slicing
from fusion_bench.method.family import Family
from fusion_bench.method.rules import Given, Gradient, nearest
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import Place, key_of
from fusion_bench.weights import Inputs, Weights
from fusion_bench.weights.folding import folded
from fusion_bench.weights.layers import LayerPlace, Layers


def tell_options(plan: Plan, method: FusionMethod, pool: ModelPool, place: Place) -> list[Step]:
    """Return a step for each value that rules give an option, or that differs between models.

    What rules never decide is noted.

    Args:
        plan: takes the notes.
        method: the method, which fits the models.
        pool: the models, of which only the headers are read.
        place: the method's place in the config.
    """
    if isinstance(method, Slicing):
        return _of_slices(plan, method, pool, place)
    steps: list[Step] = []
    if isinstance(method, Composing) and _has_options(method.base_method):
        steps += tell_options(plan, method.base_method, pool, (*place, "base_method"))
    if isinstance(method, Family):
        for member in method.members.values():
            if member.place != ("base_method",):
                steps += tell_options(plan, member.method, pool, (*place, *member.place))
    if isinstance(method, TensorwiseAlgorithm):
        told = _Told.of(method, pool, place)
        steps += _steps(told.groups, told.keys)
        plan.note(*map(_undecided, told.unused))
    return steps


def _has_options(method: object) -> TypeGuard[FusionMethod]:
    return isinstance(method, TensorwiseAlgorithm | Slicing)


def _of_slices(plan: Plan, method: Slicing, pool: ModelPool, place: Place) -> list[Step]:
    """Return the steps of the methods of slices; those with one method share their lines."""
    slices = [(one, seen, (*place, *inner)) for one, seen, inner in method.slice_methods(pool)]
    told = [
        _Told.of(one, seen, at) for one, seen, at in slices if isinstance(one, TensorwiseAlgorithm)
    ]
    groups: dict[str, list[str]] = {}
    for own in told:
        for said, keys in own.groups.items():
            groups.setdefault(said, []).extend(keys)
    everything = [key for _, seen, _ in slices for key in seen.weights(seen.model_names[0])]
    for at in dict.fromkeys(own.place for own in told):
        unused = [own.unused for own in told if own.place == at]
        plan.note(*(_undecided(key) for key in unused[0] if all(key in own for own in unused)))
    return _steps(groups, everything)


def _undecided(key: str) -> str:
    return f"{key} decides nothing: rules before it do, for all that it matches."


def _steps(groups: Mapping[str, list[str]], among: Collection[str]) -> list[Step]:
    return [Step("option", f"{said}: {folded(keys, among)}") for said, keys in groups.items()]


@dataclass(frozen=True)
class _Told:
    """What a method's options are.

    Attributes:
        place: of the method.
        groups: an option with its value, and the entries that it is for.
        keys: all entries.
        unused: keys of what rules never decide.
    """

    place: Place
    groups: Mapping[str, list[str]]
    keys: Collection[str]
    unused: Sequence[str]

    @classmethod
    def of(cls, method: TensorwiseAlgorithm, pool: ModelPool, place: Place) -> "_Told":
        """Return what a method's options are for a pool's entries."""
        inputs = Inputs(aligned(pool), pool.policy)
        resolved, layers = method.resolved(inputs), Layers(inputs)
        groups: dict[str, list[str]] = {}
        for option, given in resolved.given.items():
            for values, places in _alike(given, layers):
                said = _said(values, inputs.names, [own for own in places.values() if own])
                named = f"{key_of((*place, option))} {said}"
                groups.setdefault(named, []).extend(places)
        unused = [key_of((*place, "where", *own)) for own in resolved.unused]
        return cls(place, groups, list(inputs), unused)


def tell_filters(
    plan: Plan, filters: Iterable[tuple[str, str]], weights: Collection[Weights]
) -> None:
    """Note the filters of a recipe that fit no entry, with those that are called nearly so.

    Args:
        plan: takes the notes.
        filters: each with the key where it stands.
        weights: the models'.
    """
    names = {
        name: None
        for own in weights
        for key in own
        for name in (key, *(origin.key for origin in own.origins(key)))
    }
    for key, part in filters:
        if not any(part in name for name in names):
            alike = [name for name in names if part.lower() in name.lower()][:3]
            near = ", ".join(alike or nearest(part, [*names]))
            plan.note(
                f"{key}: the filter '{part}' matches no tensor; near: {near}. A filter is a part "
                "of a name, without * or ?."
            )


_Places = dict[str, LayerPlace | None]


def _alike(
    given: Mapping[str, tuple[Given, ...]], layers: Layers
) -> Iterator[tuple[tuple[Given, ...], _Places]]:
    """Yield the values of each rule, with the entries of one stack of layers that have them."""
    found: dict[tuple[str, str | None], tuple[tuple[Given, ...], _Places]] = {}
    for key, values in given.items():
        place = layers.place(key)
        of = repr(values), None if place is None else place.stack
        found.setdefault(of, (values, {}))[1][key] = place
    yield from found.values()


def _said(values: tuple[Given, ...], models: list[str], places: Sequence[LayerPlace]) -> str:
    """Return one value, or the values of the models."""
    said = [_at(own.value, places) for own in values]
    if len(set(said)) == 1:
        return said[0]
    return ", ".join(f"{name}={own}" for name, own in zip(models, said, strict=True))


def _at(value: object, places: Sequence[LayerPlace]) -> str:
    """Return a value, or what a gradient is at the first and the last of some layers."""
    if not isinstance(value, Gradient):
        return str(value)
    if not places:
        return _short(value.at(0))
    first, last = min(places, key=_index), max(places, key=_index)
    start, end = _short(value.at(first.depth)), _short(value.at(last.depth))
    bent = len(value.points) > 2
    if first.index == last.index or (start == end and not bent):
        return start
    said = f"{start} at layer {first.number} to {end} at layer {last.number}"
    return f"{said} along [{', '.join(map(str, value.points))}]" if bent else said


def _index(place: LayerPlace) -> int:
    return place.index


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
