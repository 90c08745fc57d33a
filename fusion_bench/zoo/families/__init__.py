"""All families of embedded models: their names, and where and how each is built."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusion_bench import zoo
from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.storage import cache_dir
from fusion_bench.zoo import dense, language


@dataclass(frozen=True)
class Family:
    """Models that are built together.

    Attributes:
        models: their names.
        place: returns where they are, or will be built.
        model_path: returns the directory of a model; builds the family where needed.
        what: what is built, and how long it takes, for a plan.
        nbytes: what it takes on disk, rounded up.
    """

    models: tuple[str, ...]
    place: Callable[[], Path]
    model_path: Callable[[str], Path]
    what: str
    nbytes: int


def find(name: str) -> Family:
    """Return the family of a model.

    Raises:
        FusionBenchError: there is no such model.
    """
    for family in FAMILIES:
        if name in family.models:
            return family
    known = [model for family in FAMILIES for model in family.models]
    raise FusionBenchError(f"The zoo has no model '{name}'. {did_you_mean(name, known)}")


def at(place: Path) -> Family:
    """Return the family that belongs at a place."""
    return next(family for family in FAMILIES if family.place() == place)


def _images_path(model: str) -> Path:
    return zoo.model_path(model)  # as it is then: a test may have put another in its place


def _images(name: str) -> Family:
    def place() -> Path:
        return cache_dir() / "zoo" / zoo._RECIPES[name].key()

    return Family(
        tuple(model.replace(zoo.PRETRAINED, name, 1) for model in zoo.MODELS),
        place,
        _ready(place, lambda model: model.replace(name, zoo.PRETRAINED, 1), _images_path),
        "the zoo of tiny models and images, which takes 2 to 3 minutes",
        150_000_000,
    )


def _language(name: str) -> Family:
    place = partial(language.place, name)
    return Family(
        tuple(model for model in language.MODELS if model.partition("_")[0] == name),
        place,
        _ready(place, lambda model: model, language.model_path),
        f"the zoo's {name} models, which take 1 to 2 minutes",
        20_000_000,
    )


def _ready(
    place: Callable[[], Path], stored: Callable[[str], str], build: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Return what ``build`` does, which imports much, but does it only where there is nothing."""

    def model_path(model: str) -> Path:
        there = place() / "models" / stored(model)
        return there if there.is_dir() else build(model)

    return model_path


_DENSE = Family(
    dense.MODELS,
    dense.place,
    dense.model_path,
    "the zoo's dense tasks, which takes about a minute",
    150_000_000,
)

FAMILIES = (
    *map(_images, (zoo.PRETRAINED, zoo.NARROW)),
    _DENSE,
    *map(_language, language.FAMILIES),
)
"""All families."""
