"""The published CLIP suites compose from one small file a dataset and a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fusion_bench.configs import datasets, register, suites
from fusion_bench.tasks import known_tasks

CONFIG = Path(__file__).parents[2] / "config"

TA8 = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
TALL14 = [*TA8, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"]
TALL20 = [
    *TALL14,
    "cifar10",
    "food101",
    "fashion_mnist",
    "emnist_letters",
    "kmnist",
    "rendered-sst2",
]
SUITES = {"TA8": TA8, "TALL14": TALL14, "TALL20": TALL20}
ARCHITECTURES = {
    "clip-vit-base-patch32": "",
    "clip-vit-base-patch16": "_B16",
    "clip-vit-large-patch14": "_L14",
}
REPOSITORIES = {
    "sun397": "tanganke/sun397",
    "stanford-cars": "tanganke/stanford_cars",
    "resisc45": "tanganke/resisc45",
    "eurosat": "tanganke/eurosat",
    "svhn": "ufldl-stanford/svhn",
    "gtsrb": "tanganke/gtsrb",
    "mnist": "ylecun/mnist",
    "dtd": "tanganke/dtd",
    "oxford_flowers102": "dpdl-benchmark/oxford_flowers102",
    "pcam": "1aurent/PatchCamelyon",
    "fer2013": "clip-benchmark/wds_fer2013",
    "oxford-iiit-pet": "timm/oxford-iiit-pet",
    "stl10": "tanganke/stl10",
    "cifar100": "tanganke/cifar100",
    "cifar10": "tanganke/cifar10",
    "food101": "ethz/food101",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "emnist_letters": "tanganke/emnist_letters",
    "kmnist": "tanganke/kmnist",
    "rendered-sst2": "nateraw/rendered-sst2",
}

both = [(suite, architecture) for suite in SUITES for architecture in ARCHITECTURES]


@pytest.fixture(autouse=True)
def config_dir() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONFIG), version_base="1.3"):
        yield


def pool(group: str, name: str, *overrides: str) -> dict[str, Any]:
    """Compose one pool alone and return its resolved node."""
    config = compose(config_name=f"{group}/{name}", overrides=list(overrides))
    node: Any = OmegaConf.to_container(config, resolve=True)
    for key in group.split("/"):
        node = node[key]
    return dict(node)


def model_pool(suite: str, architecture: str) -> dict[str, Any]:
    return pool("modelpool/CLIPVisionModelPool", f"{architecture}_{suite}")


def task_pool(suite: str, architecture: str) -> dict[str, Any]:
    name = f"clip-vit-classification_{suite}{ARCHITECTURES[architecture]}"
    return pool("taskpool/CLIPVisionModelTaskPool", name)


def dataset(name: str, split: str) -> dict[str, str]:
    node = {"_target_": "datasets.load_dataset", "path": REPOSITORIES[name], "split": split}
    return node | ({"name": "cropped_digits"} if name == "svhn" else {})


@pytest.mark.parametrize(("suite", "architecture"), both)
def test_model_pool(suite: str, architecture: str) -> None:
    node = model_pool(suite, architecture)
    assert node.pop("_target_") == "fusion_bench.modelpool.CLIPVisionModelPool"
    assert node.pop("_recursive_") is False
    models, datasets = node.pop("models"), node.pop("train_datasets")
    assert node == {}
    assert datasets == {name: dataset(name, "train") for name in SUITES[suite]}
    assert list(models) == ["_pretrained_", *SUITES[suite]]
    assert models.pop("_pretrained_") == f"openai/{architecture}"
    assert models == {name: f"tanganke/{architecture}_{name}" for name in SUITES[suite]}


@pytest.mark.parametrize(("suite", "architecture"), both)
def test_task_pool(suite: str, architecture: str) -> None:
    node = task_pool(suite, architecture)
    assert node.pop("_target_") == "fusion_bench.taskpool.CLIPVisionModelTaskPool"
    assert node.pop("_recursive_") is False
    assert node.pop("cache") is True and node.pop("cache_size") == "50GB"
    datasets = node.pop("test_datasets")
    assert set(node.values()) == {f"openai/{architecture}"}
    assert set(node) == {"base_model", "clip_model", "processor"}
    assert list(datasets) == SUITES[suite]
    for name, entry in datasets.items():
        assert entry == dataset(name, "validation" if name == "food101" else "test")


@pytest.mark.parametrize(("suite", "architecture"), both)
def test_models_and_datasets_have_the_same_names(suite: str, architecture: str) -> None:
    models = [name for name in model_pool(suite, architecture)["models"] if name[0] != "_"]
    assert models == list(task_pool(suite, architecture)["test_datasets"])


def test_every_dataset_has_a_task_data_file_and_both_splits() -> None:
    assert sorted(TALL20) == known_tasks()
    for split in ("test", "train"):
        group = f"dataset/image_classification/{split}"
        assert sorted(name for g, name, _ in datasets() if g == group) == sorted(TALL20)


@pytest.mark.parametrize("name", TALL20)
def test_train_split(name: str) -> None:
    node = pool("dataset/image_classification/train", name)
    assert node == {name: dataset(name, "train")}


def test_every_model_names_its_own_repository() -> None:
    models = {name: node for group, name, node in suites() if group == "model/clip-vit"}
    assert len(models) == len(ARCHITECTURES) * (1 + len(TALL20))
    for name, node in models.items():
        key = name.split("_", 1)[1] if "_" in name else "_pretrained_"
        owner = "openai" if key == "_pretrained_" else "tanganke"
        assert node == {key: f"{owner}/{name}"}


def test_pools_compose_as_choices_of_their_groups() -> None:
    config = compose(
        overrides=[
            "+modelpool=CLIPVisionModelPool/clip-vit-large-patch14_TALL20",
            "+taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TALL20_L14",
            "taskpool.base_model=somewhere/else",
        ]
    )
    assert list(config.modelpool.models) == ["_pretrained_", *TALL20]
    assert list(config.taskpool.test_datasets) == TALL20
    assert config.taskpool.clip_model == config.taskpool.processor == "somewhere/else"
    assert config.taskpool.get("CLIPVisionModelTaskPool") is None


def test_a_pool_grows_and_shrinks_on_the_command_line() -> None:
    config = compose(
        overrides=[
            "+modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8",
            "+taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8",
            "+model/clip-vit@modelpool.models=clip-vit-base-patch32_cifar10",
            "+dataset/image_classification/test@taskpool.test_datasets=cifar10",
            "~modelpool.models.svhn",
            "~taskpool.test_datasets.svhn",
        ]
    )
    expected = {*TA8, "cifar10"} - {"svhn"}
    assert set(config.modelpool.models) == {"_pretrained_", *expected}
    assert set(config.taskpool.test_datasets) == expected
