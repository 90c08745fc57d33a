"""Building a family in the cache directory: whole or not at all, and once."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from fusion_bench.progress import watched
from fusion_bench.storage import locked, whole_directory
from fusion_bench.zoo.build import _own_torch, _quiet
from fusion_bench.zoo.language import encoders, place, writers
from fusion_bench.zoo.language.names import TASKS
from fusion_bench.zoo.language.recipe import LanguageRecipe
from fusion_bench.zoo.language.train import Advance

_log = logging.getLogger(__name__)


def ensure(family: str, recipe: LanguageRecipe) -> Path:
    """Return the directory of the family that ``recipe`` makes; build it if it is not there.

    Processes that ask at the same time build it once.
    """
    root = place(family, recipe)
    if root.is_dir():
        return root
    with locked(root):
        if not root.is_dir():  # another process may have built it while this one waited
            with whole_directory(root) as scratch, _reporting(root, family, recipe) as advance:
                build(scratch, family, recipe, advance)
    return root


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


@contextmanager
def _reporting(root: Path, family: str, recipe: LanguageRecipe) -> Iterator[Advance]:
    """Show a bar on a terminal; elsewhere log one line before and one after."""
    from tqdm import tqdm

    total = recipe.pretrain_steps * recipe.pretrain_batch
    total += len(TASKS[family]) * recipe.finetune_steps * recipe.finetune_batch
    started = time.monotonic()
    shown = watched()
    if not shown:
        _log.info("Building the zoo's %s models, once, in %s: takes 1 to 2 minutes.", family, root)
    with tqdm(total=total, unit=" samples", unit_scale=True, disable=not shown, leave=False) as bar:

        def advance(phase: str, samples: int) -> None:
            bar.set_description(f"building {family}, once: {phase}", refresh=False)
            bar.update(samples)

        yield advance
    if not shown:
        _log.info("Built the zoo's %s models in %.0f s.", family, time.monotonic() - started)
