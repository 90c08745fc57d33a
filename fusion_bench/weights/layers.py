"""The repeated layers of a model, found in the names of its entries."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: ``model.layers.3.mlp.experts.7.w1`` is the entry ``mlp.experts.7.w1`` of layer 3 of a stack.
_IN_LAYER = re.compile(r"(?P<stack>[^\d.]\w*(?:\.[^\d.]\w*)*)\.(?P<index>\d+)\.(?P<rest>.+)")
#: So many entries make a layer; steps of a small head have a weight and a bias.
_FEWEST = 3


@dataclass(frozen=True)
class LayerPlace:
    """Where an entry is in a stack of layers.

    Attributes:
        stack: what comes before the layers' numbers, such as ``model.layers``.
        index: the layer, counted from 0 over the layers that there are.
        count: the number of layers in the stack.
        number: the layer's number in the name of the entry.
        rest: the entry's name inside of the layer.
    """

    stack: str
    index: int
    count: int
    number: int
    rest: str

    @property
    def depth(self) -> float:
        """How deep the layer is, from 0 to 1; 1 for the only one."""
        return self.index / (self.count - 1) if self.count > 1 else 1.0


class Layers:
    """The stacks of layers among some entries.

    The first number in a name counts the layers, if the layers that it counts have at least three
    entries; a number behind it counts parts of a layer, such as experts.

    Attributes:
        keys: the entries.
        stacks: the numbers of each stack's layers, in ascending order.
    """

    def __init__(self, keys: Iterable[str]):
        parts: dict[str, tuple[str, int, str]] = {}
        entries: dict[str, dict[int, int]] = {}
        self.keys = tuple(keys)
        for key in self.keys:
            if found := _IN_LAYER.fullmatch(key):
                stack, number = found["stack"], int(found["index"])
                parts[key] = stack, number, found["rest"]
                own = entries.setdefault(stack, {})
                own[number] = own.get(number, 0) + 1
        self.stacks: Mapping[str, tuple[int, ...]] = {
            stack: tuple(sorted(own))
            for stack, own in entries.items()
            if max(own.values()) >= _FEWEST
        }
        self._places = {
            key: LayerPlace(stack, numbers.index(number), len(numbers), number, rest)
            for key, (stack, number, rest) in parts.items()
            if (numbers := self.stacks.get(stack))
        }

    def place(self, key: str) -> LayerPlace | None:
        """Return where an entry is; ``None`` outside of all layers."""
        return self._places.get(key)
