import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from fusion_bench.errors import FusionBenchError
from fusion_bench.taskpool.images import LabelledImages
from fusion_bench.tasks import Task

PICTURE = PILImage.fromarray(np.zeros((4, 4, 3), np.uint8))


def dataset(labels: list[Any], label: Any = None, **more: Any) -> Dataset:
    label = ClassLabel(names=["red_fox", "dog"]) if label is None else label
    columns: dict[str, Any] = {"image": [PICTURE] * len(labels), "label": labels}
    features: dict[str, Any] = {"image": Image(), "label": label}
    for name, feature in more.items():
        columns[name] = [PICTURE if isinstance(feature, Image) else 0] * len(labels)
        features[name] = feature
    return Dataset.from_dict(columns, features=Features(features))


def images(data: Any, **task: Any) -> LabelledImages:
    return LabelledImages("t", data, Task.from_mapping(task))


def test_columns_are_found_by_type() -> None:
    data = dataset([0, 1]).rename_columns({"image": "img", "label": "kind"})
    found = images(data)
    assert (found.image_column, found.label_column) == ("img", "kind")
    assert found.class_names == ["red fox", "dog"]
    assert found.labels.tolist() == [0, 1]


def test_usual_names_win_among_several() -> None:
    data = dataset([0, 1], mask=Image(), species=ClassLabel(names=["x", "y"]))
    found = images(data)
    assert (found.image_column, found.label_column) == ("image", "label")


def test_a_column_can_be_named() -> None:
    data = dataset([0, 1], mask=Image(), species=ClassLabel(names=["x", "y"]))
    found = images(data, image_column="mask", label_column="species")
    assert (found.image_column, found.label_column) == ("mask", "species")
    assert found.class_names == ["x", "y"]


@pytest.mark.parametrize("labels", [[True, False], [1, 0]])
def test_plain_labels_serve_where_the_classes_are_named(labels: list[Any]) -> None:
    data = dataset(labels, Value("bool" if labels[0] is True else "int64"))
    found = images(data, class_names=["no", "yes"])
    assert found.labels.tolist() == [1, 0]


def message(data: Any, **task: Any) -> str:
    with pytest.raises(FusionBenchError) as error:
        images(data, **task)
    return str(error.value)


def test_no_split() -> None:
    text = message(DatasetDict(train=dataset([0]), test=dataset([1])))
    assert "taskpool.test_datasets.t" in text and "train, test" in text


def test_no_image_column() -> None:
    text = message(dataset([0]).remove_columns("image"))
    assert "no image column" in text and "label (int64)" in text
    assert "taskpool.tasks.t.image_column" in text


def test_several_label_columns() -> None:
    data = dataset([0], other=ClassLabel(names=["x"])).rename_column("label", "kind")
    assert "taskpool.tasks.t.label_column" in message(data)


def test_a_named_column_that_does_not_exist() -> None:
    assert "Did you mean 'label'?" in message(dataset([0]), label_column="lable")


def test_classes_without_names() -> None:
    assert "taskpool.tasks.t.class_names" in message(dataset([0, 1], Value("int64")))


def test_another_number_of_class_names() -> None:
    text = message(dataset([0, 1]), class_names=["x", "y", "z"])
    assert "2 classes" in text and "3" in text


def test_labels_outside_the_classes() -> None:
    data = dataset([0, 1, 2, 7], Value("int64"))
    text = message(data, class_names=["x", "y"])
    assert "2 labels lie outside the 2 class names" in text and "2." in text


def test_unlabelled_splits() -> None:
    assert "unlabelled" in message(dataset([-1, -1]))


def test_labels_that_are_no_numbers() -> None:
    assert "whole numbers" in message(dataset([0.5], Value("float32")), class_names=["x"])


def test_an_empty_split() -> None:
    assert "no samples" in message(dataset([0]).select([]))


def test_the_fingerprint_is_the_same_for_the_same_data_alone() -> None:
    assert images(dataset([0, 1])).fingerprint == images(dataset([0, 1])).fingerprint
    assert images(dataset([0, 1])).fingerprint != images(dataset([0, 1, 1])).fingerprint


def test_the_labels_hash_counts_classes_too() -> None:
    two, three = (
        images(dataset([0, 1], Value("int64")), class_names=names)
        for names in (["x", "y"], ["x", "y", "z"])
    )
    assert two.labels_sha256 != three.labels_sha256
    assert two.labels_sha256 == images(dataset([0, 1])).labels_sha256
    assert two.labels_sha256 != images(dataset([1, 0])).labels_sha256


@pytest.mark.parametrize("content", [b"no image", None])
def test_an_unreadable_image(content: bytes | None) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["x"])})
    broken = None if content is None else {"bytes": content, "path": None}
    columns = {"image": [PICTURE, PICTURE], "label": [0, 0]}
    data = Dataset.from_dict(columns, features=features).cast_column("image", Image(decode=False))
    rows = [data[0], {"image": broken, "label": 0}]
    found = images(Dataset.from_list(rows, features=features))
    assert found.image(0).size == (4, 4)
    with pytest.raises(FusionBenchError, match=r"test_datasets\.t: sample 1 holds no readable"):
        found.image(1)


def test_a_truncated_image() -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    PILImage.fromarray(noise).save(file, format="JPEG")
    features = Features({"image": Image(), "label": ClassLabel(names=["x"])})
    row = {"image": {"bytes": file.getvalue()[:-900], "path": None}, "label": 0}
    with pytest.raises(FusionBenchError, match="sample 0 holds no readable image"):
        images(Dataset.from_list([row], features=features)).image(0)


def test_image_files_that_change_change_the_fingerprint(tmp_path: Path) -> None:
    def data() -> Dataset:
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        files = [str(tmp_path / f"{i}.png") for i in range(3)]
        return Dataset.from_dict({"image": files, "label": [0, 1, 0]}, features=features)

    for i in range(3):
        PILImage.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    first = images(data()).fingerprint
    assert images(data()).fingerprint == first
    PILImage.new("RGB", (5, 4)).save(tmp_path / "2.png")
    assert images(data()).fingerprint != first


def test_images_that_the_dataset_holds_keep_its_own_fingerprint() -> None:
    data = dataset([0, 1])
    assert images(data).fingerprint == data._fingerprint
