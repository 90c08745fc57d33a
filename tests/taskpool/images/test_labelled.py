import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.images.labelled import LabelledImages
from fusion_bench.tasks import Task, load_task

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
    return LabelledImages("t", data, Task.from_mapping(task), folders=Folders(None))


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
    assert "test_datasets.t" in text and "train, test" in text


def test_no_image_column() -> None:
    text = message(dataset([0]).remove_columns("image"))
    assert "no image column" in text and "label (int64)" in text
    assert "tasks.t.image_column" in text


def test_several_label_columns() -> None:
    data = dataset([0], other=ClassLabel(names=["x"])).rename_column("label", "kind")
    assert "tasks.t.label_column" in message(data)


def test_a_named_column_that_does_not_exist() -> None:
    assert "Did you mean 'label'?" in message(dataset([0]), label_column="lable")


def test_classes_without_names() -> None:
    assert "tasks.t.class_names" in message(dataset([0, 1], Value("int64")))


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


def stored(*pictures: dict[str, Any], mode: str | None = None) -> Dataset:
    features = Features({"image": Image(mode=mode), "label": ClassLabel(names=["x", "y"])})
    rows = [{"image": picture, "label": i % 2} for i, picture in enumerate(pictures)]
    return Dataset.from_list(rows, features=features)


def encoded(picture: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(picture).save(file, format=kind)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_picture_of_another_format_is_refused_with_its_number_and_name() -> None:
    good = {"bytes": encoded(np.zeros((4, 4, 3), np.uint8)), "path": "a.png"}
    found = images(stored(good, {"bytes": EPS, "path": "cat/b.png"}))
    with pytest.raises(FusionBenchError) as error:
        found.image(1)
    assert str(error.value) == (
        "test_datasets.t: sample 1, 'cat/b.png', holds no readable image (it is no PNG, "
        "JPEG, WEBP, GIF, BMP, TIFF or PPM picture, or its first bytes are broken)."
    )


def test_names_of_files_are_shown_without_control_characters() -> None:
    found = images(stored({"bytes": EPS, "path": "\x1b[2Jb.png"}))
    with pytest.raises(FusionBenchError) as error:
        found.image(0)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "http://127.0.0.1:9/a.png", "gone.png"])
def test_only_regular_files_are_read(path: str) -> None:
    with pytest.raises(FusionBenchError, match=r"sample 0, .* holds no readable image"):
        images(stored({"bytes": None, "path": path})).image(0)


@pytest.mark.parametrize("mode", [None, "L", "RGB"])
def test_the_columns_own_mode_holds(mode: str | None) -> None:
    data = stored({"bytes": encoded(np.full((4, 4, 3), 9, np.uint8)), "path": None}, mode=mode)
    expected = data[0]["image"]
    assert np.array_equal(np.asarray(images(data).image(0)), np.asarray(expected))


def test_deep_pictures_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    deep = np.full((4, 4), 40_000, np.uint16)
    found = images(stored(*[{"bytes": encoded(deep), "path": None}] * 3))
    for index in range(3):
        assert np.asarray(found.image(index)).max() == 156  # 40,000 / 257
    assert caplog.text.count("has more than 8 bits a channel") == 1
    assert "sample 0 has more than 8 bits a channel, values from 0 to 65535 are" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("outside", [False, True])
def test_what_was_kept_of_deep_pictures_is_not_used(
    tmp_path: Path, kind: str, outside: bool
) -> None:
    def data(picture: Any) -> Dataset:
        content = encoded(picture, kind)
        (tmp_path / "1").write_bytes(content)
        plain = {"bytes": encoded(np.zeros((4, 4, 3), np.uint8)), "path": None}
        return stored(plain, {"bytes": None if outside else content, "path": str(tmp_path / "1")})

    assert images(data(np.zeros((4, 4), np.uint16))).fingerprint.endswith("-deep")
    assert not images(data(np.zeros((4, 4), np.uint8))).fingerprint.endswith("-deep")


def strings(labels: list[Any]) -> Dataset:
    return dataset(labels, Value("string"))


def test_labels_may_be_text(caplog: pytest.LogCaptureFixture) -> None:
    found = images(strings(["red_fox", "dog", "red_fox"]))
    assert found.class_names == ["dog", "red fox"] and found.labels.tolist() == [1, 0, 1]
    assert "the classes are the 2 that occur in this split" in caplog.text
    assert "tasks.t.class_names" in caplog.text


def test_numbers_that_are_text_are_in_their_order() -> None:
    found = images(strings(["10", "9", "0"]))
    assert found.class_names == ["0", "9", "10"] and found.labels.tolist() == [2, 1, 0]


def test_text_is_matched_with_the_class_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = images(strings(["Red-Fox", "gnu", "red fox"]), class_names=["dog", "red fox", "Gnu"])
    assert found.class_names == ["dog", "red fox", "Gnu"] and found.labels.tolist() == [1, 2, 1]
    assert "no sample is of the classes 'dog'" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["cat", None], None, "sample 1 has no label"),
        (["cat", " "], ["cat"], "sample 1 has no label"),
        (["cat", "emu"], ["cat", "dog"], "the labels 'emu' in 'label' are not among the classes"),
        (["5", "6"], ["a", "b", "c"], "the labels '5', '6' in 'label' are not among"),
        (["cat", "Cat"], None, "the labels 'Cat' and 'cat' are alike"),
        (["cat", "cat "], None, "the labels 'cat' and 'cat ' are alike"),
    ],
)
def test_text_that_names_no_class(labels: list[Any], names: Any, expected: str) -> None:
    assert expected in message(strings(labels), **({"class_names": names} if names else {}))


def test_a_split_of_one_class_is_told(caplog: pytest.LogCaptureFixture) -> None:
    images(dataset([1, 1]))
    assert "all samples are of one class, 'dog'" in caplog.text


def test_folders_of_splits_are_no_classes() -> None:
    text = message(dataset([0], ClassLabel(names=["test", "train"])))
    assert "its classes would be 'test', 'train', which are names of splits" in text
    assert "<split>/<class>/<picture>" in text


def test_pictures_alone_are_told_the_layout() -> None:
    text = message(dataset([0]).remove_columns("label"))
    assert "there are only images" in text and "<split>/<class>/<picture>" in text


def named(task: str, names: list[str], **changes: Any) -> LabelledImages:
    known = Task.from_mapping(changes, base=load_task(task)) if changes else load_task(task)
    return LabelledImages(task, dataset([0, 1], ClassLabel(names=names)), known)


def test_folders_of_a_known_task_are_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    numbers = sorted(str(i) for i in range(43))
    found = named("gtsrb", numbers)
    names = load_task("gtsrb").class_names
    assert names is not None
    assert found.class_names == [names[int(number)] for number in numbers]
    assert found.labels.tolist() == [0, 1]  # as the dataset has them
    assert "classes are matched by their names: '0' is 'red and white circle 20" in caplog.text


def test_names_that_tell_nothing_are_refused_and_the_ways_out_work() -> None:
    strange = ["Klasse " + letter for letter in "abcdefghij"]
    with pytest.raises(FusionBenchError) as error:
        named("fashion_mnist", strange)
    text = str(error.value)
    assert "they cannot be matched" in text
    assert "'tasks.fashion_mnist.class_names=null'" in text
    assert named("fashion_mnist", strange, class_names=None).class_names == strange
    own = [letter * 2 for letter in "abcdefghij"]
    assert named("fashion_mnist", strange, class_names=own).class_names == own


def test_class_names_of_the_user_are_told_by_name_too() -> None:
    data = dataset([0, 1, 1], ClassLabel(names=["cat", "dog"]))
    found = images(data, class_names=["Dog", "Cat"])
    assert found.class_names == ["Cat", "Dog"] and found.labels.tolist() == [0, 1, 1]


def test_names_of_labels_go_with_names_of_classes() -> None:
    with pytest.raises(FusionBenchError, match="2 label_names, but 3 class_names"):
        Task.from_mapping({"class_names": ["a", "b", "c"], "label_names": ["x", "y"]})
    assert Task.from_mapping({"class_names": ["a"]}, base=load_task("eurosat")).label_names is None


def test_a_file_that_cannot_be_read_is_refused_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(np.zeros((4, 4, 3), np.uint8)))
    found = images(stored({"bytes": None, "path": str(tmp_path / "a.png")}))

    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert not found.fingerprint.endswith("-deep")
