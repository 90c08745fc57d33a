"""Options by tensor, layer and model, resolved outside of the methods.

A rule of ``where`` gives options values for the entries that match a pattern. Of each distinct set
of options there is one method object, which merges its entries and knows nothing of the others.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, get_args, get_type_hints

from torch import Tensor

from fusion_bench.arguments import arguments_of
from fusion_bench.catalog import OF_ALL_ENTRIES
from fusion_bench.instantiate import type_problems
from fusion_bench.method.per_model import known, per_model_options, refuse_unknown
from fusion_bench.problems import (
    FusionBenchError,
    Problem,
    Problems,
    did_you_mean,
    within,
)
from fusion_bench.weights import Inputs, MergePiece, matches
from fusion_bench.weights.layers import Layers

if TYPE_CHECKING:
    from fusion_bench.method.base import TensorwiseAlgorithm

#: Of a rule: which entries it is for, and its options.
Rule = Mapping[str, object]

_GRADIENT = "gradient"
#: Of a rule that may match nothing.
_OPTIONAL = "optional"
#: What is no option in a rule.
_OF_RULE = ("match", _OPTIONAL)


@dataclass(frozen=True)
class Gradient:
    """Values along the layers, from the first to the last.

    Numbers are interpolated, and so that they have at most 15 digits; of other values the one
    before is taken, of whole-number options too.
    """

    points: tuple[object, ...]

    def at(self, depth: float, whole: bool = False) -> object:
        """Return the value at a depth from 0 to 1; ``whole`` if it is to be a whole number."""
        place = depth * (len(self.points) - 1)
        index = int(place)
        start, end = self.points[index], self.points[min(index + 1, len(self.points) - 1)]
        if whole or not (_is_number(start) and _is_number(end)):
            return start
        assert isinstance(start, int | float) and isinstance(end, int | float)
        share = place - index
        return float(f"{(1 - share) * start + share * end:.15g}")

    def __str__(self) -> str:
        return f"from {' to '.join(map(str, self.points))} along the layers"


@dataclass(frozen=True)
class Given:
    """A value and where it comes from.

    Attributes:
        value: as it is given: a value, or a ``Gradient``.
        rule: the number of the rule; ``None`` for the option itself.
    """

    value: object
    rule: int | None = None


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
            between models one for each of them.
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
    rules = _Rules(method, inputs.names)
    keys = [key for key in inputs if inputs.tied_to(key) == key and inputs.merged(key)]
    if not list(inputs):  # the models are not known
        return Resolved((), {}, ())
    theirs = {key: _names_of(inputs, key) for key in inputs}
    names = (name for own in theirs.values() for each in own for name in each)
    rules.refuse_unmatched(dict.fromkeys([*theirs, *names, *inputs.aligned.elsewhere]))
    layers = Layers(inputs)
    found: dict[str, dict[str, tuple[Given, ...]]] = {}
    groups: dict[str, list[str]] = {}
    for key in keys:
        found[key] = rules.given(key, theirs[key])
        options = rules.values(found[key], _depth(layers, key))
        groups.setdefault(repr(options), []).append(key)
    variants = []
    for own in groups.values():
        first = own[0]
        with _told_of(found[first]):
            made = rules.variant(rules.values(found[first], _depth(layers, first)), first)
            made.check_options(inputs)
        variants.append(Variant(made, tuple(own)))
    used = {
        (one.rule, option)
        for given in found.values()
        for option, each in given.items()
        for one in each
    }
    unused = [one for one in rules.everything() if one not in used]
    given = {option: {key: found[key][option] for key in keys} for option in rules.options}
    return Resolved(tuple(variants), given, tuple(unused))


class _Rules:
    """The rules of a method, checked and read.

    Args:
        method: the method.
        models: the names of the models.

    Raises:
        FusionBenchError: malformed rules.
    """

    def __init__(self, method: "TensorwiseAlgorithm", models: Sequence[str]):
        self._method = method
        self._models = models
        self._hints = get_type_hints(type(method))
        self._per_model = per_model_options(type(method))
        self._patterns: list[list[str]] = []
        self._values: list[dict[str, object]] = []
        self._optional: set[int] = set()
        problems = Problems()
        for index, rule in enumerate(method.where):
            with problems.collect("where", index):
                if not isinstance(rule, Mapping):
                    raise FusionBenchError(f"{rule!r} is not a mapping of options.")
                self._patterns.append(_patterns(rule.get("match", "*")))
                own = {name: value for name, value in rule.items() if name not in _OF_RULE}
                if rule.get(_OPTIONAL, False):
                    self._optional.add(index)
                self._refuse_unknown(own)
                self._values.append({name: self._read(name, own[name]) for name in own})
        problems.raise_all()
        self.options = list(dict.fromkeys(name for own in self._values for name in own))

    def everything(self) -> Iterator[tuple[int, str]]:
        """Yield the number and the options of each rule."""
        for index, own in enumerate(self._values):
            yield from ((index, option) for option in own)

    def _refuse_unknown(self, options: Mapping[str, object]) -> None:
        if not options:
            raise FusionBenchError("this rule sets no option.", "Add one beside 'match'.")
        takes = [
            name for name in signature(type(self._method)).parameters if name not in OF_ALL_ENTRIES
        ]
        name_of = type(self._method).__name__
        for option in options:
            if option in OF_ALL_ENTRIES:
                reason = f"'{option}' holds for the whole model."
                raise FusionBenchError(reason, "Set it outside of 'where'.", place=(option,))
            if option not in takes:
                near = did_you_mean(str(option), takes)
                raise FusionBenchError(f"{name_of} has no such option.", near, place=(option,))

    def _read(self, option: str, value: object) -> object:
        """Return a value with its gradients; of each model by name, where it has such a form."""
        if isinstance(value, Mapping) and _GRADIENT in value:
            return _gradient(option, value)
        if option not in self._per_model:
            return value
        if isinstance(value, Mapping):
            with within(option):
                for model in value:
                    refuse_unknown(model, self._models, (model,))
                return {model: _of_model(model, own) for model, own in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            own = known(value, self._models, option)
            return {
                model: Gradient(tuple(one[_GRADIENT])) if isinstance(one, Mapping) else one
                for model, one in zip(self._models, own, strict=True)
            }
        return value

    def refuse_unmatched(self, keys: Iterable[str]) -> None:
        """Refuse patterns that match no entry.

        Raises:
            FusionBenchError: there are some.
        """
        keys, problems = list(keys), Problems()
        for index, patterns in enumerate(self._patterns):
            for pattern in patterns if index not in self._optional else ():
                if not any(matches(key, [pattern]) for key in keys):
                    near = f"The nearest: {', '.join(_nearest(pattern, keys))}."
                    reason = f"'{pattern}' matches no entry."
                    problems.add([Problem(("where", index, "match"), reason, near)])
        problems.raise_all()

    def given(self, key: str, theirs: Sequence[tuple[str, ...]]) -> dict[str, tuple[Given, ...]]:
        """Return each option's value, or of an option by model its values, for an entry."""
        own: dict[str, tuple[Given, ...]] = {}
        for option in self.options:
            if option not in self._per_model:
                own[option] = (self._first(option, (key,)),)
                continue
            own[option] = tuple(
                self._first(option, names, model, index)
                for index, (model, names) in enumerate(zip(self._models, theirs, strict=True))
            )
        return own

    def _first(self, option: str, names: Sequence[str], model: str = "", index: int = 0) -> Given:
        """Return what the first rule that matches gives, or else the method's own value."""
        for number, values in enumerate(self._values):
            if option not in values:
                continue
            if any(matches(name, self._patterns[number]) for name in names):
                value = values[option]
                if not model or not isinstance(value, Mapping):
                    return Given(value, number)
                if model in value:
                    return Given(value[model], number)
        value = vars(self._method).get(option, getattr(type(self._method), option, None))
        return Given(known(value, self._models, option)[index] if model else value)

    def values(self, given: Mapping[str, tuple[Given, ...]], depth: float) -> dict[str, object]:
        """Return the options of an entry at a depth."""

        def at(option: str, value: object) -> object:
            if not isinstance(value, Gradient):
                return value
            kinds = get_args(self._hints.get(option)) or (self._hints.get(option),)
            return value.at(depth, whole=int in kinds and float not in kinds)

        found = {option: [at(option, one.value) for one in own] for option, own in given.items()}
        return {o: own if o in self._per_model else own[0] for o, own in found.items()}

    def variant(self, options: Mapping[str, object], key: str) -> "TensorwiseAlgorithm":
        """Return the method with other options.

        Raises:
            FusionBenchError: what the method says of them, and a model without a value.
        """
        for option in self._per_model.intersection(options):
            values = options[option]
            assert isinstance(values, list)
            for index, (model, value) in enumerate(zip(self._models, values, strict=True)):
                if value is None:
                    raise FusionBenchError(
                        f"there is no value for the model '{model}' in '{key}'.",
                        "Give one there or in a rule.",
                        place=(option,),
                    )
                if not _is_number(value):
                    reason = f"{value!r} is not a number."
                    raise FusionBenchError(reason, place=(option, index))
        kind = type(self._method)
        Problems(type_problems(kind, options)).raise_all()
        if is_dataclass(self._method):
            return replace(self._method, where=(), **options)
        arguments = arguments_of(self._method)
        if arguments is None:
            raise FusionBenchError(
                f"{kind.__name__} does not keep its arguments.",
                "Make it a dataclass, or decorate its __init__ with "
                "fusion_bench.arguments.keeps_arguments.",
                place=("where",),
            )
        return kind(**{**arguments, "where": (), **options})


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


def _patterns(given: object) -> list[str]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not patterns:
        raise FusionBenchError(f"{given!r} is not a pattern.", place=("match",))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise FusionBenchError(f"{pattern!r} is not a pattern.", place=("match",))
    return list(patterns)


def _gradient(option: str, value: Mapping[str, object]) -> Gradient:
    points = value[_GRADIENT]
    if set(value) != {_GRADIENT}:
        other = next(name for name in value if name != _GRADIENT)
        raise FusionBenchError(
            "there is nothing to give beside 'gradient'.",
            "Name the pattern in 'match', beside the option.",
            place=(option, other),
        )
    if isinstance(points, str) or not isinstance(points, Sequence) or not points:
        raise FusionBenchError(f"{points!r} is not a list.", place=(option, _GRADIENT))
    return Gradient(tuple(points))


def _of_model(model: str, value: object) -> object:
    return _gradient(model, value) if isinstance(value, Mapping) else value


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


def _nearest(pattern: str, keys: Sequence[str]) -> list[str]:
    """Return entries in which something is called nearly as what a pattern looks for."""
    stem = re.sub(r"[*?]|\[.*?\]", "", pattern).strip(".")
    parts = stem.count(".") + 1
    whole: dict[str, str] = {}
    for key in keys:
        names = key.split(".")
        for index in range(max(1, len(names) - parts + 1)):
            whole.setdefault(".".join(names[index : index + parts]), key)
    near = get_close_matches(stem, whole, n=3) or get_close_matches(stem, whole, n=1, cutoff=0)
    return list(dict.fromkeys(whole[name] for name in near))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
