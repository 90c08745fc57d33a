"""Families of tiny language models with tasks of their own, each built when it is asked for.

Llamas and T5s answer prompts, BERTs classify. Importing this package is cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.storage import cache_dir
from fusion_bench.zoo.language.names import (
    CLASS_NAMES,
    DATASETS,
    FAMILIES,
    GENERATION,
    MODELS,
    PROSE,
    SCORED,
    TASKS,
)
from fusion_bench.zoo.language.recipe import RECIPES, LanguageRecipe
from fusion_bench.zoo.tasks import SPLITS

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = [
    "CLASS_NAMES",
    "DATASETS",
    "FAMILIES",
    "GENERATION",
    "MODELS",
    "PROSE",
    "RECIPES",
    "SCORED",
    "TASKS",
    "LanguageRecipe",
    "check_dataset",
    "check_name",
    "columns",
    "load_dataset",
    "model_path",
    "place",
]


def place(name: str, recipe: LanguageRecipe | None = None) -> Path:
    """Return where the family of one of ``MODELS`` is, or will be built."""
    family = name.partition("_")[0]
    return cache_dir() / "zoo" / f"{family}-{(recipe or RECIPES[family]).key()}"


def model_path(name: str, recipe: LanguageRecipe | None = None) -> Path:
    """Return the directory of a model with its tokenizer; builds its family where needed.

    Args:
        name: one of ``MODELS``.
        recipe: another one than the family's, of the same kind.

    Raises:
        FusionBenchError: there is no such model.
    """
    check_name(name)
    family = name.partition("_")[0]
    from fusion_bench.zoo.language.build import ensure

    return ensure(family, recipe or RECIPES[family]) / "models" / name


def check_name(name: str) -> None:
    """Refuse what is none of ``MODELS``.

    Raises:
        FusionBenchError: it is so.
    """
    if name not in MODELS:
        raise FusionBenchError(f"The zoo has no model '{name}'. {did_you_mean(name, MODELS)}")


def load_dataset(name: str, split: str = "test") -> Dataset:
    """Return a split of a data set; no model is built for it.

    Raises:
        FusionBenchError: there is no such data set or split.
    """
    check_dataset(name, split)
    from datasets import Dataset

    from fusion_bench.zoo.language.tables import rows

    return Dataset.from_list(rows(name, split), features=columns(name), split=split)


def check_dataset(name: str, split: str) -> None:
    """Refuse what ``load_dataset`` cannot return.

    Raises:
        FusionBenchError: it is so.
    """
    if name not in DATASETS:
        raise FusionBenchError(f"The zoo has no dataset '{name}'. {did_you_mean(name, DATASETS)}")
    if split not in SPLITS:
        raise FusionBenchError(
            f"The zoo's dataset '{name}' has no split '{split}'. {did_you_mean(split, SPLITS)}"
        )


def columns(name: str) -> Features:
    """Return the columns of ``load_dataset``."""
    from fusion_bench.zoo.language.tables import columns

    return columns(name)
