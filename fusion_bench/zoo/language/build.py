"""Building a family: the training of its models."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from fusion_bench.zoo import built
from fusion_bench.zoo.build import _own_torch, _quiet
from fusion_bench.zoo.built import Advance
from fusion_bench.zoo.language import encoders, place, writers
from fusion_bench.zoo.language.names import TASKS
from fusion_bench.zoo.language.recipe import LanguageRecipe


def ensure(family: str, recipe: LanguageRecipe) -> Path:
    """Return the directory of the family that ``recipe`` makes; build it if it is not there.

    Processes that ask at the same time build it once.
    """
    samples = recipe.pretrain_steps * recipe.pretrain_batch
    samples += len(TASKS[family]) * recipe.finetune_steps * recipe.finetune_batch
    root = place(family, recipe)
    return built.ensure(
        root,
        f"the zoo's {family} models",
        "1 to 2 minutes",
        samples,
        lambda scratch, advance: build(scratch, family, recipe, advance),
    )


def build(
    root: Path,
    family: str,
    recipe: LanguageRecipe,
    advance: Advance = lambda phase, samples: None,
) -> None:
    """Write all models of a family below ``root``, an empty directory.

    Draws no number from the caller's random generators and changes no setting of torch.
    """
    kind = encoders if recipe.kind == "bert" else writers
    with _quiet(), _own_torch(recipe.seed):
        torch.set_num_threads(1)  # faster than several, which wait for each other most of the time
        tokens = kind.new_tokenizer(recipe)
        generator = torch.Generator().manual_seed(recipe.seed)
        for task, model in kind.train(tokens, recipe, generator, advance):
            directory = root / "models" / (f"{family}_{task}" if task else family)
            model.save_pretrained(directory)
            tokens.save_pretrained(directory)
    (root / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
