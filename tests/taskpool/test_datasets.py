import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit, Value
from fixtures_clip import write_dataset
from PIL import Image as PILImage

from fusion_bench.problems import FusionBenchError
from fusion_bench.sources import with_own_tables
from fusion_bench.taskpool.datasets import describe, load_split, split_names

LOAD = "datasets.load_dataset"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("described") / "data set"
    write_dataset(place, ["cat", "dog", "emu"], splits={"train": 5, "test": 7}, info=True)
    return place


def test_a_local_directory_tells_by_its_card_and_footers(folder: Path, tmp_path: Path) -> None:
    node = {"_target_": LOAD, "path": str(folder), "split": "test"}
    found = describe(node, tmp_path)
    assert found is not None and found.features is not None
    assert dict(found.splits) == {"train": 5, "test": 7}
    assert found.features["label"].names == ["cat", "dog", "emu"]
    assert found.download == 0
    shards = sum(file.stat().st_size for file in (folder / "data").iterdir())
    assert found.prepared == shards  # as the card says


def test_without_a_card_the_parquet_footers_tell(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", ["cat", "dog"], splits={"test": 4}, info=True)
    (tmp_path / "d" / "README.md").unlink()
    found = describe({"_target_": LOAD, "path": str(tmp_path / "d"), "split": "test"})
    assert found is not None and found.features is not None
    assert dict(found.splits) == {"test": 4} and found.features["label"].names == ["cat", "dog"]


def test_folders_of_one_name_and_changed_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Where the card says the same of both, the library would read the first one's tables."""
    for place, count in (("one", 4), ("other", 6), ("other", 9)):
        folder = tmp_path / place / "data"
        if folder.exists():
            shutil.rmtree(folder)
        write_dataset(folder, ["cat", "dog"], splits={"test": count})
        node = {"_target_": LOAD, "path": str(folder), "split": "test"}
        found = describe(node)
        assert found is not None and dict(found.splits) == {"test": count}
        assert len(load_split(node)) == count
        (folder / "log.txt").write_text("no data of its own")  # is no reason to prepare it again
        own = with_own_tables(node)["cache_dir"]
        (folder / "log.txt").write_text("longer than it was before")
        assert with_own_tables(node)["cache_dir"] == own


def test_nothing_is_left_in_the_caches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scratch = tmp_path / "scratch"
    describe({"_target_": LOAD, "path": str(folder), "split": "test"}, scratch)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "tset"}, "Cannot read the dataset '{0}': it has no split 'tset'. Did you"),
        ({"split": "train[:50%]+tset[1:]"}, "it has no split 'tset'"),
        ({"split": None}, "names no split. Add 'split: …', one of: train, test."),
        ({"path": "/no/such"}, "There is no such directory: '/no/such'"),
        ({"name": "other"}, "it has no configuration 'other'"),
    ],
)
def test_mistakes(folder: Path, changes: dict[str, str], message: str) -> None:
    node = {"_target_": LOAD, "path": str(folder), "split": "test"} | changes
    with pytest.raises(FusionBenchError) as caught:
        describe(node)
    assert message.format(folder) in str(caught.value)


def test_splits_that_are_there_pass(folder: Path) -> None:
    for split in ("all", "train[:50%]+test", "train"):
        assert describe({"_target_": LOAD, "path": str(folder), "split": split})


def test_what_was_saved_to_disk(tmp_path: Path) -> None:
    features = Features({"label": ClassLabel(names=["x", "y"]), "text": Value("string")})
    rows = Dataset.from_dict({"label": [0, 1], "text": ["a", "b"]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    node = {"_target_": "datasets.load_from_disk", "dataset_path": str(tmp_path / "one")}
    found = describe(node)
    assert found is not None and found.features == features
    with pytest.raises(FusionBenchError, match="names no split"):
        describe(node | {"dataset_path": str(tmp_path / "several")})
    with pytest.raises(FusionBenchError, match="no such directory"):
        describe(node | {"dataset_path": str(tmp_path / "none")})


def test_the_zoo_is_not_built_to_be_described() -> None:
    node = {"_target_": "fusion_bench.zoo.load_dataset", "name": "shapes", "split": "test"}
    found = describe(node)
    assert found is not None and found.features is not None
    assert found.features["label"].num_classes == 8
    for wrong, message in (({"name": "shape"}, "'shapes'"), ({"split": "tset"}, "'test'")):
        with pytest.raises(FusionBenchError, match=f"Did you mean {message}"):
            describe(node | wrong)


def test_others_are_left_alone() -> None:
    assert describe({"_target_": "some.other"}) is None
    assert describe(object()) is None


def test_split_names() -> None:
    assert split_names("train[:80%] + test") == ["train", "test"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = Dataset.from_dict({"label": [0, 1, 0, 1]})
    DatasetDict({"train": rows, "test": rows.select([1, 2])}).save_to_disk(tmp_path / "several")
    Dataset.from_dict({"label": [5]}, split=NamedSplit("test")).save_to_disk(tmp_path / "one")
    return tmp_path


READ = "datasets.load_from_disk"


@pytest.mark.parametrize(
    ("split", "labels"),
    [("test", [1, 0]), ("train[:50%]", [0, 1]), ("test+train[3:]", [1, 0, 1]), ("all", None)],
)
def test_what_was_saved_as_several_splits_has_them(
    saved: Path, split: str, labels: list[int] | None
) -> None:
    node = {"_target_": READ, "dataset_path": str(saved / "several"), "split": split}
    assert describe(node)
    if labels is not None:
        assert load_split(node)["label"][:] == labels


@pytest.mark.parametrize(
    ("place", "split", "message"),
    [
        ("several", "tset", "it has no split 'tset'. Did you mean 'test'?"),
        ("several", "tset[:1]", "it has no split 'tset'"),
        ("one", "train", "holds a single dataset, which has no split 'train'. Remove the key."),
    ],
)
def test_a_split_that_was_not_saved(saved: Path, place: str, split: str, message: str) -> None:
    node = {"_target_": READ, "dataset_path": str(saved / place), "split": split}
    for look in (describe, load_split):
        with pytest.raises(FusionBenchError) as caught:
            look(node)
        assert message in str(caught.value)


def test_a_single_split_may_be_called_by_its_name(saved: Path) -> None:
    node = {"_target_": READ, "dataset_path": str(saved / "one"), "split": "test"}
    found = describe(node)
    assert found is not None and found.column is not None
    assert found.column("test", "label").to_pylist() == load_split(node)["label"][:] == [5]


def test_only_the_labels_are_read(folder: Path, saved: Path) -> None:
    for node, count in (
        ({"_target_": LOAD, "path": str(folder), "split": "test"}, 7),
        ({"_target_": READ, "dataset_path": str(saved / "several"), "split": "test"}, 2),
    ):
        found = describe(node)
        assert found is not None and found.column is not None
        assert len(found.column("test", "label")) == count


def test_files_by_split_are_described(folder: Path) -> None:
    files = {"test": str(folder / "data" / "test-*.parquet")}
    node = {"_target_": LOAD, "path": "parquet", "data_files": files, "split": "test"}
    found = describe(node)
    assert found is not None and found.features is not None
    assert dict(found.splits) == {"test": 7}


@pytest.mark.parametrize("by", ["path", "data_dir"])
def test_folders_of_pictures_tell_their_classes(tmp_path: Path, by: str) -> None:
    for split in ("train", "test"):
        for name in ("10", "9"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            PILImage.new("RGB", (4, 4)).save(place / "a.png")
    named = {"path": str(tmp_path)} if by == "path" else {"path": "imagefolder", by: str(tmp_path)}
    found = describe({"_target_": LOAD, **named, "split": "test"}, tmp_path / "scratch")
    assert found is not None and found.features is not None
    assert found.features == Features({"image": Image(), "label": ClassLabel(names=["10", "9"])})
