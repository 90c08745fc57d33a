"""Any image-classification dataset as images and labels, its columns found by their type."""

import hashlib
import io
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion_bench.addresses import AddressError, Folders
from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.taskpool.described import names_no_split
from fusion_bench.tasks import Task, readable

if TYPE_CHECKING:
    from datasets import Dataset, Features

#: Names under which datasets without a ClassLabel feature keep their labels.
_LABEL_NAMES = ("label", "labels", "cls", "target")


#: What Pillow may take bytes for; of all that it knows, some start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: How many images are looked for in another dataset.
_COMPARED = 200


class Columns:
    """The columns of a dataset that hold images and labels, and what the labels stand for.

    Args:
        name: the task's name, for messages.
        features: the columns' types.
        task: what is known of the dataset beyond its features.
        key: the dataset's place in the config, for messages.

    Attributes:
        image_column: a column's name.
        label_column: likewise.
        class_names: in the order of the labels.

    Raises:
        FusionBenchError: no image or label column, or class names that are not as many as the
            classes.
    """

    def __init__(self, name: str, features: "Features", task: Task, key: str):
        self._key = key
        self._override = f"taskpool.tasks.{name}"
        self._features = features
        self.image_column = self._find_image_column(task.image_column)
        self.label_column = self._find_label_column(task.label_column)
        self.class_names = self._find_class_names(task)

    def _find_image_column(self, override: str | None) -> str:
        from datasets import Image

        if override is not None:
            return self._existing(override, "image_column")
        found = [n for n, feature in self._features.items() if isinstance(feature, Image)]
        if len(found) == 1 or "image" in found:
            return "image" if "image" in found else found[0]
        raise self._no_column("image", "Image", found)

    def _find_label_column(self, override: str | None) -> str:
        from datasets import ClassLabel, Value

        if override is not None:
            return self._existing(override, "label_column")
        features = self._features
        found = [n for n, feature in features.items() if isinstance(feature, ClassLabel)]
        if len(found) == 1 or "label" in found:
            return "label" if "label" in found else found[0]
        if not found:
            for name in _LABEL_NAMES:
                if isinstance(features.get(name), Value):
                    return name
        raise self._no_column("label", "ClassLabel", found)

    def _existing(self, column: str, field: str) -> str:
        if column not in self._features:
            raise FusionBenchError(
                f"{self._override}.{field}: the dataset has no column '{column}'. "
                + did_you_mean(column, self._features)
            )
        return column

    def _no_column(self, kind: str, feature: str, found: list[str]) -> FusionBenchError:
        columns = ", ".join(
            f"{name} ({getattr(f, 'dtype', type(f).__name__)})"
            for name, f in self._features.items()
        )
        return FusionBenchError(
            f"{self._key}: {'several' if found else 'no'} {kind} columns "
            f"of type {feature} among: {columns}. "
            f"Name the one to use: '{self._override}.{kind}_column: …'."
        )

    def _find_class_names(self, task: Task) -> list[str]:
        own = getattr(self._features[self.label_column], "names", None)
        if task.class_names is None and own is None:
            raise FusionBenchError(
                f"{self._key}: the column '{self.label_column}' does not name its classes. "
                f"List them in label order: '{self._override}.class_names: […]'."
            )
        names = list(task.class_names or [readable(name) for name in own or []])
        if own is not None and len(own) != len(names):
            raise FusionBenchError(
                f"{self._key}: the dataset has {len(own)} classes, the class names are "
                f"{len(names)}. List as many: '{self._override}.class_names: […]'."
            )
        return names


class LabelledImages:
    """A dataset's images and labels.

    Args:
        name: the task's name, for messages.
        dataset: one split, with an image column and a label column.
        task: what is known of the dataset beyond its features.
        key: the dataset's place in the config, for messages.
        folders: where files lie that the dataset names instead of holding them.

    Raises:
        FusionBenchError: no single split, no image or label column, labels outside the class
            names, a table that is not the dataset's.
    """

    def __init__(
        self,
        name: str,
        dataset: "Dataset",
        task: Task,
        key: str | None = None,
        folders: Folders = Folders(),  # noqa: B008, frozen
    ):
        self._key = key or f"taskpool.test_datasets.{name}"
        self._override = f"taskpool.tasks.{name}"
        if isinstance(dataset, dict):
            raise names_no_split(self._key, dataset)
        for table in dataset.cache_files:
            folders.refuse_outside(table["filename"])
        self.dataset = dataset
        self._folders = folders
        columns = Columns(name, dataset.features, task, self._key)
        self.image_column = columns.image_column
        self.label_column = columns.label_column
        self.class_names = columns.class_names
        self.labels = self._checked_labels()
        self._images = _undecoded(dataset.select_columns(self.image_column), self.image_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Any:
        """Return a sample's PIL image, decoded.

        Raises:
            FusionBenchError: an image that cannot be decoded.
        """
        stored = self._images[index][self.image_column]
        try:
            image = _decoded(self._bytes(stored)) if isinstance(stored, dict) else stored
            image.load()
        except (OSError, AttributeError, AddressError) as error:
            raise FusionBenchError(
                f"{self._key}: sample {index} holds no readable image ({error})."
            ) from error
        mode = getattr(self.dataset.features[self.image_column], "mode", None)
        return image if mode is None else image.convert(mode)

    def _bytes(self, stored: dict[str, Any]) -> bytes:
        """Return the bytes of a picture as the dataset holds it: themselves, or a file's name."""
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        if stored.get("path") is None:
            raise OSError("there is none")
        return self._folders.picture(stored["path"])

    @cached_property
    def fingerprint(self) -> str:
        """What ``datasets`` knows the split's content by.

        Where the split names image files instead of holding them, their sizes and times count too:
        ``datasets`` does not notice when they change.
        """
        known = str(self.dataset._fingerprint)
        files = self._image_files()
        if not files:
            return known
        states = "".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
        return f"{known}-{hashlib.sha256(states.encode()).hexdigest()[:16]}"

    def share_within(self, other: "LabelledImages") -> float:
        """Return about how many of the images, as a share, are among ``other``'s too.

        They are compared as they are stored, bytes or names of files, and of this dataset only a
        sample. Only images of one length are read.
        """
        mine, theirs = self._encoded(), other._encoded()
        drawn = np.random.default_rng(0).permutation(len(self))[:_COMPARED]
        alike = np.flatnonzero(np.isin(theirs.lengths, mine.lengths[drawn]))
        known = {theirs.content(index) for index in alike}
        return sum(mine.content(index) in known for index in drawn) / len(drawn)

    def _encoded(self) -> "_Encoded":
        table = self.dataset.select_columns(self.image_column).with_format("arrow")[:]
        return _Encoded(table.column(self.image_column))

    def _image_files(self) -> list[Path]:
        """Return the local files that images are read from, where the split does not hold them."""
        files: set[str] = set()
        for chunk in self.dataset.data.column(self.image_column).chunks:
            fields = {field.name for field in chunk.type} if chunk.type.num_fields else set()
            if {"bytes", "path"} <= fields and (
                outside := chunk.field("bytes").is_null()
            ).true_count:
                files.update(chunk.field("path").filter(outside).drop_null().to_pylist())
        return [Path(file) for file in sorted(files) if Path(file).is_file()]

    @property
    def labels_sha256(self) -> str:
        """The hash of the labels and of the number of classes."""
        return hashlib.sha256(
            f"{len(self.class_names)}:".encode() + self.labels.tobytes()
        ).hexdigest()

    def _checked_labels(self) -> NDArray[np.int64]:
        if len(self.dataset) == 0:
            raise FusionBenchError(f"{self._key}: the split holds no samples.")
        # As it is stored: what 'datasets' decodes, pictures for one, it also opens.
        column = self.dataset.select_columns(self.label_column).with_format("arrow")[:]
        labels = column.column(self.label_column).to_numpy()
        if labels.dtype.kind not in "biu":
            raise FusionBenchError(
                f"{self._key}: the labels in '{self.label_column}' are not whole numbers."
            )
        wrong = labels[(labels < 0) | (labels >= len(self.class_names))]
        if wrong.size:
            hint = " A label of -1 marks an unlabelled split." if (wrong == -1).any() else ""
            raise FusionBenchError(
                f"{self._key}: {wrong.size} labels lie outside the {len(self.class_names)} class "
                f"names, for example {int(wrong[0])}.{hint} Choose another split, or list every "
                f"class: '{self._override}.class_names: […]'."
            )
        return labels.astype(np.int64)


def _undecoded(dataset: "Dataset", column: str) -> "Dataset":
    """Return a dataset that gives bytes and names of files, and opens none itself."""
    from datasets import Image

    if isinstance(dataset.features[column], Image):
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def _decoded(data: bytes) -> Any:
    """Return the picture in ``data``, turned upright as its EXIF data says."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=_FORMATS))
    except MemoryError:
        raise
    except Exception as error:  # what Pillow raises for broken bytes is of any class
        raise OSError(" ".join(str(error).split())) from error


class _Encoded:
    """A column of images as they are stored: bytes, or the names of files."""

    def __init__(self, column: Any):
        from pyarrow import compute, types

        self._column = column
        length = compute.binary_length
        if types.is_struct(column.type):
            stored = compute.struct_field(column, "bytes")
            named = compute.struct_field(column, "path")
            # A file's name stands for its bytes; its length is told from theirs by the sign.
            lengths = compute.coalesce(length(stored), compute.negate(length(named)))
        else:
            lengths = compute.list_value_length(column)
        self.lengths: NDArray[np.int64] = lengths.to_numpy().astype(np.int64)

    def content(self, index: Any) -> bytes:
        """Return a hash of an image's bytes, or of its file's name."""
        value = self._column[int(index)].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        data = value if isinstance(value, bytes) else repr(value).encode()
        return hashlib.sha256(data).digest()
