"""An object that only has a run is a method too, and what says how it fuses is never passed by."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_bench.method import SimpleAverageAlgorithm, TensorwiseAlgorithm
from fusion_bench.method.base import ModuleDict
from fusion_bench.method.contract import Needs
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.plain import PlainMethod, as_method, class_name
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Weights, in_memory


def module(*values: float) -> nn.Module:
    made = nn.Linear(len(values), 1, bias=False)
    made.weight.data = torch.tensor([values], dtype=torch.float32)
    return made


POOL = ModuleDict({"a": module(1, 3), "b": module(3, 5)})


class First:
    """Returns one model's state dict, and says what it needs."""

    needs_pretrained = True
    needs_data = True
    split = "validation"
    uses_labels = True

    def run(self, modelpool: Any, data: Any = None) -> Mapping[str, Tensor]:
        assert data == {"a": 1}
        return dict(modelpool.weights("a"))


def test_what_an_object_says_it_needs() -> None:
    method = as_method(First())
    assert isinstance(method, PlainMethod) and class_name(method) == "First"
    assert method.needs == Needs(base=True, split="validation", labels=True)
    with pytest.raises(FusionBenchError, match="First needs the pretrained model"):
        method.check_pool(POOL)
    fused = method.fuse(POOL, None, {"a": 1})  # type: ignore[dict-item]
    assert isinstance(fused, Weights)
    assert fused["weight"].tolist() == [[1, 3]]


def test_what_merges_weights_needs_nothing_else() -> None:
    class Says:
        def run(self, modelpool: Any) -> Any:
            return {"x": dict(modelpool.weights("a")), "y": {"z": nn.Identity()}}

    method = as_method(Says())
    assert method.needs == Needs(weights=False)
    fused = method.fuse(POOL)
    assert isinstance(fused, Mapping)
    assert list(fused) == ["x", "y/z"] and isinstance(fused["y/z"], nn.Identity)


def test_ours_stay_what_they_are() -> None:
    method = SimpleAverageAlgorithm()
    assert as_method(method) is method and class_name(method) == "SimpleAverageAlgorithm"
    assert method.needs == Needs()


def test_a_method_of_ours_with_another_run_does_what_that_says() -> None:
    class Doubled(TensorwiseAlgorithm):
        def run(self, modelpool: Any, fabric: Any = None, data: Any = None) -> Any:
            return {key: 2 * tensor for key, tensor in modelpool.weights("a").items()}

    class Last(TensorwiseAlgorithm):
        def fuse(self, pool: Any, fabric: Any = None, data: Any = None) -> Weights:
            return pool.weights("b")  # type: ignore[no-any-return]

    doubled = as_method(Doubled()).fuse(POOL)
    assert isinstance(doubled, Weights) and doubled["weight"].tolist() == [[2, 6]]
    last = as_method(Last())
    assert isinstance(last, Last) and last.fuse(POOL)["weight"].tolist() == [[3, 5]]


def test_what_cannot_be_run_is_no_method() -> None:
    with pytest.raises(FusionBenchError, match="3 is not a method"):
        as_method(3)


class Learner(LearningAlgorithm):
    split = "train"
    needs_own_data = True

    def learn(self, pool: Any, fabric: Any, data: Any) -> Weights:
        return SimpleAverageAlgorithm().fuse(pool)  # type: ignore[return-value]


def test_what_learns_asks_for_data_and_takes_a_dict_too() -> None:
    from lightning.fabric import Fabric

    method = Learner()
    assert method.needs == Needs(split="train", own_data=True)
    with pytest.raises(FusionBenchError, match=r"learns from data. Give run\(\) a fabric and data"):
        method.run(POOL)
    models = {"a": module(1, 3), "b": module(3, 5)}
    fused = method.run(models, Fabric(accelerator="cpu", devices=1), {})
    assert fused["weight"].tolist() == [[2, 4]]


def test_a_dict_of_modules_is_a_pool() -> None:
    pool = ModuleDict({"_pretrained_": module(0, 0), "a": module(1, 3)})
    assert pool.model_names == ["a"] and pool.has_pretrained
    built = pool.build_model(in_memory(pool.weights("a")))
    assert built.weight.tolist() == [[1, 3]]  # type: ignore[union-attr,operator]
    assert pool.load_model("_pretrained_").weight.tolist() == [[0, 0]]  # type: ignore[union-attr,operator]


def test_a_run_that_returns_no_weights_is_said() -> None:
    class Nothing:
        def run(self, modelpool: Any) -> None:
            return None

    with pytest.raises(FusionBenchError, match=r"its run returned None\. Return tensors by key"):
        as_method(Nothing()).fuse(POOL)


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    class Own(TensorwiseAlgorithm):
        def __init__(self, factor: float):
            self.factor = factor

    assert Own(2).show_pbar is True and Own(2).inplace is False
