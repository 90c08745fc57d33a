"""Any image-classification dataset as images and labels, its columns found by their type."""

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion_bench.addresses import AddressError, Folders
from fusion_bench.problems import (
    FusionBenchError,
    Place,
    did_you_mean,
    key_of,
)
from fusion_bench.taskpool.datasets import DatasetPlace, refuse_unusable
from fusion_bench.taskpool.images.classes import (
    by_name,
    class_indices,
    name_splits,
    some,
    sorted_by_number,
)
from fusion_bench.taskpool.images.pictures import HEAD, PictureError, decode, in_eight_bits, is_deep
from fusion_bench.tasks import Task, readable

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset, Features

log = logging.getLogger(__name__)

#: Names under which datasets without a ClassLabel feature keep their labels.
_LABEL_NAMES = ("label", "labels", "cls", "target")
#: Types of columns that hold text.
_TEXT = ("string", "large_string", "string_view")
_LAYOUT = (
    "Put the pictures into folders of their classes, '<split>/<class>/<picture>', or name their "
    "labels in a metadata.csv with the columns file_name and label."
)

#: How many images are looked for in another dataset.
_COMPARED = 200


class Columns:
    """The columns of a dataset that hold images and labels, and what the labels stand for.

    Args:
        name: the task's name, for messages.
        features: the columns' types.
        task: what is known of the dataset beyond its features.
        place: the dataset's.
        quiet: log nothing of how classes were matched.

    Attributes:
        image_column: a column's name.
        label_column: likewise.
        class_names: in the order of the labels; ``None`` where the labels themselves, which are
            text, name the classes, until they are read.

    Raises:
        FusionBenchError: no image or label column, or class names that are not as many as the
            classes, or cannot be matched with them; places are relative to the task pool.
    """

    def __init__(
        self,
        name: str,
        features: "Features",
        task: Task,
        place: DatasetPlace,
        quiet: bool = False,
    ):
        self._place = place
        self._say = log.debug if quiet else log.info
        self._warn = log.debug if quiet else log.warning
        self._settings: Place = ("tasks", name)
        self._class_names = f"the task pool's 'tasks.{name}.class_names'"
        self._features = features
        self._task = task
        self.image_column = self._find_image_column(task.image_column)
        self.label_column = self._find_label_column(task.label_column)
        own: list[str] | None = getattr(features[self.label_column], "names", None)
        self._text = str(getattr(features[self.label_column], "dtype", "")) in _TEXT
        self._own = None if own is None else [readable(label) for label in own]
        self.class_names = self._find_class_names(own)

    @property
    def names(self) -> list[list[str]]:
        """All that the classes are called, each list in the order of the labels."""
        return [names for names in (self.class_names, self._own) if names is not None]

    def labels(self, column: Any) -> NDArray[np.int64]:
        """Return the samples' labels, by which ``class_names`` are in order.

        Args:
            column: the label column as Arrow holds it, a ``ChunkedArray``.

        Raises:
            FusionBenchError: a sample without a label, or of no class.
        """
        if self._text:
            return self._labels_of_text(column)
        assert self.class_names is not None
        labels = column.to_numpy()
        if labels.dtype.kind not in "biu":
            raise self._place.refusal(f"the labels in '{self.label_column}' are not whole numbers.")
        wrong = labels[(labels < 0) | (labels >= len(self.class_names))]
        if wrong.size:
            hint = " A label of -1 marks an unlabelled split." if (wrong == -1).any() else ""
            raise self._place.refusal(
                f"{wrong.size} labels lie outside the {len(self.class_names)} class names, for "
                f"example {int(wrong[0])}.{hint}",
                f"Choose another split, or list every class in {self._class_names}.",
            )
        return labels.astype(np.int64)

    def _labels_of_text(self, column: Any) -> NDArray[np.int64]:
        texts = column.to_pylist()
        for sample, text in enumerate(texts):
            if text is None or not text.strip():
                raise self._place.refusal(
                    f"sample {sample} has no label in '{self.label_column}'.",
                    "Choose another split, or leave the sample out.",
                )
        kinds = sorted_by_number(set(texts))
        if self.class_names is None:
            self._warn(
                "%s: the labels are text, and the classes are the %d that occur in this split. "
                "Where it lacks some, list all in %s.",
                self._place,
                len(kinds),
                self._class_names,
            )
            indices = list(range(len(kinds)))
            self.class_names = [readable(kind) for kind in kinds]
            alike: dict[str, str] = {}
            for kind, name in zip(kinds, self.class_names, strict=True):
                if (other := alike.setdefault(name.casefold(), kind)) != kind:
                    raise self._place.refusal(
                        f"the labels {other!r} and {kind!r} are alike.",
                        f"List every class in {self._class_names}, and they become one class.",
                    )
        else:
            names, others = self.class_names, self._task.label_names or ()
            known = [list(names), *([list(others)] if others else [])]
            found = class_indices(kinds, *known, whole=False)
            if found is None:
                named = by_name(kinds, *known)
                strange = [kind for kind in kinds if kind not in named]
                raise self._place.refusal(
                    f"the labels {some(strange)} in '{self.label_column}' are not among the "
                    f"classes {some(names)}.",
                    f"List in {self._class_names} every class as the dataset calls it.",
                )
            indices = found
            if lacking := [name for i, name in enumerate(names) if i not in set(indices)]:
                self._say("%s: no sample is of the classes %s.", self._place, some(lacking))
        index = dict(zip(kinds, indices, strict=True))
        return np.array([index[text] for text in texts], dtype=np.int64)

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
                f"the dataset has no column '{column}'.",
                did_you_mean(column, self._features),
                place=(*self._settings, field),
            )
        return column

    def _no_column(self, kind: str, feature: str, found: list[str]) -> FusionBenchError:
        columns = ", ".join(
            f"{name} ({getattr(f, 'dtype', type(f).__name__)})"
            for name, f in self._features.items()
        )
        what = f"{'several' if found else 'no'} {kind} columns of type {feature}"
        if kind == "label" and list(self._features) == [self.image_column]:
            return self._place.refusal(f"{what}: there are only images.", _LAYOUT)
        key = key_of((*self._settings, f"{kind}_column"))
        return self._place.refusal(
            f"{what} among: {columns}.", f"Name the one to use in the task pool's '{key}'."
        )

    def _find_class_names(self, own: list[str] | None) -> list[str] | None:
        given = self._task.class_names
        if own is None:
            if given is None and not self._text:
                raise FusionBenchError(
                    f"missing; the column '{self.label_column}' of {self._place} does not name its "
                    "classes.",
                    "List them in label order: '{here}class_names: […]'.",
                    place=(*self._settings, "class_names"),
                )
            return None if given is None else list(given)
        if name_splits(own):
            raise self._place.refusal(
                f"its classes would be {some(own)}, which are names of splits.", _LAYOUT
            )
        if given is None:
            return self._own
        if len(own) != len(given):
            raise self._place.refusal(
                f"the dataset has {len(own)} classes, the class names are {len(given)}.",
                f"List as many in {self._class_names}.",
            )
        others = self._task.label_names
        known = [given, *([others] if others else [])]
        indices = class_indices(own, *known)
        if indices is None:
            if not self._task.by_name:
                return list(given)
            raise FusionBenchError(
                f"{self._place} calls its classes {some(own)}, and the task's class names are "
                f"{some(given)}: they cannot be matched.",
                "Take the dataset's own names with '{here}class_names=null', or list names in the "
                "order of its labels: '{here}class_names: […]'.",
                place=(*self._settings, "class_names"),
            )
        named = by_name(own, *known)
        in_order = indices == list(range(len(own)))
        pairs = [
            f"{label!r} is {given[index]!r}"
            for label, index in zip(own, indices, strict=True)
            if not (in_order and label in named)
        ]
        if pairs:
            self._say(
                "%s: classes are matched by their names: %s.", self._place, ", ".join(pairs[:5])
            )
        return [given[index] for index in indices]


class DatasetImages:
    """A dataset's images.

    Args:
        dataset: one split.
        image_column: the column that holds them.
        place: the dataset's.
        folders: where files lie that the dataset names instead of holding them.

    Raises:
        FusionBenchError: no sample.
    """

    def __init__(
        self, dataset: "Dataset", image_column: str, place: DatasetPlace, folders: Folders
    ):
        self._place = place
        self.dataset = dataset
        self._folders = folders
        self.image_column = image_column
        if len(dataset) == 0:
            raise self._place.refusal("the split holds no samples.")
        self._mode: str | None = getattr(dataset.features[image_column], "mode", None)
        self._images = _undecoded(dataset.select_columns(image_column), image_column)
        self._said: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> "PIL.Image.Image":
        """Return a sample's picture, decoded, upright, with eight bits a channel.

        Raises:
            FusionBenchError: an image that cannot be decoded.
        """
        with self._readable(index) as stored:
            image, converted = in_eight_bits(self._decoded(stored))
        if converted is not None and converted not in self._said:
            self._said.add(converted)
            log.warning(
                "%s: sample %d has more than 8 bits a channel, %s; others may have them too.",
                self._place,
                index,
                converted,
            )
        if self._mode is not None and self._mode != image.mode:
            image = image.convert(self._mode)
        return image

    def picture(self, index: int) -> "PIL.Image.Image":
        """Return a sample's picture with the values that are stored, such as those of a mask.

        Raises:
            FusionBenchError: an image that cannot be decoded.
        """
        with self._readable(index) as stored:
            return self._decoded(stored)

    @contextmanager
    def _readable(self, index: int) -> Iterator[Any]:
        """Yield what the dataset holds of a sample's picture; say which one cannot be read."""
        stored = self._images[index][self.image_column] or {}
        name = stored.get("path") if isinstance(stored, dict) else None
        try:
            yield stored
        except (OSError, AttributeError, AddressError, PictureError) as error:
            which = f"sample {index}{f', {name!r},' if name else ''}"
            raise self._place.refusal(f"{which} holds no readable image ({error}).") from error

    def _decoded(self, stored: Any) -> "PIL.Image.Image":
        return decode(self._bytes(stored)) if isinstance(stored, dict) else stored

    def _bytes(self, stored: Mapping[str, Any]) -> bytes:
        """Return the bytes of a picture as the dataset holds it: themselves, or a file's name."""
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        if stored.get("path") is None:
            raise PictureError("there is none")
        return self._folders.picture(stored["path"])

    @cached_property
    def fingerprint(self) -> str:
        """What ``datasets`` knows the split's content by.

        Where the split names image files instead of holding them, their sizes and times count too:
        ``datasets`` does not notice when they change.
        """
        known = str(self.dataset._fingerprint)
        files = self._image_files()
        if files:
            states = "".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
            known += f"-{hashlib.sha256(states.encode()).hexdigest()[:16]}"
        # An earlier version lost their contrast: what it kept of them must not be used.
        return f"{known}-deep" if self._holds_deep(files) else known

    def _holds_deep(self, files: Sequence[Path]) -> bool:
        """Return whether pictures have more than eight bits a channel, by their first bytes."""
        from pyarrow import compute, types

        for file in files:
            # What cannot be read is refused where its picture is used.
            with suppress(OSError), file.open("rb") as stream:
                head = stream.read(HEAD)
                stream.seek(0)
                if is_deep(head, stream):
                    return True
        column = self.dataset.data.column(self.image_column)
        if not types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            return False
        inside = compute.struct_field(column, "bytes")
        for index, head in enumerate(compute.binary_slice(inside, 0, HEAD).to_pylist()):
            if head and is_deep(head, io.BytesIO(inside[index].as_py())):
                return True
        return False

    def share_within(self, other: "DatasetImages") -> float:
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
        return _Encoded(arrow(self.dataset, self.image_column))

    def _image_files(self) -> list[Path]:
        """Return the local files that images are read from, where the split does not hold them."""
        files: set[str] = set()
        for chunk in self.dataset.data.column(self.image_column).chunks:
            fields = {field.name for field in chunk.type} if chunk.type.num_fields else set()
            if {"bytes", "path"} <= fields and (
                outside := chunk.field("bytes").is_null()
            ).true_count:
                files.update(chunk.field("path").filter(outside).drop_null().to_pylist())
        # Others are refused where they are used; of those not even the first bytes are read.
        own = filter(self._folders.holds, sorted(files))
        return [Path(file) for file in own if Path(file).is_file()]


class LabelledImages(DatasetImages):
    """A dataset's images and labels.

    Args:
        name: the task's name, for messages.
        dataset: one split, with an image column and a label column.
        task: what is known of the dataset beyond its features.
        place: the dataset's; by default that of the task's test dataset.
        folders: where files lie that the dataset names instead of holding them.

    Raises:
        FusionBenchError: no single split, no image or label column, labels outside the class
            names, a table that is not the dataset's; places are relative to the task pool.
    """

    def __init__(
        self,
        name: str,
        dataset: "Dataset",
        task: Task,
        place: DatasetPlace | None = None,
        folders: Folders = Folders(),  # noqa: B008, frozen
    ):
        place = place or DatasetPlace(("test_datasets", name))
        refuse_unusable(dataset, place, folders)
        columns = Columns(name, dataset.features, task, place)
        super().__init__(dataset, columns.image_column, place, folders)
        self.label_column = columns.label_column
        self.labels = columns.labels(arrow(dataset, self.label_column))
        self.names = columns.names
        self.class_names = self.names[0]
        if len(self.class_names) > 1 and (self.labels == self.labels[0]).all():
            log.warning(
                "%s: all samples are of one class, '%s'.",
                self._place,
                self.class_names[self.labels[0]],
            )

    @property
    def labels_sha256(self) -> str:
        """The hash of the labels and of the number of classes."""
        return hashlib.sha256(
            f"{len(self.class_names)}:".encode() + self.labels.tobytes()
        ).hexdigest()


def arrow(dataset: "Dataset", column: str) -> Any:
    """Return one column of a dataset as Arrow's ``ChunkedArray``."""
    return dataset.select_columns(column).with_format("arrow")[:].column(column)


def _undecoded(dataset: "Dataset", column: str) -> "Dataset":
    """Return a dataset that gives bytes and names of files, and opens none itself."""
    from datasets import Image

    if isinstance(dataset.features[column], Image):
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


class _Encoded:
    """A column of images as they are stored: bytes, or the names of files."""

    def __init__(self, column: Any):
        from pyarrow import compute, types

        self._column = column
        length = compute.binary_length
        if types.is_struct(column.type):
            stored = compute.struct_field(column, "bytes")
            named = compute.struct_field(column, "path")
            # A file's name stands for its bytes; its length is negative, to differ from theirs.
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
