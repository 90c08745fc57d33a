"""From a recipe to the config of a run: its documents in order, each with those that it uses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fusion_bench.problems import Place, Problem, Problems, error_of
from fusion_bench.recipes.document import Recipe
from fusion_bench.recipes.methods import METHODS
from fusion_bench.recipes.moe import is_mixture, mixture
from fusion_bench.recipes.near import suspects
from fusion_bench.recipes.places import BASE
from fusion_bench.recipes.reading import documents
from fusion_bench.recipes.text import nodes_of
from fusion_bench.recipes.translation import Translated, Translation

#: What ``modelpool`` is without a better one.
_POOL = {"_target_": "fusion_bench.modelpool.CausalLMPool"}


def translate(
    text: str,
    pool: Mapping[str, object] | None = None,
    names: Mapping[str, str] | None = None,
) -> Translated:
    """Return the config of a recipe; nothing but its text is looked at.

    Args:
        text: the recipe.
        pool: the ``_target_`` and other keys of the pools; by default causal language models.
        names: paths of models to their names in the pool; others are named after their paths.

    Raises:
        FusionBenchError: all mistakes of the recipe, and what we cannot do, with their places.
    """
    nodes = nodes_of(text)
    if len(nodes) == 1 and is_mixture(nodes[0]):
        method, modelpool, told, places = mixture(nodes[0], pool or _POOL, names or {})
        return Translated(method, modelpool, told, places=places)
    problems = Problems()
    recipes = documents(nodes, problems)
    final, stages = _ordered(recipes, problems)
    done: dict[str, Translated] = {}
    notes: list[str] = []
    filters: list[tuple[str, str]] = []
    for recipe in [*stages, final]:
        if recipe.method not in METHODS or not any(True for _ in recipe.sources()):
            continue  # told by the reader
        made = Translation(recipe, dict(pool or _POOL), done, dict(names or {}))
        with problems.collect():
            translated = made.whole()
            done[recipe.name or ""] = translated
            notes += translated.notes
            filters += translated.filters
    problems.raise_all()
    found = done[final.name or ""]
    used = _needed(final, {recipe.name: recipe for recipe in stages})
    notes += [f"the stage '{own.name}' is not used." for own in stages if own.name not in used]
    notes, filters = list(dict.fromkeys(notes)), list(dict.fromkeys(filters))
    near = tuple(suspects(recipes))
    return replace(found, notes=tuple(notes), filters=tuple(filters), suspects=near)


def models_of(text: str) -> list[tuple[str, Place]]:
    """Return the models that a recipe merges and their places, the base of each merge first.

    Raises:
        FusionBenchError: as ``translate``.
    """
    found = translate(text)
    pools: list[tuple[object, Place]] = [(found.modelpool, ("modelpool", "models"))]
    models: dict[str, Place] = {}
    while pools:
        pool, key = pools.pop(0)
        assert isinstance(pool, Mapping)
        for name in sorted(pool["models"], key=lambda name: name != BASE):
            node, own = pool["models"][name], (*key, name)
            if isinstance(node, Mapping) and "_target_" in node:
                pools.append((node["modelpool"], (*own, "modelpool", "models")))
                continue
            if isinstance(node, Mapping):  # an adapter, whose base may be a stage in the pool
                node = node["base"]
                if isinstance(pool["models"].get(node), Mapping):
                    continue
            models.setdefault(str(node), found.places.get(own, ()))
    return [*models.items()]


def _ordered(recipes: Sequence[Recipe], problems: Problems) -> tuple[Recipe, list[Recipe]]:
    """Return the final document and the others, each after those that it uses.

    Raises:
        FusionBenchError: several final documents, or cycles.
    """
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is None:
            continue
        if recipe.name in named:
            where = (*recipe.place, "name")
            problems.add([Problem(where, f"'{recipe.name}' is the name of another stage, too.")])
        named.setdefault(recipe.name, recipe)
    finals = [recipe for recipe in recipes if recipe.name is None]
    used = {name for own in recipes for reference in own.references() if (name := reference.path)}
    if not finals:
        finals = [recipe for recipe in recipes if recipe.name not in used] or [recipes[-1]]
    if len(finals) > 1:
        remedy = "Give all but the final one a 'name', and use them."
        reason = "there are several final documents."
        problems.add([Problem(finals[1].place, reason, remedy)])
        problems.raise_all()
    order: list[Recipe] = []

    def visit(recipe: Recipe, path: tuple[Recipe, ...]) -> None:
        if recipe in path:
            cycle = " → ".join(str(own.name) for own in [*path[path.index(recipe) :], recipe])
            raise error_of([Problem(recipe.place, f"stages use each other: {cycle}.")])
        if recipe in order:
            return
        for reference in recipe.references():
            if reference.path in named and reference.revision is None:
                visit(named[reference.path], (*path, recipe))
        order.append(recipe)

    for recipe in [*finals, *named.values()]:
        visit(recipe, ())
    return finals[0], [recipe for recipe in order if recipe is not finals[0]]


def _needed(recipe: Recipe, stages: Mapping[str | None, Recipe]) -> set[str]:
    """Return the names of the stages that a document uses, or they do."""
    found: set[str] = set()
    for reference in recipe.references():
        if (own := stages.get(reference.path)) is not None and reference.path not in found:
            found |= {reference.path} | _needed(own, stages)
    return found
