"""What an image processor does, cut in two: images to bytes, once ever, and bytes to numbers."""

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Every byte in each of three channels, as an image.
_RAMP = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)


class Preprocessor:
    """An image processor of transformers, to the bit.

    Decoding, resizing and cropping give bytes, which are worth keeping. Rescaling and normalising
    map each byte of a channel to one number: a table, which is read off the processor itself.

    Args:
        image_processor: any that gives ``pixel_values``. One whose steps cannot be cut in two so
            is used as a whole, and then ``in_bytes`` is false.
    """

    def __init__(self, image_processor: Any):
        self._processor = image_processor
        self._table: Tensor | None = None
        self.in_bytes = self._read_table()

    @property
    def identity(self) -> str:
        """What identifies this preprocessing: the processor's kind and settings."""
        settings = getattr(self._processor, "to_dict", lambda: repr(self._processor))()
        kind = type(self._processor).__qualname__
        return json.dumps([kind, settings], sort_keys=True, default=str)

    def pixels(self, image: Any) -> NDArray[Any]:
        """Return what of a PIL image may be kept, of shape (channels, height, width).

        It is uint8 where ``in_bytes`` is true, and else float32 and final.
        """
        if not getattr(self._processor, "do_convert_rgb", False):
            image = image.convert("RGB")  # else the processor does it, in its own way
        if not self.in_bytes:
            return self._call(image).astype(np.float32, copy=False)
        return self._call(image, do_rescale=False, do_normalize=False)

    def finish(self, pixels: Tensor) -> Tensor:
        """Return a batch of ``pixels`` as the model takes it: float32, on the same device."""
        if self._table is None:
            return pixels
        if self._table.device != pixels.device:
            self._table = self._table.to(pixels.device)
        channels = torch.arange(3, dtype=torch.int32, device=pixels.device) * 256
        places = pixels + channels.view(3, 1, 1)
        return self._table.index_select(0, places.reshape(-1)).view(pixels.shape)

    def _read_table(self) -> bool:
        """Read the table off the processor; return whether it is all that the processor does."""
        from PIL import Image

        ramp = Image.fromarray(_RAMP)
        try:
            kept = self._call(ramp, do_rescale=False, do_normalize=False)
            table = self._call(ramp, do_resize=False, do_center_crop=False)
            if kept.dtype != np.uint8 or table.shape != (3, 16, 16):
                return False
            self._table = torch.from_numpy(table.astype(np.float32).reshape(-1))
            whole = self._call(ramp)
            again = self.finish(torch.from_numpy(kept)[None])[0]
        except (TypeError, ValueError, KeyError, RuntimeError):
            self._table = None
            return False
        exact = torch.equal(again, torch.from_numpy(whole))
        self._table = self._table if exact else None
        return exact

    def _call(self, image: Any, **options: bool) -> NDArray[Any]:
        found = self._processor(image, return_tensors="np", **options)["pixel_values"][0]
        return np.ascontiguousarray(found)
