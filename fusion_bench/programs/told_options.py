"""What the options of a method are for which entries, for the plan of a run."""

from collections.abc import Collection, Iterable

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import Composing, FusionMethod, ModelPool
from fusion_bench.method.rules import Given
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import Place, key_of
from fusion_bench.weights import Inputs, Weights, near_keys
from fusion_bench.weights.folding import folded


def tell_options(plan: Plan, method: FusionMethod, pool: ModelPool, place: Place) -> list[Step]:
    """Return a step for each value that rules give an option; note what they never give.

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
    if not method.where:
        return steps
    inputs = Inputs(aligned(pool), pool.policy)
    resolved = method.resolved(inputs)
    for option, given in resolved.given.items():
        groups: dict[str, list[str]] = {}
        for key, values in given.items():
            groups.setdefault(_said(values, inputs.names), []).append(key)
        for said, keys in groups.items():
            what = f"{key_of((*place, option))} {said}: {folded(keys, given)}"
            steps.append(Step("option", what))
    for rule, option in resolved.unused:
        key = key_of((*place, "where", rule, option))
        plan.note(f"{key} decides nothing: rules before it do, for all that it matches.")
    return steps


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
            near = ", ".join(near_keys(part, [*names]))
            plan.note(
                f"{key}: the filter '{part}' matches no tensor; near: {near}. A filter is a part "
                "of a name, without * or ?."
            )


def _said(values: tuple[Given, ...], models: list[str]) -> str:
    """Return one value, or the values of the models."""
    if len({str(own.value) for own in values}) == 1:
        return str(values[0].value)
    pairs = zip(models, values, strict=True)
    return ", ".join(f"{name}={own.value}" for name, own in pairs)
