"""The experts among a model's entries: one entry each, or all in one."""

import re
from dataclasses import dataclass
from math import prod

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Layers, Weights

_ALONE = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>.+)")
_STACKED = re.compile(r"(?P<block>.+)\.experts\.(?P<part>\w+)")


@dataclass(frozen=True)
class ExpertPart:
    """A tensor that each expert of a layer has.

    Attributes:
        shape: of one expert.
        places: each expert's entry, and where it begins in the flattened entry.
        stacked: whether all are in one entry, along its first dimension.
    """

    shape: tuple[int, ...]
    places: tuple[tuple[str, int], ...]
    stacked: bool

    @property
    def size(self) -> int:
        """The number of elements of one expert."""
        return prod(self.shape)


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of a layer.

    Attributes:
        layer: what the names of the layer's entries begin with.
        rows: the router's rows.
        parts: the experts' tensors.
    """

    layer: str
    rows: ExpertPart
    parts: tuple[ExpertPart, ...]

    @property
    def router(self) -> str:
        """The router's entry."""
        return self.rows.places[0][0]

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.rows.places)

    @property
    def keys(self) -> list[str]:
        """All entries."""
        parts = [self.rows, *self.parts]
        return list(dict.fromkeys(key for part in parts for key, _ in part.places))


def blocks_of(weights: Weights) -> list[ExpertBlock]:
    """Return the experts of each layer that has some, by the names of the entries.

    Raises:
        FusionBenchError: there are none, or not all of a layer's.
    """
    layers = Layers(weights)
    alone: dict[str, dict[str, dict[int, str]]] = {}
    stacked: dict[str, list[str]] = {}
    begun: dict[str, str] = {}
    for key in weights:
        if (place := layers.place(key)) is None:
            continue
        begin = f"{place.stack}.{place.number}."
        if found := _ALONE.fullmatch(place.rest):
            block, part = begin + found["block"], found["part"]
            alone.setdefault(block, {}).setdefault(part, {})[int(found["index"])] = key
        elif found := _STACKED.fullmatch(place.rest):
            block = begin + found["block"]
            stacked.setdefault(block, []).append(key)
        else:
            continue
        begun[block] = begin
    if not begun:
        raise FusionBenchError("it has no experts.", "Use a mixture of experts.")
    return [
        _block(weights, block, begin, alone.get(block, {}), stacked.get(block, []))
        for block, begin in begun.items()
    ]


def _block(
    weights: Weights,
    name: str,
    begin: str,
    alone: dict[str, dict[int, str]],
    stacked: list[str],
) -> ExpertBlock:
    router = f"{name}.gate.weight"
    if router not in weights:
        raise FusionBenchError(f"there is no '{router}' beside the experts.", "Use a whole model.")
    rows = _split(weights, router)
    count = len(rows.places)
    parts = [_split(weights, key) for key in stacked]
    for part, keys in alone.items():
        if sorted(keys) != list(range(count)):
            raise FusionBenchError(
                f"'{router}' has rows for {count} experts, and there are {len(keys)} of "
                f"'{name}.experts.*.{part}'.",
                "Use a whole model.",
            )
        shape = weights.spec(keys[0]).shape
        parts.append(ExpertPart(shape, tuple((keys[i], 0) for i in range(count)), False))
    if any(len(part.places) != count for part in parts):
        raise FusionBenchError(
            f"'{router}' has rows for {count} experts, and '{name}.experts' others.",
            "Use a whole model.",
        )
    return ExpertBlock(begin, rows, tuple(parts))


def _split(weights: Weights, key: str) -> ExpertPart:
    """Return an entry whose first dimension counts experts."""
    count, *shape = weights.spec(key).shape
    size = prod(shape)
    return ExpertPart(tuple(shape), tuple((key, i * size) for i in range(count)), True)
