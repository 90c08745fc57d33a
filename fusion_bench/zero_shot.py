"""Zero-shot classification as CLIP does it.

Radford et al., Learning transferable visual models, https://arxiv.org/abs/2103.00020
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


@torch.inference_mode()
def text_head(
    clip_model: Any,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """Return one unit vector per class, of shape (classes, projection), float32.

    Every class name goes through every template; the texts' embeddings are normalised, averaged
    over the templates and normalised again.
    """
    texts = [template.format(name) for name in class_names for template in templates]
    device = clip_model.text_projection.weight.device
    embeddings = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        pooled = clip_model.text_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).pooler_output
        embeddings.append(normalize(clip_model.text_projection(pooled).float(), dim=-1))
    per_class = torch.cat(embeddings).view(len(class_names), len(templates), -1)
    return normalize(per_class.mean(dim=1), dim=-1)


class ZeroShotHead(nn.Module):
    """From a vision encoder's pooled output to logits over the classes.

    The logits are ``logit_scale.exp()`` times the cosine between image and class.

    Args:
        projection: the visual projection, of shape (projection, hidden), float32.
        classes: a vector a class, already scaled, of shape (classes, projection), float32.
    """

    projection: Tensor
    classes: Tensor

    def __init__(self, projection: Tensor, classes: Tensor):
        super().__init__()
        self.register_buffer("projection", projection)
        self.register_buffer("classes", classes)

    @classmethod
    def of(cls, clip_model: Any, classes: Tensor) -> "ZeroShotHead":
        """Return the head of a CLIP model for unit vectors ``classes``."""
        scale = clip_model.logit_scale.detach().float().exp()
        return cls(clip_model.visual_projection.weight.detach().float(), classes * scale)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (batch, hidden) to (batch, classes), in float32 for any precision of the encoder."""
        with torch.autocast(pooled.device.type, enabled=False):
            return normalize(pooled.float() @ self.projection.T, dim=-1) @ self.classes.T
