"""What slices take from a pool's models, and the pools that their methods see."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn

from fusion_bench.method.contract import ModelPool
from fusion_bench.method.slices import BASE
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Layers, Model, Stacked, Weights
from fusion_bench.weights.blueprint import Blueprint


@dataclass(frozen=True)
class Source:
    """A model of the pool, as far as slices see it.

    Attributes:
        model: the model.
        keys: of its entries; layers that a file has beyond those of the config are left out.
        layers: its stacks.
        blueprint: what its config describes, if that is known.
    """

    model: Model
    keys: Sequence[str]
    layers: Layers
    blueprint: Blueprint | None

    @classmethod
    def of(cls, model: Model, blueprint: Blueprint | None) -> "Source":
        """Return a model with what its config describes."""
        layers = Layers(model.weights)
        known = Layers(blueprint.entries if blueprint else ()).stacks
        keys = [
            key
            for key in model.weights
            if (place := layers.place(key)) is None
            or place.number in known.get(place.stack, (place.number,))
        ]
        return cls(model, keys, Layers(keys), blueprint)

    def count(self, stack: str) -> int:
        """Return how many layers a stack has; 0 where there is none."""
        return len(self.layers.stacks.get(stack, ()))

    def tied(self) -> dict[str, str]:
        """Return the entries that are another's memory, with the first name of that."""
        weights = self.model.weights
        return {key: first for key in self.keys if (first := weights.tied_to(key)) != key}

    def entries(self, stack: str, layers: range, first: int) -> dict[str, str]:
        """Return the entries of some layers: the names in a new stack to their own.

        What the first layer has for all, such as T5's biases of positions, stays with the first.
        """
        shared, found = self._shared(stack), {}
        for key in self.keys:
            place = self.layers.place(key)
            if place is None or place.stack != stack:
                continue
            if place.index == 0 and place.rest in shared:
                if first == 0:
                    found[f"{stack}.0.{place.rest}"] = key
            elif place.index in layers:
                found[f"{stack}.{first + place.index - layers.start}.{place.rest}"] = key
        return found

    def _shared(self, stack: str) -> set[str]:
        """Return what a stack's first layer has besides all that the others have."""
        own: set[str] = set()
        others: set[str] = set()
        for key in self.keys:
            if (place := self.layers.place(key)) and place.stack == stack:
                (others if place.index else own).add(place.rest)
        return own - others if others and others <= own else set()

    def outside(self) -> dict[str, str]:
        """Return the entries outside of layers, those that are tied too: names to stored keys."""
        found = {key: key for key in self.keys if self.layers.place(key) is None}
        for key, first in (self.blueprint.tied if self.blueprint else {}).items():
            if key not in found and first in found:
                found[key] = first
        return found


class SlicePool:
    """Some layers of a pool's models, as a pool.

    Args:
        pool: the whole models.
        weights: by name, under the names that the entries have in the new model.
        names: the models to merge.

    Attributes:
        elsewhere: names of entries of the new model that are in other slices.
    """

    elsewhere: Collection[str] = ()

    def __init__(self, pool: ModelPool, weights: Mapping[str, Weights], names: Sequence[str]):
        self._weights = weights
        self.model_names = list(names)
        self.has_pretrained = BASE in weights and BASE not in names
        self.policy = pool.policy
        self.vocabulary = pool.vocabulary

    @property
    def reference(self) -> Weights:
        """The base's weights, or else the first model's."""
        return self._weights[BASE if self.has_pretrained else self.model_names[0]]

    def weights(self, name: str) -> Weights:
        """Return a model's layers."""
        return self._weights[name]

    def model(self, name: str) -> Model:
        """Return the same, without a config."""
        return Model(self.weights(name), None, "layers")

    def load_model(self, name: str) -> nn.Module:
        """Refuse: some layers are no module."""
        raise FusionBenchError("This method needs modules, and layers of a model are none.")

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Refuse: some layers are no module."""
        return self.load_model("")


def sides(keys: Iterable[str], tied: Mapping[str, str]) -> dict[str, tuple[str, bool]]:
    """Return where entries outside of layers belong: a stack, and whether behind it.

    An entry belongs to the stack whose name begins with the same words, or else the one in front of
    it; what is in front of all belongs to the first.

    Args:
        keys: of a model, in the order in which it uses them.
        tied: what is another entry's memory; it belongs where that belongs.
    """
    order = list(keys)
    layers = Layers(order)
    first: dict[str, int] = {}
    for index, key in enumerate(order):
        if place := layers.place(key):
            first.setdefault(place.stack, index)
    found: dict[str, tuple[str, bool]] = {}
    for index, key in enumerate(order):
        if layers.place(key) is None and first:
            alike = {stack: _same_words(stack, key) for stack in first}
            nearest = [stack for stack in first if alike[stack] == max(alike.values())]
            before = [stack for stack in nearest if first[stack] < index]
            stack = before[-1] if before else nearest[0]
            found[key] = stack, first[stack] < index
    return found | {key: found[own] for key, own in tied.items() if own in found and key in found}


def _same_words(one: str, other: str) -> int:
    """Return how many words two names have in common at their beginning."""
    pairs = zip(re.split(r"[._]", one), re.split(r"[._]", other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def view(source: Source, names: Mapping[str, str]) -> Weights:
    """Return entries of a model under other names."""
    weights = source.model.weights
    return Stacked({new: (weights, own) for new, own in names.items()})
