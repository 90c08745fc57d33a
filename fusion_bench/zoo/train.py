"""Contrastive pretraining of a tiny CLIP, and fine-tuning of its vision encoder."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    affine_grid,
    cross_entropy,
    grid_sample,
    interpolate,
    log_softmax,
    normalize,
)
from torch.optim import AdamW, Muon, Optimizer

from fusion_bench.zoo.images import SIZE
from fusion_bench.zoo.recipe import Recipe
from fusion_bench.zoo.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModel

    from fusion_bench.zero_shot import ZeroShotHead

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP normalises the three channels by."""

_PRETRAIN_DISTORTION = 0.5
_FINETUNE_DISTORTION = 0.2
_FADED_SIZE = 12  # pixels
_FADED_CONTRAST = 0.35

Advance = Callable[[int], object]
"""Called after every step with the number of images that it saw."""


def new_model(tokenizer: "CLIPTokenizer", recipe: Recipe) -> "CLIPModel":
    """Return an untrained CLIP; draws from torch's global generator."""
    from transformers import CLIPConfig, CLIPModel

    projection = 64
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_LENGTH,
            "projection_dim": projection,
            # the defaults are those of the large vocabulary, and would never match
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": recipe.width,
            "intermediate_size": 2 * recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 8,
            "projection_dim": projection,
        },
        projection_dim=projection,
        attn_implementation="eager",  # the fastest for so few patches
    )
    model = CLIPModel(config)
    for weight in _matrices(model):  # CLIP's own spread is meant for long training
        nn.init.normal_(weight, std=0.7 / math.sqrt(weight.shape[1]))
    return model


def pretrain(
    model: "CLIPModel",
    images: Tensor,
    labels: Tensor,
    captions: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Draw images and their captions together, contrastively.

    Args:
        model: trained in place; left in eval mode.
        images: uint8, (n, 3, height, width).
        labels: row of ``captions`` that describes each image, (n,).
        captions: token ids, (descriptions, wordings, length).
        recipe: tells steps and batch size.
        generator: chooses batches, wordings and distortions.
        advance: told of every step.
    """
    model.train()
    matrices = _matrices(model)
    chosen = {id(weight) for weight in matrices}
    optimizers: list[Optimizer] = [
        Muon(matrices, lr=0.02, weight_decay=0.05),
        AdamW([p for p in model.parameters() if id(p) not in chosen], lr=2e-3, weight_decay=0),
    ]
    for rate in _rates(recipe.pretrain_steps):
        batch = torch.randint(len(images), (recipe.pretrain_batch,), generator=generator)
        present, target = labels[batch].unique(return_inverse=True)
        wording = torch.randint(captions.shape[1], present.shape, generator=generator)
        image_embeddings = model.get_image_features(
            pixel_values=distort(images[batch], _PRETRAIN_DISTORTION, generator)
        ).pooler_output
        text_embeddings = model.get_text_features(
            input_ids=captions[present, wording]
        ).pooler_output
        similarity = normalize(image_embeddings, dim=-1) @ normalize(text_embeddings, dim=-1).T
        loss = _contrastive_loss(model.logit_scale.exp() * similarity, target)
        _step(optimizers, loss, rate)
        advance(len(batch))
    model.eval()


def finetune(
    encoder: "CLIPVisionModel",
    head: "ZeroShotHead",
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Train ``encoder`` in place to be evaluated well by the fixed zero-shot ``head``.

    ``images`` and ``labels`` are as for :func:`pretrain`; labels are the head's classes.
    """
    encoder.train()
    optimizers: list[Optimizer] = [
        AdamW(encoder.parameters(), lr=recipe.finetune_rate, weight_decay=0.05)
    ]
    for rate in _rates(recipe.finetune_steps):
        batch = torch.randint(len(images), (recipe.finetune_batch,), generator=generator)
        pixels = distort(images[batch], _FINETUNE_DISTORTION, generator)
        logits = head(encoder(pixel_values=pixels).pooler_output)
        _step(optimizers, cross_entropy(logits, labels[batch]), rate)
        advance(len(batch))
    encoder.eval()


def fade(images: Tensor) -> Tensor:
    """Return blurred copies of low contrast; uint8 as ``images``, of the same shape.

    Pretraining sees these alone. The sharp images of the tasks are as new to it as photographs of
    another kind are to a CLIP of real size, and in part in the same way for all tasks.
    """
    pixels = interpolate(images.float(), size=_FADED_SIZE, mode="area")
    pixels = interpolate(pixels, size=images.shape[-2:], mode="bilinear")
    return ((pixels - 127.5) * _FADED_CONTRAST + 127.5).round().to(torch.uint8)


def distort(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn, scale, shift, tint and blemish each image at random, then normalise as CLIP does.

    Args:
        images: uint8, (n, 3, height, width).
        strength: 0 leaves the images as they are.
        generator: chooses the distortions.

    Returns:
        float32 of the same shape.
    """
    pixels = images.float() / 255
    count = len(images)

    def spread(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * limit * strength

    angle, zoom, stretch, shift = spread(0.4), 1 + spread(0.3), 1 + spread(0.15), spread(0.2, 2)
    wide, high = zoom * stretch, zoom / stretch
    rows = [
        torch.stack([wide * angle.cos(), -zoom * angle.sin(), shift[:, 0]], dim=1),
        torch.stack([zoom * angle.sin(), high * angle.cos(), shift[:, 1]], dim=1),
    ]
    grid = affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    pixels = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * spread(0.6, 1, 1, 1).exp() + mean + spread(0.25, 3, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = (pixels + noise * spread(0.08, 1, 1, 1)).clamp(0, 1)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _contrastive_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CLIP's symmetric loss where several images may belong to one text.

    Args:
        logits: (images, texts); every text has an image.
        target: the text of each image, (images,).
    """
    belongs = nn.functional.one_hot(target, logits.shape[1]).T.to(logits.dtype)
    share = belongs / belongs.sum(dim=1, keepdim=True)
    text_loss = -(share * log_softmax(logits.T, dim=1)).sum(dim=1).mean()
    return (cross_entropy(logits, target) + text_loss) / 2


def _matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear layers, which is what Muon is made for."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def _rates(steps: int) -> Iterable[float]:
    """Yield each step's share of the learning rate: a short rise, then half a cosine."""
    for step in range(steps):
        yield min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _step(optimizers: Iterable[Optimizer], loss: Tensor, rate: float) -> None:
    """Take one step at ``rate`` times each optimizer's own learning rate."""
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
