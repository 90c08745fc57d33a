"""Reads the rules of ``where``: which of them gives an option its value in an entry."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from inspect import signature
from itertools import chain
from typing import TYPE_CHECKING, get_args, get_type_hints

from fusion_bench.arguments import arguments_of
from fusion_bench.catalog import OF_ALL_ENTRIES
from fusion_bench.instantiate import type_problems
from fusion_bench.method.per_model import known, per_model_options, refuse_unknown
from fusion_bench.problems import FusionBenchError, Problem, Problems, did_you_mean, within
from fusion_bench.weights import matches

if TYPE_CHECKING:
    from fusion_bench.method.base import TensorwiseAlgorithm

#: Of a rule: which entries it is for, and its options.
Rule = Mapping[str, object]

_GRADIENT = "gradient"
#: Of a rule that may match nothing.
_OPTIONAL = "optional"


@dataclass(frozen=True)
class Gradient:
    """Values along the layers, from the first to the last.

    Numbers are interpolated, and rounded to 15 digits. Other values are those of the point before,
    and so are the values of options that are whole numbers.

    Attributes:
        points: the values.
        whole: whether they are of an option that is a whole number.
    """

    points: tuple[object, ...]
    whole: bool = False

    def at(self, depth: float) -> object:
        """Return the value at a depth from 0 to 1."""
        place = depth * (len(self.points) - 1)
        index = int(place)
        start, end = self.points[index], self.points[min(index + 1, len(self.points) - 1)]
        if self.whole or not (_is_number(start) and _is_number(end)):
            return start
        assert isinstance(start, int | float) and isinstance(end, int | float)
        share = place - index
        return float(f"{(1 - share) * start + share * end:.15g}")


@dataclass(frozen=True)
class Given:
    """A value and where it comes from.

    Attributes:
        value: as it is given: a value, or a ``Gradient``.
        rule: the number of the rule; ``None`` for the option itself.
    """

    value: object
    rule: int | None = None


class Rules:
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
        if isinstance(method.where, str):
            raise FusionBenchError("it is not a list of rules.", place=("where",))
        for index, rule in enumerate(method.where):
            with problems.collect("where", index):
                if not isinstance(rule, Mapping):
                    raise FusionBenchError(f"{rule!r} is not a mapping of options.")
                self._patterns.append(_patterns(rule.get("match", "*")))
                own = {k: value for k, value in rule.items() if k not in ("match", _OPTIONAL)}
                if rule.get(_OPTIONAL, False):
                    self._optional.add(index)
                self._refuse_unknown(own)
                self._values.append({name: self._read(name, own[name]) for name in own})
        problems.raise_all()
        self._matching: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._given: dict[tuple[tuple[int, ...], ...], dict[str, tuple[Given, ...]]] = {}
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
            kinds = get_args(self._hints.get(option)) or (self._hints.get(option),)
            return replace(_gradient(option, value), whole=int in kinds and float not in kinds)
        if isinstance(value, Mapping):
            _refuse_mistyped(option, value, self._models)
        if option not in self._per_model:
            return value
        if value is None:
            return 1.0
        if isinstance(value, Mapping):
            with within(option):
                for model in value:
                    refuse_unknown(model, self._models, (model,))
                return {model: _of_model(model, own) for model, own in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            own = zip(self._models, known(value, self._models, option), strict=True)
            with within(option):
                return {model: _of_model(model, one) for model, one in own}
        return value

    def refuse_unmatched(self, merged: Iterable[str], theirs: Sequence[Iterable[str]]) -> None:
        """Refuse patterns that match no entry by the names that an option of theirs looks at.

        Args:
            merged: what the merged model's entries are called.
            theirs: what each model calls them itself; values by model look at these.

        Raises:
            FusionBenchError: there are some.
        """
        by_model, problems = dict(zip(self._models, map(list, theirs), strict=True)), Problems()
        everywhere = list(merged)
        for index, (patterns, own) in enumerate(zip(self._patterns, self._values, strict=True)):
            for pattern in patterns if index not in self._optional else ():
                for option, value in own.items():
                    keys = everywhere
                    if option in self._per_model:
                        models = value if isinstance(value, Mapping) else self._models
                        keys = list(chain(*(by_model[model] for model in models)))
                    if not any(matches(key, [pattern]) for key in keys):
                        problems.add([unmatched(pattern, keys).inside("where", index, "match")])
                        break
        problems.raise_all()

    def given(self, key: str, theirs: Sequence[tuple[str, ...]]) -> dict[str, tuple[Given, ...]]:
        """Return each option's value, or of an option by model its values, for an entry.

        It is the same object for all entries that the same rules match.
        """
        matching = (self._numbers((key,)), *map(self._numbers, theirs))
        if matching not in self._given:
            self._given[matching] = {
                option: tuple(
                    self._first(option, numbers, model, index)
                    for index, (model, numbers) in enumerate(
                        zip(self._models, matching[1:], strict=True)
                    )
                )
                if option in self._per_model
                else (self._first(option, matching[0]),)
                for option in self.options
            }
        return self._given[matching]

    def _numbers(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Return the numbers of the rules that match one of the names."""
        if names not in self._matching:
            self._matching[names] = tuple(
                number
                for number, patterns in enumerate(self._patterns)
                if any(matches(name, patterns) for name in names)
            )
        return self._matching[names]

    def _first(self, option: str, numbers: Sequence[int], model: str = "", index: int = 0) -> Given:
        """Return what the first of these rules gives, or else the method's own value."""
        for number in numbers:
            if option in self._values[number]:
                value = self._values[number][option]
                if not model or not isinstance(value, Mapping):
                    return Given(value, number)
                if model in value:
                    return Given(value[model], number)
        value = vars(self._method).get(option, getattr(type(self._method), option, None))
        return Given(known(value, self._models, option)[index] if model else value)

    def values(self, given: Mapping[str, tuple[Given, ...]], depth: float) -> dict[str, object]:
        """Return the options of an entry at a depth."""

        def at(value: object) -> object:
            return value.at(depth) if isinstance(value, Gradient) else value

        found = {option: [at(one.value) for one in own] for option, own in given.items()}
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


def _patterns(given: object) -> list[str]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not patterns:
        raise FusionBenchError(f"{given!r} is not a pattern.", place=("match",))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise FusionBenchError(f"{pattern!r} is not a pattern.", place=("match",))
    return list(patterns)


def _refuse_mistyped(option: str, value: Mapping[str, object], models: Collection[str]) -> None:
    """Refuse a key that is nearly ``gradient``, and no model."""
    for key in value:
        if key not in models and get_close_matches(str(key), [_GRADIENT], cutoff=0.75):
            near = did_you_mean(str(key), [_GRADIENT])
            raise FusionBenchError("there is no such key.", near, place=(option, key))


def _gradient(option: str, value: Mapping[str, object]) -> Gradient:
    points = value.get(_GRADIENT)
    if set(value) != {_GRADIENT}:
        _refuse_mistyped(option, value, [_GRADIENT])
        if _GRADIENT not in value:
            reason, remedy = f"{dict(value)!r} is no gradient.", "Write it as {gradient: [0, 1]}."
            raise FusionBenchError(reason, remedy, place=(option,))
        other = next(name for name in value if name != _GRADIENT)
        raise FusionBenchError(
            "there is nothing to give beside 'gradient'.",
            "Name the pattern in 'match', beside the option.",
            place=(option, other),
        )
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise FusionBenchError(f"{points!r} is not a list.", place=(option, _GRADIENT))
    if not points:
        raise FusionBenchError(
            "it is empty.", "Give at least one value.", place=(option, _GRADIENT)
        )
    return Gradient(tuple(points))


def _of_model(model: str, value: object) -> object:
    return _gradient(model, value) if isinstance(value, Mapping) else value


def unmatched(pattern: str, keys: Sequence[str]) -> Problem:
    """Return the problem of a pattern that matches no entry, with what is nearest to it."""
    lower = pattern.lower()
    if any(matches(key, [lower]) for key in keys):
        near = f"Did you mean '{lower}'?"
    else:
        alike = [key for key in keys if matches(key.lower(), [lower])][:3]
        near = f"The nearest: {', '.join(alike or _nearest(pattern, keys))}."
    return Problem((), f"'{pattern}' matches no entry.", near)


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
