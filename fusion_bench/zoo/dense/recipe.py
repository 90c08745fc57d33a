"""What the dense family is built by, and the name that its result is kept under."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusion_bench.zoo.recipe import Recipe


@dataclass(frozen=True)
class DenseRecipe:
    """The training of the heads and of the encoders."""

    base: Recipe = field(default_factory=Recipe)
    """Of the pretrained encoder."""
    counts: tuple[int, int, int] = (250, 30, 50)
    """Scenes of each shape: train, validation, test."""
    probe_steps: int = 400
    """Of each head, on the pretrained encoder's features."""
    probe_rate: float = 3e-3
    finetune_steps: int = 150
    """Of each encoder, under its head, which stays as it is."""
    batch: int = 64
    segmentation_rate: float = 3e-4
    depth_rate: float = 6e-5
    normals_rate: float = 8e-5

    def key(self) -> str:
        """Return a name that changes with the recipe, its base and the code that follows it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        digest.update(self.base.key().encode())
        here = Path(__file__).parent
        for source in (*sorted(here.glob("*.py")), here.parents[1] / "patch_head.py"):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:12]
