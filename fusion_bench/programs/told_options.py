"""What the options of a method are for which entries, for the plan of a run."""

from collections.abc import Iterator

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import Composing, FusionMethod, ModelPool
from fusion_bench.method.where import Given
from fusion_bench.problems import Place, key_of
from fusion_bench.weights import Inputs
from fusion_bench.weights.folding import folded


def option_notes(method: FusionMethod, pool: ModelPool, place: Place) -> Iterator[str]:
    """Yield a line for each value that rules give an option, and for each that they never give.

    Args:
        method: the method, which fits the models.
        pool: the models, of which only the headers are read.
        place: the method's place in the config.
    """
    if not isinstance(method, TensorwiseAlgorithm):
        return
    if isinstance(method, Composing) and isinstance(method.base_method, TensorwiseAlgorithm):
        yield from option_notes(method.base_method, pool, (*place, "base_method"))
    if not method.where:
        return
    inputs = Inputs(aligned(pool), pool.policy)
    resolved = method.resolved(inputs)
    for option, given in resolved.given.items():
        groups: dict[str, list[str]] = {}
        for key, values in given.items():
            groups.setdefault(_said(values, inputs.names), []).append(key)
        for said, keys in groups.items():
            yield f"{key_of((*place, option))} {said}: {folded(keys, given)}"
    for rule, option in resolved.unused:
        yield (
            f"{key_of((*place, 'where', rule, option))} decides nothing: it matches no "
            "entry, or rules before it decide for all that it matches"
        )


def _said(values: tuple[Given, ...], models: list[str]) -> str:
    """Return one value, or the values of the models."""
    if len({str(own.value) for own in values}) == 1:
        return str(values[0].value)
    pairs = zip(models, values, strict=True)
    return ", ".join(f"{name}={own.value}" for name, own in pairs)
