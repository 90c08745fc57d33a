"""Where in a recipe the keys of its config come from, so that problems are told at its own."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fusion_bench.problems import FusionBenchError, Place, Problem, key_of
from fusion_bench.recipes.document import Module, Parameters, Recipe, Reference, Slice
from fusion_bench.recipes.methods import METHODS

Places = Mapping[Place, Place]
_MODELS = ("modelpool", "models")
BASE = "_pretrained_"


def places_of(
    recipe: Recipe, names: Mapping[Reference, str], *, stacked: bool
) -> dict[Place, Place]:
    """Return where in a document the keys of its config come from.

    Args:
        recipe: the document.
        names: its models' names in the pool.
        stacked: whether each slice has a method.
    """
    own = recipe.place
    parts = [(module, part) for module in recipe.modules for part in module.slices]
    first = parts[0][1].place
    body = (*own, "modules") if recipe.modules[0].name else first[:-1] if stacked else first
    found: dict[Place, Place] = {("method",): (*own, "merge_method"), _MODELS: body}
    if dtype := "out_dtype" if recipe.out_dtype else "dtype" if recipe.dtype else "":
        found["modelpool", "policy", "dtype"] = (*own, dtype)
    if recipe.tokenizer is not None:
        found["modelpool", "tokenizer"] = at = recipe.tokenizer.place
        for token in recipe.tokenizer.tokens:
            for end in ((), ("model",), ("token",), ("token_id",)):
                key: Place = ("tokens", token, "source", *end)
                found["modelpool", "tokenizer", *key] = (*at, *key)
    found["modelpool", "chat_template"] = (*own, "chat_template")
    for source in recipe.sources():
        found.setdefault((*_MODELS, names[source.model]), (*source.place, "model"))
    if recipe.base is not None:
        found[*_MODELS, BASE] = (*own, "base_model")
        found.setdefault((*_MODELS, names[recipe.base]), (*own, "base_model"))
    if not stacked:
        return found | dict(_options(recipe, parts, ("method",)))
    found |= _options(recipe, parts, ("method", "base_method"))
    for index, (module, part) in enumerate(parts):
        place = ("method", "slices", index)
        found[place] = part.place
        called: set[str] = set()
        for source in part.sources:
            name = names[source.model]
            while name in called:
                name += "-2"
            called.add(name)
            found[*place, "models", name] = (
                *source.place,
                "model" if module.whole else "layer_range",
            )
            found.setdefault((*_MODELS, name), (*source.place, "model"))
        found |= _options(recipe, [(module, part)], (*place, "base_method"))
    return found


def _options(
    recipe: Recipe, parts: list[tuple[Module, Slice]], prefix: Place
) -> Iterator[tuple[Place, Place]]:
    """Yield the places of options of a method, each where the recipe says it first.

    Of those that it does not say, it is where it could.
    """
    levels: list[Parameters] = []
    for module, part in parts:
        levels += [*(source.parameters for source in part.sources), part.parameters]
        levels += [module.parameters]
    known = METHODS[recipe.method].parameters
    for name, parameter in known.items():
        if parameter.option is not None:
            yield (*prefix, parameter.option), (*recipe.place, "parameters", name)
    for name, parameter in known.items():
        for level in [*levels, recipe.parameters]:
            if parameter.option is not None and name in level:
                yield (*prefix, parameter.option), level[name].place
                break


def of_stage(name: str, places: Places) -> dict[Place, Place]:
    """Return the places of a stage as those of a model of the pool."""
    return {(*_MODELS, name, *inner): place for inner, place in places.items()}


@contextmanager
def told_in_recipe(places: Places, *above: str) -> Iterator[None]:
    """Give problems their places in the recipe, as far as they are known.

    Args:
        places: keys of the config, and where in the recipe they come from.
        above: what is put before the places.
    """
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(_moved(problem, places, above) for problem in error.problems)
        raise


def _moved(problem: Problem, places: Places, above: tuple[str, ...]) -> Problem:
    key = list(problem.place)
    if "where" in key:  # a rule's option is that of the method
        at = key.index("where")
        key[at : at + 2] = []
    for length in range(len(key), 0, -1):
        if (place := places.get(tuple(key[:length]))) is not None:
            remedy = _remedy(problem, places)
            for name, outer in (("here", problem.place[:-1]), ("above", problem.place[:-2])):
                remedy = remedy.replace(f"{{{name}}}", f"{key_of(outer)}." if outer else "")
            reason = problem.reason.replace(f"'{BASE}'", "the base")
            details = tuple(line.replace(f"in {BASE} ", "in the base ") for line in problem.details)
            place = (*above, *place)
            return replace(problem, place=place, reason=reason, remedy=remedy, details=details)
    return problem


def _remedy(problem: Problem, places: Places) -> str:
    """Return what to do, with the recipe's own keys for those that it has."""
    if problem.place[-1:] == ("stack",):
        return "Give the slices of each in its own module: 'modules: {encoder: …, decoder: …}'."

    def theirs(found: re.Match[str]) -> str:
        place = places.get((*problem.place[:-1], found[1]))
        return found[0] if place is None else f"{key_of(place)}: {found[2]}"

    return re.sub(r"\{here\}(\w+)=(\w+)", theirs, problem.remedy)
