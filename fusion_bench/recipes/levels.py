"""Which value a parameter has for which tensors: the levels of a recipe become rules.

The first level that has a value for a tensor decides. Here a parameter's levels are one after the
other in a chain of conditions, of which the first that fits a tensor decides.
"""

import glob
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusion_bench.problems import Place, Problem, Problems
from fusion_bench.recipes.document import Condition, Parameters, Scalar, Setting
from fusion_bench.recipes.methods import MODULES, Parameter

_WORDS = {"number": "a number", "whole number": "a whole number", "truth": "true or false"}


@dataclass(frozen=True)
class Link:
    """A value of ours for the keys that match one of the patterns; for all where there is none."""

    patterns: tuple[str, ...]
    value: object


@dataclass(frozen=True)
class Chain:
    """The values of an option, of one model where each may have its own; the first that fits."""

    option: str
    model: str | None
    links: tuple[Link, ...]


def chain_of(
    name: str, levels: Sequence[Parameters], parameter: Parameter, module: str | None = None
) -> Iterator[Link]:
    """Yield what the levels say of a parameter, up to what holds for all tensors.

    Raises:
        FusionBenchError: values that the parameter cannot have.
    """
    problems = Problems()
    for level in levels:
        if (setting := level.get(name)) is None:
            continue
        for condition in setting.conditions:
            with problems.collect():
                value = converted(condition, parameter, setting.place)
                yield Link(patterns_of(condition.filter, module), value)
            if condition.filter is None:
                problems.raise_all()
                return
    problems.raise_all()


def patterns_of(filtered: str | None, module: str | None) -> tuple[str, ...]:
    """Return the key patterns of a filter, which is a part of the key, inside a module."""
    if module is None:
        return () if filtered is None else (f"*{glob.escape(filtered)}*",)
    found = []
    for begun in (f"{own}." if own else "" for own in beginnings(module)):
        escaped = glob.escape(begun)
        if filtered is None or filtered in begun:
            found.append(f"{escaped}*")
            continue
        found.append(f"{escaped}*{glob.escape(filtered)}*")
        found += [
            f"{escaped}{glob.escape(filtered[count:])}*"
            for count in range(1, len(filtered))
            if begun.endswith(filtered[:count])
        ]
    return tuple(found)


def beginnings(module: str) -> tuple[str, ...]:
    """Return what the names of a module's tensors may begin with, up to a dot."""
    return MODULES.get(module, (module, f"model.{module}"))


def converted(condition: Condition, parameter: Parameter, place: Place) -> object:
    """Return a condition's value as ours.

    Raises:
        FusionBenchError: it is not of the parameter's kind.
    """
    if not isinstance(condition.value, tuple):
        return ours(condition.value, parameter, place)
    values = [ours(own, parameter, place, exact=True) for own in condition.value]
    return values[0] if len(set(map(repr, values))) == 1 else {"gradient": values}


def ours(value: Scalar, parameter: Parameter, place: Place, *, exact: bool = False) -> Scalar:
    """Return a value of a parameter as our option has it.

    Args:
        value: theirs.
        parameter: what it is of.
        place: where it stands.
        exact: a point of a gradient, which may not be beyond what counts.

    Raises:
        FusionBenchError: it is not of the parameter's kind.
    """
    found = _of_kind(value, parameter)
    if found is None:
        reason = f"'{value}' is not {_WORDS[parameter.kind]}."
        Problems([Problem(place, reason)]).raise_all()
    assert found is not None
    if parameter.kind == "truth":
        return parameter.values.get(bool(found), found)
    least, most = (0, math.inf) if parameter.share else parameter.limits or (-math.inf, math.inf)
    if not least <= found <= most:  # type: ignore[operator]
        reason = f"{value} is not a number from 0 to 1."
        Problems([Problem(place, reason)]).raise_all()
    if parameter.share and found > 1:  # type: ignore[operator]
        if exact:
            reason = f"{value} in a gradient: beyond 1 it would mean 1 here and there."
            Problems([Problem(place, reason, "Give values up to 1.")]).raise_all()
        found = 1
    if parameter.complement:
        return float(f"{1 - float(found):.15g}")
    return found


def _of_kind(value: Scalar, parameter: Parameter) -> Scalar | None:
    if parameter.kind == "truth":
        if isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower())
        return bool(value) if value in (0, 1) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not math.isfinite(value):
        return None
    if parameter.kind == "whole number":
        return int(value) if value == int(value) else None
    return value


def options_of(chains: Iterable[Chain]) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Return options and the rules of ``where`` that mean the same as the chains."""
    options: dict[str, object] = {}
    rest: list[Chain] = []
    for chain in chains:
        *conditions, last = chain.links or (Link((), None),)
        plain = not last.patterns and not isinstance(last.value, Mapping)
        if chain.model is not None:
            by_model = options.setdefault(chain.option, {})
            assert isinstance(by_model, dict)
            if plain and chain.links:
                by_model[chain.model] = last.value
        elif plain and chain.links:
            options[chain.option] = last.value
        links = tuple(conditions) if plain else chain.links
        rest.append(Chain(chain.option, chain.model, links))
    given = {name: own for name, own in options.items() if own != {} or name == "weights"}
    return given, list(_rules(rest))


def _rules(chains: Sequence[Chain]) -> Iterator[dict[str, object]]:
    """Yield rules in which each chain keeps its order; what has equal patterns shares one."""
    left = [list(chain.links) for chain in chains]
    while heads := [(index, links[0]) for index, links in enumerate(left) if links]:
        # One for all tensors waits, and a short chain, so that they may share rules with others.
        _, first = max(heads, key=lambda each: (bool(each[1].patterns), len(left[each[0]])))
        rule: dict[str, object] = {}
        if first.patterns:
            rule["match"] = first.patterns[0] if len(first.patterns) == 1 else [*first.patterns]
            rule["optional"] = True
        for index, head in heads:
            if head.patterns != first.patterns:
                continue
            left[index].pop(0)
            chain = chains[index]
            if chain.model is None:
                rule[chain.option] = head.value
            else:
                own = rule.setdefault(chain.option, {})
                assert isinstance(own, dict)
                own[chain.model] = head.value
        yield rule


def without_models(options: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    """Return options with one value in the place of equal ones for all models; weights stay."""

    def shortened(option: str, value: object) -> object:
        if not isinstance(value, Mapping) or option == "weights" or [*value] != [*names]:
            return value
        values = list(value.values())
        return values[0] if all(own == values[0] for own in values) else value

    return {option: shortened(option, value) for option, value in options.items()}


def settings(levels: Iterable[Parameters]) -> Iterator[tuple[str, Setting]]:
    """Yield every setting of some levels, with the parameter's name."""
    for level in levels:
        yield from level.items()
