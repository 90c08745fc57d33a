"""A direction for each pixel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_bench.arguments import keeps_arguments
from fusion_bench.results.metrics import MEAN_ANGLE, WITHIN_11_25
from fusion_bench.taskpool.dense.data import DenseImages
from fusion_bench.taskpool.dense.measures import angles
from fusion_bench.taskpool.dense.task import DenseTask, float_dtype, wrong_shape
from fusion_bench.taskpool.images.evaluate import Measured


class NormalsTask(DenseTask):
    """The direction of the surface at each pixel: mean angle, and how many are close.

    Lengths do not matter. Pixels whose target has no length do not count.

    Args:
        dataset: as in ``DenseTask``; so are the arguments that are not listed here.
        head: gives three numbers.
        target_column: holds arrays, (3, height, width) or (height, width, 3); or pictures, whose
            bytes 0 to 255 stand for -1 to 1 (black pixels do not count).
    """

    kind = "normals"
    metrics = (MEAN_ANGLE, WITHIN_11_25)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        head: Any,
        target_column: str = "normals",
        image_column: str | None = None,
        processor: Any = None,
        owner: str | None = None,
        cache_size: int | str = "50GB",
        name: str = "",
    ):
        super().__init__(
            dataset,
            head,
            target_column,
            image_column,
            processor,
            owner,
            cache_size,
            name,
            channels=3,
        )

    def target(self, images: DenseImages, index: int) -> Tensor:
        """Return the directions of a sample's pixels, float64 of shape (3, height, width).

        Raises:
            FusionBenchError: there are not three numbers for each pixel.
        """
        stored = images.target(index)
        found = stored if stored.ndim == 3 and stored.shape[0] == 3 else np.moveaxis(stored, -1, 0)
        if found.ndim != 3 or found.shape[0] != 3:
            raise wrong_shape(images, index, stored, "three numbers for each pixel")
        directions = found.astype(np.float64)
        if stored.dtype == np.uint8:
            directions = np.where((found == 0).all(axis=0), 0, directions / 127.5 - 1)
        return torch.from_numpy(directions)

    def measure(self, found: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Return the sum of the angles, and how many are close, each with the number of pixels."""
        return angles(found, target)

    def wanted(self, device: torch.device) -> Measured:
        """Return the shape and dtype of each metric's statistics."""
        return {metric.name: ((2,), float_dtype(device)) for metric in self.metrics}
