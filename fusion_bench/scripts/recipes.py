"""Lets a recipe of mergekit take the place of a config's method and models."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_bench.command import is_there, overrides
from fusion_bench.problems import ConfigError, Place, Problem, Problems, within
from fusion_bench.recipes import (
    Translated,
    decided_options,
    models_of,
    read_text,
    told_in_recipe,
    translate,
)

#: Options that are no part of what a method computes.
_SHOWN = ("show_pbar", "inplace")


def take_recipe(settings: dict[str, Any]) -> Mapping[Place, Place]:
    """Replace ``method`` and the models of a config by those of the recipe that it names.

    What the config says of the pool besides its models, such as its policy, stays. ``recipe``
    becomes the text, which a report records; a text is left as it is.

    Returns:
        Keys of the config, and where in the recipe they come from.

    Raises:
        FusionBenchError: mistakes in the recipe, with their places in it.
    """
    name = settings.get("recipe")
    if name is None or "\n" in str(name):
        return {}
    pool = settings.get("modelpool")
    pool = dict(pool) if isinstance(pool, Mapping) else {}
    made = sections(str(name), pool, settings.get("seed"))
    method = settings.get("method")
    shown = {k: method[k] for k in _SHOWN if k in method} if isinstance(method, Mapping) else {}
    typed = _typed_keys(settings)
    Problems(
        Problem((key,), "the recipe decides it.", "Change the recipe, or write a config.")
        for key in typed
        if made.decides(key)
    ).raise_all()
    if isinstance(method, Mapping):
        names = (key.removeprefix("method.") for key in typed if key.startswith("method."))
        shown |= {name: method[name] for name in names if name in method}
    settings["modelpool"] = made.modelpool
    settings["method"] = {**made.method, **shown}
    settings["recipe"] = made.recipe
    return made.places


@dataclass(frozen=True)
class Sections:
    """What a recipe says, as parts of a config.

    Attributes:
        method: the node of the method.
        modelpool: the node of the pool.
        recipe: the recipe's text.
        places: keys of the config, and where in the recipe they come from.
        of_pool: the keys of the pool that it says.
    """

    method: dict[str, Any]
    modelpool: dict[str, Any]
    recipe: str
    places: Mapping[Place, Place]
    of_pool: Collection[str]

    def decides(self, key: str) -> bool:
        """Tell whether the recipe says what a key of the config is, such as ``method.t``.

        What its format has no word for, such as ``method.clamp``, is the user's to say.
        """
        first, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if first == "modelpool":
            return name in self.of_pool
        options = decided_options(str(self.method["_target_"]))
        return first == "method" and name not in _SHOWN and (not options or name in {"", *options})


def sections(name: str, pool: Mapping[str, Any], seed: int | None) -> Sections:
    """Return what a recipe says as parts of a config.

    Args:
        name: the recipe's file.
        pool: what else the pool is; its models are replaced, and their names are taken over.
        seed: for the methods of stages, which the run gives none.

    Raises:
        FusionBenchError: mistakes in the recipe, with their places in it.
    """
    with within("recipe"):
        text = read_text(Path(name).expanduser())
        kind = {key: pool[key] for key in ("_target_", "model_class") if key in pool}
        translated = translate(text, kind or None, _names(pool.get("models")))
        refuse_suspects(translated)
    policy = {**(pool.get("policy") or {})}
    theirs = {**translated.modelpool}
    made = theirs.pop("policy", {})
    assert isinstance(made, Mapping)
    given = {key: own for key, own in policy.items() if own is not None}
    own = {key: value for key, value in pool.items() if key not in ("models", "policy")}
    whole: dict[str, Any] = {**own, **theirs, "policy": {**policy, **made, **given}}
    if seed is not None:
        _seed(whole["models"], seed)
    return Sections(
        dict(translated.method),
        whole,
        text if "\n" in text else f"{text}\n",
        translated.places,
        frozenset(theirs) - {"_target_", "_recursive_", "model_class"},
    )


def refuse_suspects(translated: Translated) -> None:
    """Refuse words that nearly name a stage or a source of tokens, where no such file is.

    Raises:
        FusionBenchError: there are some.
    """
    Problems(own.problem for own in translated.suspects if not is_there(own.word)).raise_all()


def pool_of(text: str) -> tuple[dict[str, object], list[str]]:
    """Return the node of a pool that suits a recipe, and the models that the recipe merges.

    Raises:
        FusionBenchError: mistakes in the recipe, or none of its models can be read.
    """
    from fusion_bench.modelpool.kinds import pool_node

    with within("recipe"):
        refuse_suspects(translate(text))
        models = models_of(text)
    named = {str(number): model for number, (model, _) in enumerate(models)}
    places: dict[Place, Place] = {("models", str(n)): own for n, (_, own) in enumerate(models)}
    with told_in_recipe(places, "recipe"):
        return pool_node(named, heads=True), [*named.values()]


def _names(models: object) -> dict[str, str]:
    """Return the names of the models that the config would merge, by their paths."""
    own = models.items() if isinstance(models, Mapping) else ()
    return {path: str(name) for name, path in own if isinstance(path, str) and name[:1] != "_"}


def _typed_keys(settings: Mapping[str, Any]) -> list[str]:
    """Return the keys of the config that were typed; the verb ``merge`` leaves out ``method``."""
    keys = [key for key in overrides() if not key.startswith("-")]
    return [key if "." in key or key in settings else f"method.{key}" for key in keys]


def _seed(node: object, seed: int) -> None:
    """Give the methods of stages the seed of the run."""
    from fusion_bench.instantiate import accepts

    for inner in node.values() if isinstance(node, Mapping) else ():
        _seed(inner, seed)
    if isinstance(node, list):
        for inner in node:
            _seed(inner, seed)
    if isinstance(node, dict) and "seed" not in node and accepts(node.get("_target_"), "seed"):
        node["seed"] = seed


def refuse_recipe(name: str) -> ConfigError:
    """Return what to say of a recipe that is given as a config."""
    return ConfigError(
        f"'{name}' is a recipe of mergekit.",
        f"Merge it with 'fusion_bench merge {name} OUT', or evaluate what it makes: "
        f"'fusion_bench --config-name demo_language recipe={name}'.",
    )
