"""The similarity of task vectors in each part of the network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.weights.inputs import Inputs
from fusion_bench.weights.ops import block, task_vectors
from fusion_bench.weights.statistics import cosines_and_norms, products


@dataclass(frozen=True)
class Part:
    """A part of the network.

    Attributes:
        name: a block's number, or the layers before or after the blocks.
        norms: the norm of each model's task vector.
        cosines: those between them, models by models; 0 where one has no length.
    """

    name: str
    norms: list[float]
    cosines: list[list[float]]


def similarity(inputs: Inputs) -> list[Part]:
    """Return the norms and cosines of the task vectors in each part; the weights are read once.

    The whole network is the first part. Parts follow in the order of the keys. What is summed up
    is summed in float64, in an order that does not depend on threads.
    """
    found = products(inputs, task_vectors)
    names = _parts(list(inputs))
    totals: dict[str, Tensor] = {"all": torch.zeros(())}
    for key, own in found.items():
        for name in ("all", names[key]):
            totals[name] = totals.get(name, torch.zeros(())) + own
    return [_part(name, total) for name, total in totals.items() if total.ndim]


def _part(name: str, products: Tensor) -> Part:
    cosine, norms = cosines_and_norms(products)
    return Part(name, norms.tolist(), cosine.tolist())


def _parts(keys: Sequence[str]) -> dict[str, str]:
    """Return the part of each key: its block, or the layers before or after all blocks."""
    found = {key: block(key) for key in keys}
    stacks = dict.fromkeys(place[0] for place in found.values() if place)
    names: dict[str, str] = {}
    outside = "before the blocks" if stacks else "outside of blocks"
    for key, place in found.items():
        if place is None:
            names[key] = outside
        else:
            outside = "after the blocks"
            stack, index = place
            names[key] = f"block {index}" if len(stacks) == 1 else f"{stack}.{index}"
    return names
