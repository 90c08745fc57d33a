import unicodedata

import pytest

from fusion_bench.taskpool.images.classes import class_indices, name_splits, sorted_by_number
from fusion_bench.tasks import load_task

FASHION = load_task("fashion_mnist").class_names or ()
SIGNS = load_task("gtsrb").class_names or ()
FLOWERS = load_task("oxford_flowers102").class_names or ()
EUROSAT = load_task("eurosat")
NUMBERS = [str(i) for i in range(43)]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["b", "a"], [["a", "b"]], [1, 0]),
        (["T_shirt_top", "ankle-boot"], [["Ankle boot", "T-shirt/top"]], [1, 0]),
        (["Sea Lake", "forest"], [["forest", "lake or sea"], ["Forest", "SeaLake"]], [1, 0]),
        (["C++", "C"], [["C", "C++"]], [1, 0]),
        ([unicodedata.normalize("NFD", "café"), "bar"], [["bar", "café"]], [1, 0]),
        (["お", "き"], [["き", "お"]], [1, 0]),
        (["0", "1", "10", "2", *"3456789"], [[*"abcdefghijk"]], [0, 1, 10, *range(2, 10)]),
        (["00002", "00000", "00001"], [["a", "b", "c"]], [2, 0, 1]),
        (["3", "1", "2"], [["a", "b", "c"]], [2, 0, 1]),
        (["01", "00"], [["0", "1"]], [1, 0]),
        # One that is left over, and several in the same order as the rest.
        (["dog", "cat", "gnu"], [["cat", "wildebeest", "dog"]], [2, 0, 1]),
        (["cat", "hound", "emu", "gnu!"], [["cat", "dog", "emu", "wildebeest"]], [0, 1, 2, 3]),
        (["a", "x", "c", "y", "e"], [[*"abcde"]], [0, 1, 2, 3, 4]),
        (["c", "x", "a", "y", "e"], [[*"abcde"]], None),
        (["a", "x", "y", "z"], [[*"abcd"]], None),
        # Nothing tells.
        (["Katze", "Hund"], [["cat", "dog"]], None),
        (["5", "6", "7"], [["a", "b", "c"]], None),
        (["0", "2"], [["a", "b"]], None),
        (["1", "01"], [["a", "b"]], None),
        (["0", "1"], [["1", "2"]], None),
        (["cat", "Cat"], [["cat", "dog"]], None),
        (["1" * 5000, "2"], [["a", "b"]], None),
    ],
)
def test_classes_are_told_by_name(
    labels: list[str], classes: list[list[str]], expected: list[int] | None
) -> None:
    assert class_indices(labels, *classes) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["b"], [1]), (["0", "2"], [0, 2]), (["3", "1"], [2, 0]), (["1", "2"], None), (["x"], None)],
)
def test_some_of_the_classes(labels: list[str], expected: list[int] | None) -> None:
    assert class_indices(labels, [*"abc"], whole=False) == expected


def test_spellings_of_one_class_are_one_where_they_are_samples() -> None:
    assert class_indices(["Cat", "cat", "dog"], ["dog", "cat"], whole=False) == [1, 1, 0]


def test_folders_of_the_canonical_tasks() -> None:
    folders = sorted(name.replace("/", "_") for name in FASHION)
    assert [FASHION[i] for i in class_indices(folders, FASHION) or ()] == sorted(FASHION)
    alphabetical = sorted(NUMBERS)
    assert class_indices(alphabetical, SIGNS) == [int(name) for name in alphabetical]
    assert class_indices([f"{i:05}" for i in range(43)], SIGNS) == list(range(43))
    ids = sorted(str(i) for i in range(1, 103))
    assert class_indices(ids, FLOWERS) == [int(name) - 1 for name in ids]
    assert EUROSAT.class_names is not None and EUROSAT.label_names is not None
    folders = ["annual crop", *EUROSAT.label_names[1:-1], "sea or lake"]  # a copy's own words
    assert class_indices(
        [*folders[:0:-1], "AnnualCrop"], EUROSAT.class_names, EUROSAT.label_names
    ) == [
        *range(9, 0, -1),
        0,
    ]


def test_published_data_sets_keep_their_order() -> None:
    """Their cards' own names: one misspelt, spaced otherwise, or with another name for a few."""
    hundred = load_task("cifar100").class_names or ()
    assert class_indices(["cra" if n == "crab" else n for n in hundred], hundred) == list(
        range(100)
    )
    fashion = ["T - shirt / top", *FASHION[1:]]
    assert class_indices(fashion, FASHION) == list(range(10))
    others = {"air plant": "ball moss", "globe flower": "globe-flower", "mallow": "tree mallow 2"}
    flowers = [others.get(name, name) for name in FLOWERS]
    assert class_indices(flowers, FLOWERS) == list(range(102))
    assert class_indices(list(SIGNS), SIGNS) == list(range(43))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["test", "train"], True),
        (["Train", "VAL"], True),
        (["test2017", "train2017", "val2017"], True),
        (["images_test", "images-train"], True),
        (["dev"], True),
        (["train", "bus"], False),
        (["bullet_train", "steam_train"], False),
        (["test_tube", "train_station"], False),
        (["detest", "contest"], False),
        ([], False),
    ],
)
def test_names_of_splits(labels: list[str], told: bool) -> None:
    assert name_splits(labels) == told


def test_numbers_are_sorted_as_numbers() -> None:
    assert sorted_by_number(["10", "9", "1"]) == ["1", "9", "10"]
    assert sorted_by_number(["b", "10", "9"]) == ["10", "9", "b"]
