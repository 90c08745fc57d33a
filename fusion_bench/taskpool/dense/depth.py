"""A depth for each pixel."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import check_between
from fusion_bench.results.metrics import ABSOLUTE_RELATIVE_ERROR, RMSE
from fusion_bench.taskpool.dense.data import DenseImages
from fusion_bench.taskpool.dense.measures import errors
from fusion_bench.taskpool.dense.task import DenseTask, float_dtype, plane
from fusion_bench.taskpool.images.evaluate import Measured


class DepthTask(DenseTask):
    """A depth, or another positive number, for each pixel: RMSE and absolute relative error.

    Both are means over all pixels of all samples. Pixels whose target is not a positive number do
    not count: 0 is what sensors give where they know nothing.

    Args:
        dataset: as in ``DenseTask``; so are the arguments that are not listed here.
        head: gives one number.
        target_column: holds arrays, or pictures such as PNG files of 16 bits.
        scale: what the stored numbers are multiplied by: 0.001 for millimetres, where the head
            gives metres.
    """

    kind = "depth"
    metrics = (RMSE, ABSOLUTE_RELATIVE_ERROR)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        head: Any,
        target_column: str = "depth",
        image_column: str | None = None,
        processor: Any = None,
        owner: str | None = None,
        cache_size: int | str = "50GB",
        scale: float = 1.0,
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
            channels=1,
        )
        check_between("scale", scale, 1e-12, 1e12)
        self._scale = scale

    @property
    def options(self) -> Mapping[str, Any]:
        """The scale."""
        return {"scale": self._scale}

    def target(self, images: DenseImages, index: int) -> Tensor:
        """Return the depths of a sample's pixels, float64 of shape (height, width).

        Raises:
            FusionBenchError: there is not one number for each pixel.
        """
        return torch.from_numpy(plane(images, index).astype(np.float64) * self._scale)

    def measure(self, found: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Return the sums of squared and of relative errors, each with the number of pixels."""
        return errors(found[0], target)

    def wanted(self, device: torch.device) -> Measured:
        """Return the shape and dtype of each metric's statistics."""
        return {metric.name: ((2,), float_dtype(device)) for metric in self.metrics}
