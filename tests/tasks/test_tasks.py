from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fusion_bench import tasks
from fusion_bench.problems import FusionBenchError
from fusion_bench.tasks import Task, known_tasks, load_task, readable

NUM_CLASSES = {
    "sun397": 397,
    "stanford-cars": 196,
    "resisc45": 45,
    "eurosat": 10,
    "svhn": 10,
    "gtsrb": 43,
    "mnist": 10,
    "dtd": 47,
    "oxford_flowers102": 102,
    "pcam": 2,
    "fer2013": 7,
    "oxford-iiit-pet": 37,
    "stl10": 10,
    "cifar100": 100,
    "cifar10": 10,
    "food101": 101,
    "fashion_mnist": 10,
    "emnist_letters": 26,
    "kmnist": 10,
    "rendered-sst2": 2,
}

NUM_TEMPLATES = {
    "stanford-cars": 8,
    "resisc45": 18,
    "eurosat": 3,
    "gtsrb": 3,
    "dtd": 8,
    "fer2013": 6,
    "cifar10": 18,
    "cifar100": 18,
}


def test_the_data_files_are_the_twenty_canonical_tasks() -> None:
    assert known_tasks() == sorted(NUM_CLASSES)


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_a_data_file_is_valid_and_has_the_right_counts(name: str) -> None:
    task = load_task(name)
    assert task.num_classes == NUM_CLASSES[name]
    assert task.class_names is None or len(task.class_names) == task.num_classes
    assert len(set(task.templates)) == len(task.templates)
    assert len(task.templates) == NUM_TEMPLATES.get(name, len(task.templates))
    assert all("_" not in class_name for class_name in task.class_names or ())


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_a_data_file_says_where_it_comes_from(name: str) -> None:
    first_line = (Path(tasks.__file__).parent / f"{name}.yaml").read_text("utf-8").splitlines()[0]
    assert first_line.startswith("# ")


@pytest.mark.parametrize(
    ("name", "label", "class_name"),
    [
        ("eurosat", 0, "annual crop land"),
        ("eurosat", 2, "brushland or shrubland"),
        ("eurosat", 9, "lake or sea"),
        ("gtsrb", 14, "stop"),
        ("gtsrb", 17, "red circle with white horizonal stripe no entry"),
        (
            "gtsrb",
            42,
            "white circle with gray strike bar indicating no passing for trucks has ended",
        ),
        ("oxford_flowers102", 0, "pink primrose"),
        ("oxford_flowers102", 50, "petunia"),
        ("oxford_flowers102", 76, "passion flower"),
        ("oxford_flowers102", 101, "blackberry lily"),
        ("pcam", 1, "lymph node containing metastatic tumor tissue"),
        ("fer2013", 4, "neutral"),
        ("fer2013", 6, "surprised"),
        ("cifar100", 26, "crab"),
        ("cifar100", 99, "worm"),
        ("fashion_mnist", 0, "T-shirt/top"),
        ("fashion_mnist", 9, "Ankle boot"),
    ],
)
def test_class_names_stand_in_label_order(name: str, label: int, class_name: str) -> None:
    class_names = load_task(name).class_names
    assert class_names is not None
    assert class_names[label] == class_name


def test_food101_keeps_the_order_of_its_dataset() -> None:
    # the CLIP paper's list swaps neighbours, so its names must not replace the dataset's
    assert load_task("food101").class_names is None


def test_columns_are_named_where_feature_types_do_not_tell() -> None:
    assert load_task("pcam").label_column == "label"
    assert load_task("fer2013").label_column == "cls"
    assert load_task("oxford-iiit-pet").label_column == "label"
    assert load_task("sun397").label_column is None


@pytest.mark.parametrize("name", ["Stanford_Cars", "stanford-cars", "STANFORD-CARS"])
def test_names_are_matched_loosely(name: str) -> None:
    assert load_task(name) == load_task("stanford_cars")
    assert load_task(name).num_classes == 196


@pytest.mark.parametrize("name", ["my-own-dataset", "", "../tasks/mnist", "mnist.yaml"])
def test_a_name_without_a_data_file_gives_the_default_task(name: str) -> None:
    assert load_task(name) == Task()
    assert Task().templates == ("a photo of a {}.",)


def test_overrides_lie_over_a_base() -> None:
    task = Task.from_mapping({"label_column": "kind"}, base=load_task("eurosat"))
    assert task.label_column == "kind"
    assert task.class_names == load_task("eurosat").class_names

    task = Task.from_mapping({"class_names": ["land", "water"]}, base=load_task("eurosat"))
    assert task.num_classes == 2
    assert task.templates == load_task("eurosat").templates

    task = Task.from_mapping({"class_names": None}, base=load_task("eurosat"))
    assert (task.class_names, task.num_classes) == (None, 10)


def test_overrides_may_come_from_a_hydra_config() -> None:
    config = OmegaConf.create({"templates": ["a scan of {}"], "class_names": ["a", "b"]})
    task = Task.from_mapping(config)
    assert task == Task(templates=("a scan of {}",), class_names=("a", "b"), num_classes=2)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"clas_names": ["a"]}, "clas_names: there is no such key. Did you mean 'class_names'?"),
        ({"templates": "a photo of a {}."}, "templates: 'a photo of a {}.' is not a list"),
        ({"templates": []}, "templates: [] is not a list of strings"),
        ({"templates": None}, "templates: None is not a list of strings"),
        ({"templates": ["a photo."]}, "the template 'a photo.' needs exactly one {}"),
        ({"templates": ["a {} and a {}."]}, "the template 'a {} and a {}.' needs exactly one {}"),
        ({"templates": ["a {} in {place}."]}, "needs exactly one {}"),
        ({"class_names": ["a", "b", "a"]}, "class_names: repeats 'a'"),
        ({"class_names": ["a", 7]}, "class_names: 7 is not a string: put it in quotes"),
        ({"class_names": ["on", False]}, "class_names: False is not a string"),
        ({"class_names": ["a", " "]}, "class_names: an empty string is not a name"),
        ({"class_names": {"a": 0}}, "class_names: {'a': 0} is not a list of strings"),
        ({"class_names": ["a", "b"], "num_classes": 3}, "2 class_names, but num_classes is 3"),
        ({"num_classes": "ten"}, "num_classes: 'ten' is not a positive integer"),
        ({"num_classes": 0}, "num_classes: 0 is not a positive integer"),
        ({"num_classes": True}, "num_classes: True is not a positive integer"),
        ({"label_column": 3}, "label_column: 3 is not a column name"),
    ],
)
def test_mistakes_are_refused_by_name(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionBenchError) as error:
        Task.from_mapping(mapping)
    assert message in str(error.value)


def test_a_mismatch_with_the_base_is_refused() -> None:
    with pytest.raises(FusionBenchError, match="10 class_names, but num_classes is 9"):
        Task.from_mapping({"num_classes": 9}, base=load_task("eurosat"))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("golf_course", "golf course"),
        (" sweet__pepper ", "sweet pepper"),
        ("polka-dotted", "polka-dotted"),
        ("お", "お"),
    ],
)
def test_readable_turns_a_label_into_words(label: str, words: str) -> None:
    assert readable(label) == words
