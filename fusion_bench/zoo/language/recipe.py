"""What a family is built by, and the name that its result is kept under."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class LanguageRecipe:
    """The sizes and the training of a family's models."""

    kind: str
    """``llama``, ``t5`` or ``bert``."""
    tied: bool = False
    """Whether a Llama's input and output embeddings are one matrix."""
    seed: int = 0
    width: int = 96
    layers: int = 3

    samples: int = 3000
    """Of each task that training sees, at most."""
    pretrain_steps: int = 500
    pretrain_batch: int = 50
    pretrain_rate: float = 3e-3
    """Of what is no matrix of a layer."""
    probe_steps: int = 300
    """Of an encoder's head, on the pretrained encoder's features."""
    finetune_steps: int = 120
    finetune_batch: int = 32
    finetune_rate: float = 7e-4

    def key(self) -> str:
        """Return a name that changes with the recipe and with the code that follows it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        here = Path(__file__).parent
        shared = (here.parent / "build.py", here.parent / "train.py")
        for source in (*sorted(here.glob("*.py")), *shared):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:12]


RECIPES: dict[str, LanguageRecipe] = {
    "llama-tiny": LanguageRecipe("llama"),
    "llama-tiny-tied": LanguageRecipe("llama", tied=True),
    "t5-tiny": LanguageRecipe("t5", layers=2, pretrain_steps=1000, pretrain_rate=2e-2),
    "bert-tiny": LanguageRecipe(
        "bert",
        pretrain_steps=400,
        pretrain_batch=64,
        pretrain_rate=2e-3,
        finetune_steps=400,
        finetune_rate=5e-4,
    ),
}
"""What each family is built by."""
