"""What the options of a method are for which entries, for the plan of a run."""

from collections.abc import Iterator, Mapping, Sequence

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import Composing, FusionMethod, ModelPool
from fusion_bench.method.rules import Given, Gradient
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import Place, key_of
from fusion_bench.weights import Inputs
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
    if not isinstance(method, TensorwiseAlgorithm):
        return []
    steps: list[Step] = []
    if isinstance(method, Composing) and isinstance(method.base_method, TensorwiseAlgorithm):
        steps += tell_options(plan, method.base_method, pool, (*place, "base_method"))
    inputs = Inputs(aligned(pool), pool.policy)
    resolved, layers = method.resolved(inputs), Layers(inputs)
    for option, given in resolved.given.items():
        groups: dict[str, list[str]] = {}
        for values, places in _alike(given, layers):
            said = _said(values, inputs.names, [own for own in places.values() if own])
            groups.setdefault(said, []).extend(places)
        for said, keys in groups.items():
            what = f"{key_of((*place, option))} {said}: {folded(keys, given)}"
            steps.append(Step("option", what))
    for rule, option in resolved.unused:
        key = key_of((*place, "where", rule, option))
        reason = "it matches no entry, or rules before it decide for all that it matches"
        plan.note(f"{key} decides nothing: {reason}.")
    return steps


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
