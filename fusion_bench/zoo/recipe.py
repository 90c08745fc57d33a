"""What the zoo is built by, and the name that its result is kept under."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """The sizes and the training of the zoo's models."""

    seed: int = 0
    width: int = 192  # of the vision encoder
    layers: int = 3  # of the vision encoder

    pool_per_class: int = 24
    """Training images of each class that pretraining sees; fine-tuning sees all."""
    pretrain_steps: int = 300
    pretrain_batch: int = 96
    finetune_steps: int = 200
    finetune_batch: int = 64
    finetune_rate: float = 3e-4

    def key(self) -> str:
        """Return a name that changes with the recipe and with the code that follows it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):
            if source.name != "built.py":  # which has no part in what is built
                digest.update(source.read_bytes())
        return digest.hexdigest()[:12]
