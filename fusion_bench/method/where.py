"""Options by tensor, layer and model, resolved outside of the methods.

A rule of ``where`` gives options values for the entries that match a pattern. Of each distinct set
of options there is one method object, which merges its entries and knows nothing of the others.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from fusion_bench.method.per_model import of_each, per_model_options
from fusion_bench.method.rules import Given, Rules
from fusion_bench.problems import FusionBenchError, Problem
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.layers import Layers

if TYPE_CHECKING:
    from fusion_bench.method.base import TensorwiseAlgorithm


@dataclass(frozen=True)
class Variant:
    """A method object, and the entries that it merges.

    Attributes:
        method: with the options of these entries.
        keys: the entries.
    """

    method: "TensorwiseAlgorithm"
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Resolved:
    """What the rules of a method mean for the entries of some models.

    Attributes:
        variants: one for each distinct set of options.
        given: option to entry to where its value comes from: one, or for an option that may differ
            between models one for each of them. It has the options of rules, and those that
            differ between models without one.
        unused: the options of rules that decide nothing, since rules before them do, as the number
            of the rule and the option.
    """

    variants: tuple[Variant, ...]
    given: Mapping[str, Mapping[str, tuple[Given, ...]]]
    unused: tuple[tuple[int, str], ...]

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Return what merges each entry with its own method object.

        Raises:
            FusionBenchError: the objects make different models.
        """
        made = [own.method.merger(inputs.asking(own.keys)) for own in self.variants]
        of = {key: index for index, own in enumerate(self.variants) for key in own.keys}
        single = [own for own in made if not isinstance(own, Mapping)]
        if len(single) == len(made):
            return partial(_merge, of, single)
        several = [own for own in made if isinstance(own, Mapping)]
        names = list(several[0])
        if single or any(list(own) != names for own in several):
            raise FusionBenchError(
                "these options make different models of different entries.", place=("where",)
            )
        return {name: partial(_merge, of, [own[name] for own in several]) for name in names}


def _merge(
    of: Mapping[str, int],
    mergers: Sequence[MergePiece],
    key: str,
    start: int,
    tensors: Sequence[Tensor],
    base: Tensor | None,
) -> Tensor:
    return mergers[of[key]](key, start, tensors, base)


def resolve(method: "TensorwiseAlgorithm", inputs: Inputs) -> Resolved:
    """Find the options of each entry.

    Args:
        method: whose ``where`` is not empty.
        inputs: the models, of which only names are looked at.

    Raises:
        FusionBenchError: rules that are malformed, match nothing, or give options values that the
            method refuses.
    """
    rules = Rules(method, inputs.names)
    keys = _merged_keys(inputs)
    if not list(inputs):  # the models are not known
        return Resolved((), {}, ())
    theirs = {key: _names_of(inputs, key) for key in inputs}
    elsewhere = inputs.aligned.elsewhere
    of_models = [
        dict.fromkeys(chain(*own, elsewhere)) for own in zip(*theirs.values(), strict=True)
    ]
    rules.refuse_unmatched([*theirs, *elsewhere], of_models)
    layers = Layers(inputs)
    found: dict[str, dict[str, tuple[Given, ...]]] = {}
    written: dict[tuple[int, float], str] = {}  # the options of entries that rules treat alike
    groups: dict[str, list[str]] = {}
    for key in keys:
        found[key], depth = rules.given(key, theirs[key]), _depth(layers, key)
        alike = id(found[key]), depth
        if alike not in written:
            written[alike] = repr(rules.values(found[key], depth))
        groups.setdefault(written[alike], []).append(key)
    variants = []
    for own in groups.values():
        first = own[0]
        with _told_of(found[first]):
            made = rules.variant(rules.values(found[first], _depth(layers, first)), first)
            made.check_options(inputs)
        variants.append(Variant(made, tuple(own)))
    used = {
        (one.rule, option)
        for given in {id(own): own for own in found.values()}.values()
        for option, each in given.items()
        for one in each
    }
    unused = [one for one in rules.everything() if one not in used]
    given = {option: {key: found[key][option] for key in keys} for option in rules.options}
    given |= by_model(method, inputs, leaving=rules.options)
    return Resolved(tuple(variants), given, tuple(unused))


def by_model(
    method: "TensorwiseAlgorithm", inputs: Inputs, leaving: Collection[str] = ()
) -> dict[str, dict[str, tuple[Given, ...]]]:
    """Return the values of options that differ between models, for each entry.

    Args:
        method: whose options fit the models.
        inputs: the models, of which only names are looked at.
        leaving: options that are not asked for.
    """
    found, keys = {}, _merged_keys(inputs)
    for option in sorted(per_model_options(type(method)).difference(leaving)):
        values = of_each(getattr(method, option), inputs.names, option)
        if len(set(values)) > 1:
            found[option] = dict.fromkeys(keys, tuple(map(Given, values)))
    return found


def _merged_keys(inputs: Inputs) -> list[str]:
    """Return the entries that are merged, of tied ones the first."""
    return [key for key in inputs if inputs.tied_to(key) == key and inputs.merged(key)]


@contextmanager
def _told_of(given: Mapping[str, tuple[Given, ...]]) -> Iterator[None]:
    """Put the rule that gave an option its value before the place of what is wrong with it."""
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(_at_rule(problem, given) for problem in error.problems)
        raise


def _at_rule(problem: Problem, given: Mapping[str, tuple[Given, ...]]) -> Problem:
    option, *rest = problem.place or ("",)
    own = given.get(str(option), ())
    which = rest[0] if rest and isinstance(rest[0], int) else 0
    rule = own[which].rule if which < len(own) else None
    if rule is None:
        return problem
    return replace(problem, place=("where", rule, option))


def _names_of(inputs: Inputs, key: str) -> list[tuple[str, ...]]:
    """Return what each model calls an entry itself, by all that it is made of."""
    return [
        tuple(origin.key for origin in weights.origins(key))
        for weights in inputs.aligned.models.values()
    ]


def _depth(layers: Layers, key: str) -> float:
    """Return how deep an entry is, from 0 to 1; 0 outside of layers."""
    place = layers.place(key)
    return 0.0 if place is None else place.depth
