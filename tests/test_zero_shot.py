from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from fusion_bench.zero_shot import ZeroShotHead, text_head

NAMES = ["abbey", "beach", "cat"]
TEMPLATES = ["a photo of a {}.", "a blurry photo of the {}.", "{}"]


def load(family: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    path = family / "models" / "base"
    return CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path)


def test_the_head_is_the_normalised_mean_of_normalised_texts(family: Path) -> None:
    model, tokenizer = load(family)
    rows = []
    for name in NAMES:
        texts = []
        for template in TEMPLATES:  # one text at a time, in float64
            tokens = tokenizer([template.format(name)], return_tensors="pt")
            with torch.no_grad():
                text = model.get_text_features(**tokens).pooler_output[0].double()
            texts.append(text / text.norm())
        mean = sum(texts) / len(texts)
        rows.append(mean / mean.norm())
    head = text_head(model, tokenizer, NAMES, TEMPLATES)
    assert head.dtype == torch.float32
    torch.testing.assert_close(head.double(), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_the_batch_size_does_not_matter(family: Path) -> None:
    model, tokenizer = load(family)
    one, all_ = (text_head(model, tokenizer, NAMES, TEMPLATES, batch_size=n) for n in (1, 256))
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_with_one_template_the_logits_are_clips_own(family: Path) -> None:
    model, tokenizer = load(family)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [f"a photo of a {name}." for name in NAMES]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=images, **tokens).logits_per_image
        classes = text_head(model, tokenizer, NAMES, TEMPLATES[:1])
        head = ZeroShotHead.of(model, classes)
        logits = head(model.vision_model(pixel_values=images).pooler_output)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_the_head_counts_in_float32(family: Path, precision: torch.dtype) -> None:
    model, tokenizer = load(family)
    head = ZeroShotHead.of(model, text_head(model, tokenizer, NAMES, TEMPLATES))
    pooled = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(precision)
    with torch.no_grad():
        expected = head(pooled.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(pooled), expected)
