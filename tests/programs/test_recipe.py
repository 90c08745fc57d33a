"""What was made in Python is recorded as the config that makes it again."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.instantiate import instantiate
from fusion_bench.method import (
    OPCM,
    FisherMergingAlgorithm,
    LiNeSAlgorithm,
    SimpleAverageAlgorithm,
    TensorwiseAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.plain import as_method
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.programs import GridSearch
from fusion_bench.programs.recipe import recorded
from fusion_bench.schemas import targets
from fusion_bench.taskpool import GenerationTask, TaskPool
from fusion_bench.trust import find
from fusion_bench.weights import MergePolicy

#: What a run is made of; programs are the run.
PARTS = [
    name
    for name in targets()
    if name.startswith("fusion_bench.")
    and (".programs." not in name or name.endswith("GridSearch"))
    and not name.rpartition(".")[2].islower()  # functions, which load data sets
]


@pytest.mark.parametrize("target", PARTS)
def test_every_class_of_a_config_tells_its_arguments(target: str) -> None:
    own = find(target)
    kept = keeps_arguments(own.__init__).__code__
    assert is_dataclass(own) or own.__init__.__code__ is kept, "decorate its __init__"


@pytest.mark.parametrize(
    "made",
    [
        SimpleAverageAlgorithm(show_pbar=False),
        LiNeSAlgorithm(TiesMergingAlgorithm(threshold=5), alpha=0.2),
        FisherMergingAlgorithm(num_fisher_examples=7),
        OPCM(seed=3),
        GridSearch({"threshold": [10, 20]}, metric="accuracy"),
        CausalLMPool({"a": "owner/name"}, policy=MergePolicy(dtype="bfloat16")),
        TaskPool({"t": GenerationTask({"_target_": "datasets.load_dataset", "path": "x"})}),
    ],
    ids=lambda made: type(made).__name__,
)
def test_the_record_makes_the_same(made: object) -> None:
    node = recorded(made)
    assert isinstance(node, dict) and node["_target_"].startswith("fusion_bench.")
    again = instantiate(OmegaConf.to_container(OmegaConf.create(node)) | {"_recursive_": False})
    assert type(again) is type(made) and recorded(again) == node


def test_options_are_recorded() -> None:
    node: Any = recorded(LiNeSAlgorithm(TiesMergingAlgorithm(threshold=5), alpha=0.2))
    assert node["base_method"]["threshold"] == 5 and node["alpha"] == 0.2
    assert recorded(MergePolicy(dtype="bfloat16")) == {
        name: getattr(MergePolicy(), name) for name in MergePolicy.options()
    } | {"dtype": "bfloat16"}


def test_a_module_by_its_weights() -> None:
    with torch.random.fork_rng():
        one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    pool: Any = recorded(HFModelPool({"one": one, "other": other, "path": Path("x")}))
    told = pool["models"]
    assert told["one"] != told["other"] and told["path"] == "x"
    assert told["one"] == recorded(one)
    assert str(told["one"]).startswith("torch.nn.modules.linear.Linear in memory, sha256 ")


def test_fabric_as_it_settled() -> None:
    node: Any = recorded(Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    made = instantiate(node, "fabric")
    assert (made.device.type, made.world_size) == ("cpu", 1)
    assert made.strategy.precision.precision == "bf16-mixed"


class _Mine(TensorwiseAlgorithm):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor


class _Runs:
    def run(self, modelpool: object) -> object:
        return {}


def test_of_others_what_is_known() -> None:
    name = f"{__name__}._Mine"
    assert recorded(_Mine(0.5)) == name  # its argument is not known, and not made up
    assert recorded(as_method(_Runs())) == {"_target_": f"{__name__}._Runs"}
    assert recorded({"a": [torch.float32]}) == {"a": ["torch.dtype"]}
