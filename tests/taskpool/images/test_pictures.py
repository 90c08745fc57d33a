import io
import random
import struct
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from fusion_bench.taskpool.images import pictures
from fusion_bench.taskpool.images.pictures import HEAD, PictureError, decode, in_eight_bits, is_deep

NOISE = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
DEEP = (NOISE[..., 0].astype(np.uint16) << 8) | NOISE[..., 1]


def encoded(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, format=kind, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """Return a PNG of zeros that says to be so large; its rows are packed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"
)


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be started: neither Ghostscript nor any other."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO"])
def test_pictures_of_the_usual_formats_are_what_pillow_makes_of_them(kind: str) -> None:
    data = encoded(NOISE, kind)
    expected = Image.open(io.BytesIO(data))
    found = decode(data)
    assert found.mode == expected.mode
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert in_eight_bits(found) == (found, None)


@pytest.mark.parametrize(
    "kind", ["EPS", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "IM", "JPEG2000", "AVIF", "PDF"]
)
def test_other_formats_are_refused(kind: str) -> None:
    try:
        data = encoded(Image.fromarray(NOISE).resize((32, 32)), kind)
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write it")
    with pytest.raises(PictureError, match="is no PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM picture"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        struct.pack("<IIIIIII", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0) + bytes(4) + EPS,  # DOS EPS
        b"%PDF-1.4\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://host/x'/></svg>",
        b"\xd7\xcd\xc6\x9a" + bytes(60),  # WMF
        b"",
        b"no picture",
    ],
)
def test_what_only_claims_to_be_a_picture_is_refused_and_starts_nothing(data: bytes) -> None:
    with pytest.raises(PictureError, match="is no PNG"):
        decode(data)


def test_pillow_would_have_started_ghostscript() -> None:
    with pytest.raises(AssertionError, match=r"started.*gs"):
        Image.open(io.BytesIO(EPS)).load()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused(kind: str) -> None:
    with pytest.raises(PictureError):
        decode(encoded(NOISE, kind)[:-200])


def test_a_picture_too_large_is_refused_before_it_is_unpacked() -> None:
    """195 megapixels in a few hundred kilobytes; Pillow's own error is no OSError."""
    with pytest.raises(PictureError, match=r"larger than 179 megapixels; make it smaller"):
        decode(png(15_000, 13_000))


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 24 * 16)
    assert decode(png(16, 24)).size == (16, 24)
    with pytest.raises(PictureError, match="larger"):
        decode(png(16, 25))


def test_a_webp_that_claims_a_larger_canvas() -> None:
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = 2 * (16_382).to_bytes(3, "little")
    with pytest.raises(PictureError, match="larger"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_counts(kind: str) -> None:
    first = Image.fromarray(NOISE)
    second = Image.fromarray(255 - NOISE)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    expected = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("turned", range(1, 9))
def test_pictures_stand_upright(turned: int) -> None:
    from datasets import Image as Feature

    exif = Image.Exif()
    exif[0x0112] = turned
    data = encoded(NOISE, "JPEG", exif=exif)
    expected = Feature().decode_example({"bytes": data, "path": None})
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("seed", range(300))
def test_broken_bytes_raise_one_kind_of_error(seed: int) -> None:
    chance = random.Random(seed)
    kind = chance.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    data = bytearray(
        encoded(NOISE if chance.random() < 0.7 else DEEP, kind)
        if kind in ("PNG", "TIFF")
        else encoded(NOISE, kind)
    )
    for _ in range(chance.choice([1, 3, 20])):
        data[chance.randrange(min(len(data), chance.choice([40, 10**6])))] = chance.randrange(256)
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    try:
        image, _ = in_eight_bits(decode(bytes(data)))
        image.convert("RGB")
    except PictureError:
        pass
    is_deep(bytes(data[:HEAD]), io.BytesIO(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_contrast(kind: str) -> None:
    data = encoded(DEEP, kind)
    image, said = in_eight_bits(decode(data))
    assert image.mode == "L" and said == "values from 0 to 65535 are divided by 257"
    assert np.abs(np.asarray(image).astype(int) - (DEEP.astype(float) / 257)).max() <= 0.5
    assert np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() > 250  # as it was
    exact, _ = in_eight_bits(decode(encoded(NOISE[..., 0].astype(np.uint16) * 257, kind)))
    assert np.array_equal(np.asarray(exact), NOISE[..., 0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pictures_of_few_values_stay_as_they_were(dtype: Any) -> None:
    image = decode(encoded(NOISE[..., 0].astype(dtype), "TIFF"))
    assert image.mode != "L"
    assert np.array_equal(
        np.asarray(in_eight_bits(image)[0]), np.asarray(image.convert("RGB"))[..., 0]
    )


def test_integers_and_fractions() -> None:
    shades = NOISE[..., 0]
    for deep in (shades.astype(np.int32) * 257, (shades / 255).astype(np.float32)):
        image, said = in_eight_bits(decode(encoded(deep, "TIFF")))
        assert np.array_equal(np.asarray(image), shades) and said


def test_a_white_that_is_less_than_all_is_told() -> None:
    _, said = in_eight_bits(decode(encoded((DEEP >> 4).astype(np.uint16))))
    assert said is not None and " only: if that is white" in said


@pytest.mark.parametrize(
    "values",
    [
        NOISE[..., 0].astype(np.int32) * 2**20,
        NOISE[..., 0].astype(np.int32) - 100,
        NOISE[..., 0].astype(np.float32) * 7,
        NOISE[..., 0].astype(np.float32) / 255 - 0.5,
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
    ],
)
def test_values_that_do_not_tell_what_is_white_are_refused(values: Any) -> None:
    with pytest.raises(PictureError, match="does not tell what is white; save it with 8 bits"):
        in_eight_bits(decode(encoded(values, "TIFF")))


@pytest.mark.parametrize(
    ("picture", "kind", "deep"),
    [
        (DEEP, "PNG", True),
        (DEEP, "TIFF", True),
        (DEEP.astype(np.int32), "TIFF", True),
        (DEEP.astype(np.float32), "TIFF", True),
        (NOISE, "TIFF", False),
        (NOISE, "PNG", False),
        (NOISE[..., 0], "PNG", False),
        (NOISE, "PPM", False),
        (DEEP.astype(np.int32), "PPM", True),
        (NOISE, "JPEG", False),
        (NOISE, "WEBP", False),
    ],
)
def test_the_first_bytes_tell_depth(picture: Any, kind: str, deep: bool) -> None:
    data = encoded(picture, kind)
    assert is_deep(data[:HEAD], io.BytesIO(data)) == deep
    assert (decode(data).mode not in ("L", "RGB")) == deep


def test_that_others_tolerate_truncated_pictures_is_not_relied_on() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
