"""A dataset's images, and a column with an answer for each of their pixels."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError, Place, did_you_mean
from fusion_bench.taskpool.datasets import DatasetPlace, columns_sha256, refuse_unusable
from fusion_bench.taskpool.images.labelled import DatasetImages

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset, Features


class DenseImages(DatasetImages):
    """Images with targets: masks and other pictures, or arrays.

    Args:
        dataset: one split.
        columns: those of images and targets, as ``find_columns`` returns them.
        place: the dataset's.
        folders: where files lie that the dataset names instead of holding them.

    Raises:
        FusionBenchError: no sample.
    """

    def __init__(
        self, dataset: "Dataset", columns: tuple[str, str], place: DatasetPlace, folders: Folders
    ):
        image_column, self.target_column = columns
        super().__init__(dataset, image_column, place, folders)
        self.place = place
        self.has_pictures = _is_picture(dataset.features, image_column)
        self._arrays = dataset.with_format("numpy")
        self._pictures: DatasetImages | None = None
        if _is_picture(dataset.features, self.target_column):
            self._pictures = DatasetImages(dataset, self.target_column, place, folders)

    def image(self, index: int) -> "PIL.Image.Image":
        """Return a sample's image; arrays hold bytes, or numbers from 0 to 1.

        Raises:
            FusionBenchError: what is no image.
        """
        if self.has_pictures:
            return super().image(index)
        from PIL import Image

        pixels = self._array(self.image_column, index)
        if pixels.ndim == 3 and pixels.shape[0] == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise self.wrong(index, self.image_column, f"is no image: its shape is {pixels.shape}.")
        if pixels.dtype.kind == "f":
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise self.wrong(index, self.image_column, "has numbers outside of 0 to 1.")
            pixels = np.rint(pixels * 255)
        if pixels.min() < 0 or pixels.max() > 255:
            raise self.wrong(index, self.image_column, "has numbers outside of 0 to 255.")
        return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))

    def target(self, index: int) -> NDArray[Any]:
        """Return a sample's target as it is stored; of a mask with a palette, the indices.

        Raises:
            FusionBenchError: it is missing or cannot be read.
        """
        if self._pictures is not None:
            return np.asarray(self._pictures.picture(index))
        return self._array(self.target_column, index)

    @cached_property
    def targets_sha256(self) -> str:
        """The hash of all targets; of picture files that the split names, of their states."""
        known = "" if self._pictures is None else self._pictures.fingerprint
        return columns_sha256(self.dataset, [self.target_column], known)

    def wrong(self, index: int, column: str, reason: str, remedy: str = "") -> FusionBenchError:
        """Return what to raise where a sample cannot be used."""
        return self.place.refusal(f"sample {index}: '{column}' {reason}", remedy)

    def _array(self, column: str, index: int) -> NDArray[Any]:
        try:
            found = np.asarray(self._arrays[index][column])
        except (TypeError, ValueError) as error:  # a missing one, or rows of different lengths
            raise self.wrong(index, column, "is no array.") from error
        if found.dtype.kind not in "biuf":
            raise self.wrong(index, column, "is no array of numbers.")
        return found


def load_images(
    dataset: Any, given: Mapping[str, str | None], place: DatasetPlace, settings: Place, node: Any
) -> DenseImages:
    """Return the images and targets of a loaded dataset.

    Args:
        dataset: the dataset.
        given: as for ``find_columns``; so is ``settings``.
        place: the dataset's.
        settings: the place of the task.
        node: the dataset's config node, which names its folders.

    Raises:
        FusionBenchError: no single split, columns that are not there, no sample.
    """
    folders = Folders.of(node)
    refuse_unusable(dataset, place, folders)
    columns = find_columns(dataset.features, given, place, settings)
    return DenseImages(dataset, columns, place, folders)


def find_columns(
    features: "Features", given: Mapping[str, str | None], place: DatasetPlace, settings: Place
) -> tuple[str, str]:
    """Return the columns that hold the images and the targets.

    Args:
        features: all columns.
        given: ``image_column`` and ``target_column``, as far as the config names them.
        place: the dataset's.
        settings: the place of the task, whose keys they are.

    Raises:
        FusionBenchError: a column that is not there, or is not to be found.
    """
    for key, column in given.items():
        if column is not None and column not in features:
            reason = f"the dataset has no column '{column}'."
            raise FusionBenchError(reason, did_you_mean(column, features), place=(*settings, key))
    target = given["target_column"]
    assert target is not None
    image = given["image_column"]
    if image is None:
        pictures = [n for n in features if n != target and _is_picture(features, n)]
        if "image" in features and target != "image":
            pictures = ["image"]
        if len(pictures) != 1:
            raise place.refusal(
                f"{'several' if pictures else 'no'} image columns among: {', '.join(features)}.",
                "Name the one to use in the task's 'image_column'.",
            )
        image = pictures[0]
    return image, target


def _is_picture(features: "Features", column: str) -> bool:
    from datasets import Image

    return isinstance(features[column], Image)
