import io
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)

from fusion_bench.taskpool.images.labelled import LabelledImages
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.tasks import Task

SQUARE = {"height": 32, "width": 32}
PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "vit": ViTImageProcessorPil(size=SQUARE),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    "convnext, large": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE, resample=3),
    "raw": ViTImageProcessorPil(size=SQUARE, do_normalize=False),
    "unscaled": ViTImageProcessorPil(size=SQUARE, do_rescale=False),
    "bytes": ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "no resizing": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
}
SIZES = [(1, 1), (3, 200), (200, 3), (31, 33), (32, 32), (64, 64), (97, 45), (45, 97), (640, 480)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGBA": (4,)}.get(mode, (3,))
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], *channels))
    made = Image.fromarray(noise.astype(np.uint8))
    return made.convert("P") if mode == "P" else made


def decoded(*images: bytes) -> LabelledImages:
    """Return encoded pictures as a dataset has them."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x"])})
    columns = {"image": [{"bytes": i, "path": None} for i in images], "label": [0] * len(images)}
    return LabelledImages("t", Dataset.from_dict(columns, features=features), Task())


def assert_exact(processor: Any, image: Image.Image, original: Image.Image | None = None) -> None:
    preprocessor = Preprocessor(processor)
    found = preprocessor.finish(torch.from_numpy(preprocessor.pixels(image))[None])
    expected = processor(original or image, return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_processor_to_the_bit(name: str, size: tuple[int, int]) -> None:
    assert_exact(PROCESSORS[name], picture(size))


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_kept_is_bytes(name: str) -> None:
    preprocessor = Preprocessor(PROCESSORS[name])
    assert preprocessor.in_bytes
    assert preprocessor.pixels(picture((50, 40))).dtype == np.uint8


@pytest.mark.parametrize("name", ["clip", "vit"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_modes(mode: str, name: str) -> None:
    file = io.BytesIO()
    picture((50, 40), mode).save(file, format="PNG")
    data = decoded(file.getvalue())
    stored = data.dataset[0]["image"]
    assert stored.mode == mode
    rgb = stored if name == "clip" else stored.convert("RGB")  # for "vit" takes nothing else
    assert_exact(PROCESSORS[name], data.image(0), rgb)


def test_a_turned_photograph() -> None:
    file, turn = io.BytesIO(), Image.Exif()
    turn[0x0112] = 6  # a quarter to the right
    picture((50, 40)).save(file, format="JPEG", exif=turn)
    data = decoded(file.getvalue())
    assert data.image(0).size == (40, 50)
    assert_exact(PROCESSORS["clip"], data.image(0), data.dataset[0]["image"])


class Centred:
    """A processor whose normalisation depends on the image."""

    def __call__(self, image: Any, return_tensors: str = "np", **options: bool) -> Any:
        pixels = np.asarray(image.resize((8, 8)), dtype=np.float64).transpose(2, 0, 1)
        found = torch.from_numpy((pixels - pixels.mean())[None])
        return {"pixel_values": found if return_tensors == "pt" else found.numpy()}


class Obstinate:
    """A processor that knows no options."""

    def __call__(self, image: Any, return_tensors: str) -> Any:
        return PROCESSORS["clip"](image, return_tensors=return_tensors)


@pytest.mark.parametrize("processor", [Centred(), Obstinate()])
def test_one_that_cannot_be_cut_in_two_is_used_whole(processor: Any) -> None:
    assert not Preprocessor(processor).in_bytes
    assert_exact(processor, picture((50, 40)))


def test_a_batch_and_an_image_are_the_same() -> None:
    preprocessor = Preprocessor(PROCESSORS["clip"])
    kept = torch.from_numpy(
        np.stack([preprocessor.pixels(picture((50 + i, 40))) for i in range(3)])
    )
    assert torch.equal(
        preprocessor.finish(kept), torch.cat([preprocessor.finish(k[None]) for k in kept])
    )


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 33}},
        {"crop_size": {"height": 32, "width": 31}},
        {"resample": 2},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 254},
        {"do_normalize": False},
        {"image_mean": [0.5, 0.4, 0.4]},
        {"image_std": [0.2, 0.2, 0.3]},
        {"do_convert_rgb": False},
    ],
)
def test_a_changed_setting_changes_the_identity(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    first = Preprocessor(CLIPImageProcessorPil(**settings)).identity
    assert first == Preprocessor(CLIPImageProcessorPil(**settings)).identity
    assert first != Preprocessor(CLIPImageProcessorPil(**(settings | change))).identity


def test_another_kind_with_the_same_settings_is_another() -> None:
    one, other = BitImageProcessorPil(), CLIPImageProcessorPil()
    assert Preprocessor(one).identity != Preprocessor(other).identity
    quick = ConvNextImageProcessorPil(crop_pct=0.9), ConvNextImageProcessorPil(crop_pct=0.8)
    assert Preprocessor(quick[0]).identity != Preprocessor(quick[1]).identity
