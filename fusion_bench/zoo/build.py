"""Building the zoo: its images, and the training of its models."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_bench.storage import cache_dir
from fusion_bench.threads import fixed_threads
from fusion_bench.zoo import PRETRAINED, built, tokenizer
from fusion_bench.zoo.built import Advance
from fusion_bench.zoo.images import SIZE, Split, make
from fusion_bench.zoo.recipe import Recipe
from fusion_bench.zoo.tasks import CLASS_NAMES, TASKS, TEMPLATES
from fusion_bench.zoo.train import MEAN, STD, fade, finetune, new_model, pretrain

if TYPE_CHECKING:
    from datasets import Dataset

_ELEMENTS = 2**20  # of each of the models, more or less


def ensure(recipe: Recipe) -> Path:
    """Return the directory of the zoo that ``recipe`` makes; build it if it is not there.

    Processes that ask at the same time build it once.
    """
    samples = recipe.pretrain_steps * recipe.pretrain_batch
    samples += len(TASKS) * recipe.finetune_steps * recipe.finetune_batch
    root = cache_dir() / "zoo" / recipe.key()
    return built.ensure(
        root,
        "the zoo of tiny CLIP models",
        "2 to 3 minutes",
        samples,
        lambda scratch, advance: build(scratch, recipe, advance),
    )


def build(root: Path, recipe: Recipe, advance: Advance = lambda phase, images: None) -> None:
    """Write all datasets and models of the zoo below ``root``, an empty directory.

    Draws no number from the caller's random generators and changes no setting of torch.
    """
    data = {}
    with _quiet(), _own_torch(recipe.seed):
        for task in TASKS:
            advance(f"images of {task}", 0)
            data[task] = make(task)
            _write_dataset(root / "datasets" / task, task, data[task])
        generator = torch.Generator().manual_seed(recipe.seed)
        base = root / "models" / PRETRAINED
        _pretrain(base, data, recipe, generator, advance)
        for task in TASKS:
            train = data[task]["train"]
            _finetune(base, root, task, train, recipe, generator, advance)
    (root / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def read_dataset(root: Path, task: str, split: str) -> "Dataset":
    """Return one split of a task of the zoo at ``root``."""
    import datasets

    with _quiet():
        return datasets.load_dataset(
            str(root / "datasets" / task), split=split, cache_dir=str(root / "arrow")
        )


def _write_dataset(directory: Path, task: str, splits: dict[str, Split]) -> None:
    """Write a dataset repository: one parquet file for each split."""
    import datasets
    from PIL import Image

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASS_NAMES[task])),
        }
    )
    (directory / "data").mkdir(parents=True)
    with _quiet():
        for split, samples in splits.items():
            encoded = []
            for pixels in samples.images:
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, format="PNG")
                encoded.append({"bytes": file.getvalue(), "path": None})
            rows = {"image": encoded, "label": samples.labels.tolist()}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(
                directory / "data" / f"{split}-00000-of-00001.parquet"
            )


def _pretrain(
    directory: Path,
    data: dict[str, dict[str, Split]],
    recipe: Recipe,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Train and save a whole CLIP, with its tokenizer and image processor."""
    names = [name for task in TASKS for name in CLASS_NAMES[task]]
    texts = [template.format(name) for name in names for template in TEMPLATES]
    tokens = tokenizer.train(texts)
    captions = tokens(texts, padding=True, return_tensors="pt")["input_ids"]
    images, labels, offset = [], [], 0
    for task in TASKS:
        pixels, classes = _tensors(data[task]["train"])
        for label in range(len(CLASS_NAMES[task])):
            pool = pixels[classes == label][: recipe.pool_per_class]
            images.append(pool)
            labels.append(torch.full((len(pool),), offset + label))
        offset += len(CLASS_NAMES[task])
    model = new_model(tokens, recipe)
    pretrain(
        model,
        fade(torch.cat(images)),
        torch.cat(labels),
        captions.view(len(names), len(TEMPLATES), -1),
        recipe,
        generator,
        lambda seen: advance("pretraining", seen),
    )
    model.save_pretrained(directory)
    tokens.save_pretrained(directory)
    _image_processor().save_pretrained(directory)


def _finetune(
    base: Path,
    root: Path,
    task: str,
    train: Split,
    recipe: Recipe,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Fine-tune and save the vision encoder of the model at ``base``."""
    from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModel

    from fusion_bench.zero_shot import ZeroShotHead, text_head

    clip = CLIPModel.from_pretrained(base)
    classes = text_head(clip, CLIPTokenizer.from_pretrained(base), CLASS_NAMES[task], TEMPLATES)
    head = ZeroShotHead.of(clip, classes.clone())
    # read as a bare encoder, so that its file keeps the key names that every reader knows
    encoder = CLIPVisionModel.from_pretrained(base, attn_implementation="eager")
    finetune(
        encoder,
        head,
        *_tensors(train),
        recipe,
        generator,
        lambda seen: advance(f"fine-tuning on {task}", seen),
    )
    directory = root / "models" / f"{PRETRAINED}_{task}"
    encoder.save_pretrained(directory)
    _image_processor().save_pretrained(directory)


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    """Return images, uint8 (n, 3, SIZE, SIZE), and labels, int64 (n,)."""
    return torch.from_numpy(split.images).permute(0, 3, 1, 2), torch.from_numpy(split.labels)


def _image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


@contextmanager
def _own_torch(seed: int) -> Iterator[None]:
    """Train on the CPU with gradients and own random numbers, whatever the caller has set."""
    with (
        fixed_threads(_ELEMENTS),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.default_generator.manual_seed(seed)  # of the CPU alone
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and advice of the libraries, and put back what was set."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets_bars = not datasets.are_progress_bars_disabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()
