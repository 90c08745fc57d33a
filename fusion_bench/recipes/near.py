"""Words of a recipe that are nearly those that it knows, and so no models."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from fusion_bench.problems import Place, Problem
from fusion_bench.recipes.document import Recipe, Reference

#: So alike are a word and what was meant by it.
_ALIKE = 0.75


@dataclass(frozen=True)
class Suspect:
    """A word that is a mistake unless there is such a file or folder."""

    word: str
    problem: Problem


def suspects(recipes: Sequence[Recipe]) -> Iterator[Suspect]:
    """Yield the words in the place of models that nearly name a stage, or a source of tokens.

    Args:
        recipes: all documents.
    """
    stages = [own.name for own in recipes if own.name is not None]
    for recipe in recipes:
        others = [name for name in stages if name != recipe.name]
        for place, reference in _models(recipe):
            if reference.path not in stages and reference.revision is None:
                yield from _suspect(reference.path, others, place, "stage")
        tokens = recipe.tokenizer
        if tokens is not None and isinstance(tokens.source, Reference):
            models = {reference.path for _, reference in _models(recipe)}
            if (word := tokens.source.path) not in {*models, *stages}:
                yield from _suspect(word, ["base", "union", *models], tokens.source_place, "model")


def _models(recipe: Recipe) -> Iterator[tuple[Place, Reference]]:
    """Yield the models that are merged, and where they are named."""
    if recipe.base is not None:
        yield (*recipe.place, "base_model"), recipe.base
    for module in recipe.modules:
        for part in module.slices:
            if part.base is not None:
                yield (*part.place, "base_model"), part.base
            for source in part.sources:
                yield (*source.place, "model"), source.model


def _suspect(word: str, known: Collection[str], place: Place, what: str) -> Iterator[Suspect]:
    if "/" not in word and (near := get_close_matches(word, known, n=1, cutoff=_ALIKE)):
        reason = f"there is no {what} '{word}', and no such folder here."
        yield Suspect(word, Problem(place, reason, f"Did you mean '{near[0]}'?"))
