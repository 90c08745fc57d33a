"""Bytes that anybody may have written as a picture: few formats, a bounded size, eight bits."""

import io
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

#: What Pillow may take bytes for. Of all that it knows, some start other programs (EPS), and most
#: are hardly ever tried. PPM is what the authors of GTSRB publish.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: Pixels of a picture; where Pillow itself gives up, too.
MOST_PIXELS = 178_956_970
#: Pillow's modes of more than eight bits a channel.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
#: Bytes at a PNG's beginning that hold its depth.
HEAD = 26


class PictureError(ValueError):
    """Bytes that are no picture, or one that is not read; its text says why."""


def decode(data: bytes) -> "Image":
    """Return the first picture in ``data``, turned upright as its EXIF data says.

    Raises:
        PictureError: no picture of one of ``FORMATS``, a broken one, or one of more than
            ``MOST_PIXELS``.
    """
    from PIL.ExifTags import Base
    from PIL.Image import DecompressionBombError
    from PIL.ImageOps import exif_transpose

    try:
        image: Image = _opened(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise DecompressionBombError
        image.load()
        if image.getexif().get(Base.Orientation) is not None:
            image = exif_transpose(image)
        return image
    except DecompressionBombError as error:
        most = f"{MOST_PIXELS / 1e6:.0f} megapixels"
        raise PictureError(f"it is larger than {most}; make it smaller") from error
    except (MemoryError, PictureError):
        raise
    except Exception as error:  # what Pillow raises for broken bytes is of any class
        raise PictureError(f"it is broken: {' '.join(str(error).split())}") from error


def is_deep(head: bytes, file: IO[bytes]) -> bool:
    """Return whether a picture has more than eight bits a channel, and they are kept on reading.

    Args:
        head: its first ``HEAD`` bytes, which are enough for nearly all pictures.
        file: all of it.
    """
    if head.startswith(b"\x89PNG"):
        depth, kind = head[24:26].ljust(2, b"\0")
        return depth == 16 and kind == 0  # in colour Pillow itself keeps the upper eight
    if not head.startswith((b"II", b"MM", b"P")):  # TIFF and PPM
        return False
    try:
        return _opened(file).mode in _DEEP
    except Exception:  # it is refused where it is used
        return False


def in_eight_bits(image: "Image") -> "tuple[Image, str | None]":
    """Return a picture with eight bits a channel, and how its values were converted, if they were.

    Pillow's own conversion, which image processors call, cuts off all above 255. Here it is the
    range of the values that decides: up to 255 they stay as they are, up to 65535 they are divided
    by 257; numbers with a point from 0 to 1 are multiplied by 255.

    Raises:
        PictureError: values of a range from which it cannot be known what is white.
    """
    from PIL import Image

    if image.mode not in _DEEP:
        return image, None
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        shades = np.rint(values * np.float32(255))
        return Image.fromarray(shades.astype(np.uint8)), "values from 0 to 1 are multiplied by 255"
    if low >= 0 and high <= 255:
        return image.convert("L"), "values up to 255 are taken as they are"
    if image.mode != "F" and low >= 0 and high <= 65535:
        shades = (values.astype(np.uint32) + 128) // 257
        said = "values from 0 to 65535 are divided by 257"
        if high < 4096:
            said += f", and it reaches {high:.0f} only: if that is white, convert it yourself"
        return Image.fromarray(shades.astype(np.uint8)), said
    raise PictureError(
        f"its values reach from {low:g} to {high:g}, which does not tell what is white; save it "
        "with 8 bits a channel"
    )


def _opened(file: IO[bytes]) -> "Image":
    """Return a picture of which no more than the header is read."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        *most, last = FORMATS
        kinds = f"{', '.join(most)} or {last}"
        raise PictureError(f"it is no {kinds} picture, or its first bytes are broken") from error
