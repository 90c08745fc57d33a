"""The zoo's images: cut, drawn and rendered from what installed packages ship.

No image is fetched. Every sample names its source (a region of a photograph, a font, a face, a
writer, a drawing); a source belongs to one split only.
"""

import importlib.resources
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusion_bench.zoo.tasks import CLASS_NAMES, SPLITS

SIZE = 32
"""Height and width of every image, in pixels."""


@dataclass(frozen=True)
class Split:
    """Samples of one task and split.

    ``images`` is uint8 of shape (n, SIZE, SIZE, 3), ``labels`` int64 of shape (n,), and
    ``sources`` names for each image what it was made from.
    """

    images: np.ndarray
    labels: np.ndarray
    sources: tuple[str, ...]


Sample = tuple[Image.Image, int, str]


def make(task: str) -> dict[str, Split]:
    """Return the splits of ``task``; the same images on every call."""
    splits = {}
    for split in SPLITS:
        # one stream for each split: changing the size of one leaves the others as they are
        rng = np.random.default_rng(zlib.crc32(f"{task}/{split}".encode()))
        samples = list(_MAKERS[task](split, rng))
        order = rng.permutation(len(samples))
        samples = [samples[i] for i in order]
        splits[split] = Split(
            images=np.stack([np.asarray(image.convert("RGB")) for image, _, _ in samples]),
            labels=np.array([label for _, label, _ in samples], dtype=np.int64),
            sources=tuple(source for _, _, source in samples),
        )
    return splits


def _packaged(package: str, *parts: str) -> Path:
    """Return the path of a file inside an installed package."""
    return Path(str(importlib.resources.files(package).joinpath(*parts)))


# --- handwritten digits -----------------------------------------------------------------------

# The 1,797 digits are listed writer by writer; these bounds fall between two writers.
_DIGIT_RANGES = {"train": (0, 915), "validation": (915, 1157), "test": (1157, 1797)}


def _digits(split: str, rng: np.random.Generator) -> Iterator[Sample]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in range(*_DIGIT_RANGES[split]):
        pixels = (digits.images[index] * 255 / 16).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        yield image, int(digits.target[index]), f"digit {index}"


# --- letters ----------------------------------------------------------------------------------

_FONTS = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "cmmi10",
        "cmr10",
        "cmtt10",
    ),
    "validation": ("DejaVuSansMono-Oblique", "STIXGeneralBolIta", "cmti10"),
    "test": (
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono-BoldOblique",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "cmb10",
        "cmss10",
    ),
}
_RENDERINGS = {"train": 12, "validation": 8, "test": 8}  # of each letter in each font


def _letters(split: str, rng: np.random.Generator) -> Iterator[Sample]:
    for font in _FONTS[split]:
        path = str(_packaged("matplotlib", "mpl-data", "fonts", "ttf", f"{font}.ttf"))
        for label, name in enumerate(CLASS_NAMES["letters"]):
            for _ in range(_RENDERINGS[split]):
                height = rng.uniform(0.65, 0.9) * SIZE * 4
                face = ImageFont.truetype(path, int(height * 1.3))
                mask = Image.new("L", (SIZE * 4, SIZE * 4))
                center = tuple(SIZE * 2 + rng.uniform(-6, 6, size=2))
                ImageDraw.Draw(mask).text(center, name[-1], fill=255, font=face, anchor="mm")
                mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
                yield _paint(mask, rng, back=(170, 255), front=(0, 90)), label, font


def _paint(
    mask: Image.Image,
    rng: np.random.Generator,
    back: tuple[float, float],
    front: tuple[float, float],
) -> Image.Image:
    """Shrink ``mask`` to SIZE and paint it in one random color on another, with some noise.

    ``back`` and ``front`` bound the channels of the two colors.
    """
    alpha = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS))[..., None] / 255
    ground, ink = rng.uniform(*back, size=3), rng.uniform(*front, size=3)
    pixels = ground + (ink - ground) * alpha + rng.normal(0, 5, size=(SIZE, SIZE, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# --- drawn shapes -----------------------------------------------------------------------------

_DRAWINGS = {"train": 250, "validation": 30, "test": 50}  # of each class


def _shapes(split: str, rng: np.random.Generator) -> Iterator[Sample]:
    for label, name in enumerate(CLASS_NAMES["shapes"]):
        for index in range(_DRAWINGS[split]):
            image = _paint(_shape(name, rng), rng, back=(0, 90), front=(130, 255))
            yield image, label, f"{split} {name} {index}"


def _shape(name: str, rng: np.random.Generator) -> Image.Image:
    """Return a white shape on black, four times as large as an image."""
    side = SIZE * 4
    radius = rng.uniform(0.3, 0.44) * side
    x, y = side / 2 + rng.uniform(-8, 8, size=2)
    turn = rng.uniform(-0.6, 0.6)
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        """Fill a polygon given in polar coordinates (radius as a fraction, angle)."""
        draw.polygon(
            [
                (x + radius * r * math.cos(turn + a), y + radius * r * math.sin(turn + a))
                for r, a in points
            ],
            fill=255,
        )

    def regular(corners: int) -> list[tuple[float, float]]:
        return [(1.0, 2 * math.pi * i / corners) for i in range(corners)]

    match name:
        case "circle":
            disc(x, y, radius, 255)
        case "ring":
            disc(x, y, radius, 255)
            disc(x, y, radius * rng.uniform(0.45, 0.7), 0)
        case "crescent":
            disc(x, y, radius, 255)
            shift = radius * rng.uniform(0.4, 0.6)
            disc(x + shift * math.cos(turn), y + shift * math.sin(turn), radius * 0.85, 0)
        case "triangle":
            polygon(regular(3))
        case "square":
            polygon(regular(4))
        case "star":
            polygon([(1.0 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)])
        case "cross":
            arm = rng.uniform(0.22, 0.34)
            near, wide = math.hypot(arm, arm), math.atan2(arm, 1.0)
            far = math.hypot(1.0, arm)
            polygon(
                [
                    corner
                    for quarter in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
                    for corner in (
                        (far, quarter - wide),
                        (far, quarter + wide),
                        (near, quarter + math.pi / 4),
                    )
                ]
            )
        case "heart":
            points = []
            for i in range(60):
                t = 2 * math.pi * i / 60
                u = 16 * math.sin(t) ** 3
                v = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
                points.append((math.hypot(u, v) / 17, math.atan2(v, u)))
            polygon(points)
    return mask


# --- patches of photographs -------------------------------------------------------------------

_PHOTOGRAPHS = {
    "brick wall": ("skimage.data", "brick.png"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "coins": ("skimage.data", "coins.png"),
    "printed page": ("skimage.data", "page.png"),
    "handwriting": ("skimage.data", "text.png"),
    "stained tissue": ("skimage.data", "ihc.png"),
    "starry sky": ("skimage.data", "hubble_deep_field.jpg"),
    "cat": ("skimage.data", "chelsea.png"),
    "cup of coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
_LONGEST_SIDE = 512  # larger photographs are shrunk first
_REGION = 48  # a photograph is a grid of square regions of so many pixels
_SHARES = {"train": 0.5, "validation": 0.17, "test": 0.33}  # of a photograph's regions
_PATCHES = {"train": 300, "validation": 27, "test": 50}  # of each class, at most
_STRIDE = 8  # patches start at multiples of it within their region


def regions(width: int, height: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """Share out the whole regions of a photograph; return the left and top of each, by split."""
    corners = [
        (left, top)
        for top in range(0, height - _REGION + 1, _REGION)
        for left in range(0, width - _REGION + 1, _REGION)
    ]
    order = np.random.default_rng(seed).permutation(len(corners))
    first = round(_SHARES["train"] * len(corners))
    second = first + round(_SHARES["validation"] * len(corners))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {split: [corners[i] for i in part] for split, part in parts.items()}


def _patches(task: str, mode: str) -> Callable[[str, np.random.Generator], Iterator[Sample]]:
    """Return a maker of patches in color ``mode`` from the photographs of ``task``."""

    def maker(split: str, rng: np.random.Generator) -> Iterator[Sample]:
        for label, name in enumerate(CLASS_NAMES[task]):
            with Image.open(_packaged(*_PHOTOGRAPHS[name])) as file:
                photo = file.convert(mode)
            photo.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
            offsets = range(0, _REGION - SIZE + 1, _STRIDE)
            corners = [
                (left + x, top + y)
                for left, top in regions(*photo.size, seed=zlib.crc32(name.encode()))[split]
                for x in offsets
                for y in offsets
                if not _is_flat(photo, left + x, top + y)
            ]
            chosen = rng.permutation(len(corners))[: _PATCHES[split]]
            for left, top in (corners[i] for i in chosen):
                yield _patch(photo, left, top), label, f"{name} {left},{top}"

    return maker


def _patch(photo: Image.Image, left: int, top: int) -> Image.Image:
    return photo.crop((left, top, left + SIZE, top + SIZE))


def _is_flat(photo: Image.Image, left: int, top: int) -> bool:
    """Tell whether a patch shows too little (a black border) to say which photograph it is of."""
    return float(np.asarray(_patch(photo, left, top)).std(axis=(0, 1)).max()) < 5


# --- faces ------------------------------------------------------------------------------------

_FACE_RANGES = {"train": (0, 45), "validation": (45, 60), "test": (60, 100)}


def _faces(split: str, rng: np.random.Generator) -> Iterator[Sample]:
    crops = np.load(_packaged("skimage.data", "lfw_subset.npy"), allow_pickle=False)
    faces, backgrounds = crops[:100], crops[100:]
    for index in range(*_FACE_RANGES[split]):
        face = _square(faces[index])
        for label in range(4):  # upright, left, upside-down, right: quarter turns to the left
            yield face.rotate(90 * label), label, f"face {index}"
        yield _square(backgrounds[index]), 4, f"background {index}"


def _square(pixels: np.ndarray) -> Image.Image:
    """Return grey values from 0 to 1 as an image of side SIZE."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


_MAKERS: dict[str, Callable[[str, np.random.Generator], Iterator[Sample]]] = {
    "digits": _digits,
    "letters": _letters,
    "shapes": _shapes,
    "textures": _patches("textures", "L"),
    "photos": _patches("photos", "RGB"),
    "faces": _faces,
}
