"""Building the dense family: its scenes, and the training of its models."""

import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss
from torch.optim import AdamW

from fusion_bench.patch_head import PatchHead
from fusion_bench.zoo import PRETRAINED, built, model_path
from fusion_bench.zoo.build import _image_processor, _own_torch, _quiet
from fusion_bench.zoo.built import Advance
from fusion_bench.zoo.dense import CLASSES, DATASET, FAMILY, TASKS, columns, place
from fusion_bench.zoo.dense.recipe import DenseRecipe
from fusion_bench.zoo.dense.scenes import Scenes, make
from fusion_bench.zoo.images import SIZE
from fusion_bench.zoo.tasks import SPLITS
from fusion_bench.zoo.train import MEAN, STD, _rates, _step

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

_CHANNELS = {"segmentation": len(CLASSES), "depth": 1, "normals": 3}

Loss = Callable[[Tensor, Tensor], Tensor]


def ensure(recipe: DenseRecipe) -> Path:
    """Return the directory of the family that ``recipe`` makes; build it if it is not there.

    Processes that ask at the same time build it once.
    """
    root = place(recipe)
    if root.is_dir():
        return root
    base = model_path(PRETRAINED, recipe.base)
    return built.ensure(
        root,
        "the zoo's dense tasks",
        "about a minute",
        len(TASKS) * (recipe.probe_steps + recipe.finetune_steps) * recipe.batch,
        lambda scratch, advance: build(scratch, base, recipe, advance),
    )


def build(
    root: Path,
    base: Path,
    recipe: DenseRecipe,
    advance: Advance = lambda task, samples: None,
) -> None:
    """Write the dataset and all models below ``root``, an empty directory.

    Args:
        root: the directory.
        base: that of the pretrained model.
        recipe: how to train.
        advance: is told what is being done.
    """
    from transformers import CLIPVisionModel

    counts = zip(SPLITS, recipe.counts, strict=True)
    scenes = {split: make(split, count) for split, count in counts}
    _write_dataset(root / "datasets" / DATASET, scenes)
    with _quiet(), _own_torch(recipe.base.seed):
        images = _normalised(scenes["train"])
        encoder = CLIPVisionModel.from_pretrained(base, attn_implementation="eager").eval()
        for task in TASKS:
            generator = torch.Generator().manual_seed(recipe.base.seed)
            targets = torch.from_numpy(getattr(scenes["train"], task))
            head, tuned = train(task, encoder, images, targets, recipe, generator, advance)
            directory = root / "models" / f"{FAMILY}_{task}"
            tuned.save_pretrained(directory)
            _image_processor().save_pretrained(directory)
            head.save(directory)
    (root / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def train(
    task: str,
    encoder: "CLIPVisionModel",
    images: Tensor,
    targets: Tensor,
    recipe: DenseRecipe,
    generator: torch.Generator,
    advance: Advance = lambda task, samples: None,
) -> tuple[PatchHead, "CLIPVisionModel"]:
    """Return a head, trained on the features of ``encoder``, and an encoder fine-tuned under it.

    The head is the same for all encoders, as a text head is: so they can be compared and merged.

    Args:
        task: one of ``TASKS``.
        encoder: the pretrained one, which stays as it is.
        images: as an encoder takes them.
        targets: an answer for each of their pixels.
        recipe: how to train.
        generator: draws the batches.
        advance: is told what is being done.
    """
    head = PatchHead(encoder.config.hidden_size, _CHANNELS[task], encoder.config.patch_size)
    with torch.no_grad():
        known = torch.cat([features(encoder, part) for part in images.split(recipe.batch)])

    def fit(module: nn.Module, inputs: Tensor, steps: int, rate: float, decay: float) -> None:
        optimizer = AdamW(module.parameters(), lr=rate, weight_decay=decay)
        for share in _rates(steps):
            batch = torch.randint(len(inputs), (recipe.batch,), generator=generator)
            found = inputs[batch] if module is head else features(tuned, inputs[batch])
            _step([optimizer], _LOSSES[task](head(found), targets[batch]), share)
            advance(task, recipe.batch)

    tuned = deepcopy(encoder).train()
    fit(head, known, recipe.probe_steps, recipe.probe_rate, 0)
    head.requires_grad_(False)
    rate = getattr(recipe, f"{task}_rate")
    fit(tuned, images, recipe.finetune_steps, rate, 0.05)
    return head.eval(), tuned.eval()


def features(encoder: Any, images: Tensor) -> Tensor:
    """Return an encoder's features of patches, (n, hidden, rows, columns)."""
    patches = encoder(pixel_values=images).last_hidden_state[:, 1:].movedim(1, -1)
    side = SIZE // encoder.config.patch_size
    found: Tensor = patches.unflatten(2, (side, side))
    return found


_LOSSES: dict[str, Loss] = {
    "segmentation": lambda found, target: cross_entropy(found, target.long()),
    "depth": lambda found, target: mse_loss(found[:, 0], target),
    "normals": lambda found, target: 1 - cosine_similarity(found, target, dim=1).mean(),
}


def _normalised(scenes: Scenes) -> Tensor:
    pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _write_dataset(directory: Path, splits: dict[str, Scenes]) -> None:
    """Write a dataset repository: one parquet file for each split."""
    import datasets

    (directory / "data").mkdir(parents=True)
    with _quiet():
        for split, scenes in splits.items():
            rows = {
                "image": [_png(pixels) for pixels in scenes.images],
                "segmentation": [_png(mask) for mask in scenes.segmentation],
                "depth": list(scenes.depth),
                "normals": list(scenes.normals),
            }
            datasets.Dataset.from_dict(rows, features=columns()).to_parquet(
                directory / "data" / f"{split}-00000-of-00001.parquet"
            )


def _png(pixels: Any) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}
