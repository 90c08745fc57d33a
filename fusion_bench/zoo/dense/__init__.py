"""A family of its own, built when it is asked for: an answer for each pixel of tiny scenes.

Its models are fine-tuned from the zoo's pretrained encoder. Importing this package is cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.storage import cache_dir
from fusion_bench.zoo.dense.recipe import DenseRecipe
from fusion_bench.zoo.tasks import CLASS_NAMES, SPLITS

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = ["CLASSES", "FAMILY", "MODELS", "TASKS", "DenseRecipe", "load_dataset", "model_path"]

FAMILY = "clip-tiny-dense"
"""The beginning of all models' names."""

TASKS = ("segmentation", "depth", "normals")
"""What is predicted for each pixel: a class, metres, a direction."""

MODELS = tuple(f"{FAMILY}_{task}" for task in TASKS)
"""For each task the fine-tuned vision encoder, with its head and image processor."""

CLASSES = ("ground", *CLASS_NAMES["shapes"])
"""Names of the classes of pixels, in the order of the masks' values."""

DATASET = "scenes"
"""The one dataset of all tasks."""


def columns() -> Features:
    """Return the columns of ``load_dataset``."""
    from datasets import Array2D, Array3D, Features, Image

    from fusion_bench.zoo.images import SIZE

    return Features(
        {
            "image": Image(),
            "segmentation": Image(),
            "depth": Array2D((SIZE, SIZE), "float32"),
            "normals": Array3D((3, SIZE, SIZE), "float32"),
        }
    )


def place(recipe: DenseRecipe | None = None) -> Path:
    """Return where the family is, or will be built."""
    return cache_dir() / "zoo" / f"dense-{(recipe or DenseRecipe()).key()}"


def model_path(name: str, recipe: DenseRecipe | None = None) -> Path:
    """Return the directory of one of ``MODELS``; builds the family where needed.

    Raises:
        FusionBenchError: there is no such model.
    """
    check_name(name)
    from fusion_bench.zoo.dense.build import ensure

    return ensure(recipe or DenseRecipe()) / "models" / name


def check_name(name: str) -> None:
    """Refuse what is none of ``MODELS``.

    Raises:
        FusionBenchError: it is so.
    """
    if name not in MODELS:
        raise FusionBenchError(f"The zoo has no model '{name}'. {did_you_mean(name, MODELS)}")


def load_dataset(split: str = "test", recipe: DenseRecipe | None = None) -> Dataset:
    """Return a split of the scenes: ``image``, and a column for each of ``TASKS``.

    ``segmentation`` is a mask, ``depth`` an array in metres, ``normals`` unit vectors to the right,
    down and towards the camera. Builds where needed.

    Raises:
        FusionBenchError: there is no such split.
    """
    if split not in SPLITS:
        raise FusionBenchError(
            f"The zoo's scenes have no split '{split}'. {did_you_mean(split, SPLITS)}"
        )
    from fusion_bench.zoo.build import read_dataset
    from fusion_bench.zoo.dense.build import ensure

    return read_dataset(ensure(recipe or DenseRecipe()), DATASET, split)
