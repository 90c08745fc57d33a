"""The embedded default: tiny CLIP models and image tasks, built on this machine at first use.

Importing this package is cheap; what it needs is imported when something is built or loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.zoo.recipe import Recipe
from fusion_bench.zoo.tasks import CLASS_NAMES, SPLITS, TASKS, TEMPLATES

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "CLASS_NAMES",
    "MODELS",
    "NARROW",
    "PRETRAINED",
    "SPLITS",
    "TASKS",
    "TEMPLATES",
    "Recipe",
    "load_dataset",
    "model_path",
]

PRETRAINED = "clip-tiny"
"""The pretrained model, a whole CLIP with its tokenizer and image processor."""

MODELS: tuple[str, ...] = (PRETRAINED, *(f"{PRETRAINED}_{task}" for task in TASKS))
"""All models: the pretrained one, and for each task its fine-tuned vision encoder."""

NARROW = f"{PRETRAINED}-narrow"
"""The same models with a vision encoder of half the width, for what depends on the size."""

_RECIPES = {PRETRAINED: Recipe(), NARROW: Recipe(width=96)}


def model_path(name: str, recipe: Recipe | None = None) -> Path:
    """Return the directory of a model in Hugging Face's layout; builds its family where needed.

    Args:
        name: one of ``MODELS``, or ``NARROW`` in the place of ``PRETRAINED``.
        recipe: another one than the family's.

    Raises:
        FusionBenchError: there is no such model.
    """
    family, underscore, task = name.partition("_")
    stored = f"{PRETRAINED}{underscore}{task}"
    if family not in _RECIPES or stored not in MODELS:
        known = [model.replace(PRETRAINED, each, 1) for each in _RECIPES for model in MODELS]
        raise FusionBenchError(f"The zoo has no model '{name}'. {did_you_mean(name, known)}")
    from fusion_bench.zoo.build import ensure

    return ensure(recipe or _RECIPES[family]) / "models" / stored


def load_dataset(name: str, split: str = "test", recipe: Recipe | None = None) -> Dataset:
    """Return a split of a task, with columns ``image`` and ``label``; builds where needed.

    Raises:
        FusionBenchError: there is no such task or split.
    """
    if name not in TASKS:
        raise FusionBenchError(f"The zoo has no dataset '{name}'. {did_you_mean(name, TASKS)}")
    if split not in SPLITS:
        raise FusionBenchError(
            f"The zoo's dataset '{name}' has no split '{split}'. {did_you_mean(split, SPLITS)}"
        )
    from fusion_bench.zoo.build import ensure, read_dataset

    return read_dataset(ensure(recipe or Recipe()), name, split)
