"""A class for each pixel."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError
from fusion_bench.results.metrics import MEAN_IOU, PIXEL_ACCURACY
from fusion_bench.taskpool.dense.data import DenseImages
from fusion_bench.taskpool.dense.measures import overlaps
from fusion_bench.taskpool.dense.task import DenseTask, plane
from fusion_bench.taskpool.images.evaluate import Measured


class SegmentationTask(DenseTask):
    """A class for each pixel: mean IoU and pixel accuracy, from counts of pixels.

    Each class has one intersection and one union, of all samples together; a class that is neither
    there nor predicted does not count in the mean.

    Args:
        dataset: as in ``DenseTask``; so are the arguments that are not listed here.
        head: gives a logit for each class.
        target_column: holds masks: pictures or arrays of class indices.
        num_classes: the number of classes; by default the head's. A head that is a module does not
            tell it.
        ignore_index: marks pixels that do not count; ``null`` if all do.
    """

    kind = "segmentation"
    metrics = (MEAN_IOU, PIXEL_ACCURACY)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        head: Any,
        target_column: str = "segmentation",
        image_column: str | None = None,
        processor: Any = None,
        owner: str | None = None,
        cache_size: int | str = "50GB",
        num_classes: int | None = None,
        ignore_index: int | None = 255,
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
            channels=num_classes,
        )
        self._given_classes = num_classes
        self._ignore_index = ignore_index

    @property
    def options(self) -> Mapping[str, Any]:
        """The class that does not count."""
        return {"ignore_index": self._ignore_index}

    @property
    def num_classes(self) -> int:
        """The number of classes.

        Raises:
            FusionBenchError: neither config nor head tell it.
        """
        found = self.head.channels if self._given_classes is None else self._given_classes
        if found is None:
            raise FusionBenchError(
                "missing; a head that is a module does not tell it.",
                place=(*self.settings, "num_classes"),
            )
        return found

    def target(self, images: DenseImages, index: int) -> Tensor:
        """Return the classes of a sample's pixels, int64 of shape (height, width).

        Raises:
            FusionBenchError: no mask, or classes that the head does not have.
        """
        found = plane(images, index)
        mask = found.astype(np.int64)
        if found.dtype.kind == "f" and not np.array_equal(mask, found):
            raise images.wrong(index, images.target_column, "holds numbers that are not whole.")
        outside = (mask < 0) | (mask >= self.num_classes)
        if self._ignore_index is not None:
            outside &= mask != self._ignore_index
        if outside.any():
            key = ".".join(map(str, (*self.settings, "ignore_index")))
            raise images.wrong(
                index,
                images.target_column,
                f"has the class {mask[outside][0]}; there are {self.num_classes}, from 0.",
                f"If such pixels are not to count, set the task pool's '{key}'.",
            )
        return torch.from_numpy(mask)

    def measure(self, found: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Return intersections and unions, and right pixels and all."""
        return overlaps(found, target, self._ignore_index)

    def wanted(self, device: torch.device) -> Measured:
        """Return the shape and dtype of each metric's statistics: whole numbers."""
        return {
            MEAN_IOU.name: ((2 * self.num_classes,), torch.int64),
            PIXEL_ACCURACY.name: ((2,), torch.int64),
        }
