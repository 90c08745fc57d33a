import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_weights import all_bits, open_directory
from torch import Tensor, nn

from fusion_bench.method import (
    EMRMerging,
    Family,
    LiNeSAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TensorwiseAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.base import inputs_of
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, Weights, in_memory, write_checkpoints
from fusion_bench.weights.write import Checkpoint

BASE = "_pretrained_"
FACTORS = [0.1, 0.5, -1.0]


class Counted(TensorWeights):
    """Weights that note which elements are read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.reads: Counter[tuple[str, int, int]] = Counter()
        self._lock = threading.Lock()

    def read(self, key: str, start: int, stop: int) -> Tensor:
        with self._lock:
            self.reads[key, start, stop] += 1
        return super().read(key, start, stop)


class Pool:
    """Weights as a model pool."""

    vocabulary = None
    policy = MergePolicy()

    def __init__(self, models: Mapping[str, Weights]):
        self._models = models
        self.model_names = [name for name in models if name != BASE]
        self.has_pretrained = BASE in models

    def weights(self, name: str) -> Weights:
        return self._models[name]


def tensors(models: int = 4) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.weight": (700, 500), "layers.1.weight": (9, 7), "layers.1.bias": (9,)}
    names = [BASE, *"abcdefgh"[:models]]
    return {
        name: {key: torch.randn(own, generator=generator) for key, own in shapes.items()}
        for name in names
    }


def in_turn(made: Mapping[str, Any], place: Path) -> None:
    """Write merged models in one pass."""
    checkpoints = []
    for name, weights in made.items():
        (place / name).mkdir(parents=True)
        checkpoints.append(Checkpoint(weights, place / name))
    write_checkpoints(checkpoints)


def test_task_arithmetic_as_its_formula_has_it() -> None:
    models = tensors()
    made = Family(TaskArithmeticAlgorithm(), {"scaling_factor": FACTORS}).fuse(
        Pool({name: TensorWeights(own) for name, own in models.items()})
    )
    assert list(made) == ["scaling_factor=0.1", "scaling_factor=0.5", "scaling_factor=-1.0"]
    for factor, merged in zip(FACTORS, made.values(), strict=True):
        assert isinstance(merged, Weights)
        for key, value in in_memory(merged).items():
            base, *others = (own[key].double() for own in models.values())
            expected = base + factor * sum(other - base for other in others)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (TaskArithmeticAlgorithm(), {"scaling_factor": FACTORS, "normalize": [False, True]}),
        (TiesMergingAlgorithm(), {"scaling_factor": FACTORS, "threshold": [10, 0.5]}),
        (
            TiesMergingAlgorithm(scope="tensor"),
            {"rescale": ["none", "l1"], "scaling_factor": [1, 2]},
        ),
        (TiesMergingAlgorithm(), {"zero_sign": ["positive"], "weights": [1.0, [1, 2, 3, 0.5]]}),
        (LiNeSAlgorithm(TiesMergingAlgorithm()), {"alpha": [0.5, 1.0]}),
        (TaskSingularVectorMerging(), {"alpha": [None, 0.5]}),
    ],
)
def test_each_model_is_the_one_that_its_method_makes_alone(
    base: Any, options: dict[str, list[Any]], tmp_path: Path
) -> None:
    pool = Pool({name: TensorWeights(own) for name, own in tensors().items()})
    family = Family(base, options)
    in_turn(family.fuse(pool), tmp_path)
    assert len(family.members) > 1
    for name, member in family.members.items():
        alone = member.method.fuse(pool)
        assert isinstance(alone, Weights)
        saved = open_directory(tmp_path / name)
        assert all_bits(saved) == all_bits(in_memory(alone)), name


def test_several_methods_and_those_that_make_several_models() -> None:
    pool = {name: layer(own) for name, own in tensors().items()}
    methods = {"average": SimpleAverageAlgorithm(), "emr": EMRMerging()}
    made: Any = Family(TaskArithmeticAlgorithm(), {"scaling_factor": [0.2]}, methods).run(pool)
    assert list(made) == ["scaling_factor=0.2", "average", "emr/a", "emr/b", "emr/c", "emr/d"]
    assert all_bits(made["average"]) == all_bits(SimpleAverageAlgorithm().run(pool))
    alone: Any = EMRMerging().run(pool)
    assert all_bits(made["emr/c"]) == all_bits(alone["c"])


def layer(own: Mapping[str, Tensor]) -> nn.Module:
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Linear(500, 700, bias=False), nn.Linear(7, 9)])
    module.load_state_dict(dict(own))
    return module


@pytest.mark.parametrize(
    "base", [TaskArithmeticAlgorithm(), TiesMergingAlgorithm(), SimpleAverageAlgorithm()]
)
def test_no_element_is_read_more_often_than_for_one_model(
    base: TensorwiseAlgorithm, tmp_path: Path
) -> None:
    def reads(fuse: Callable[[Pool], Mapping[str, Any]], place: str) -> list[Counter[Any]]:
        models = {name: Counted(own) for name, own in tensors().items()}
        in_turn(fuse(Pool(models)), tmp_path / place)
        return [own.reads for own in models.values()]

    options = {"scaling_factor": FACTORS} if hasattr(base, "scaling_factor") else {}
    methods = {} if options else dict.fromkeys("xyz", base)
    family = Family(base, options, methods)
    one = reads(lambda pool: {"one": base.fuse(pool)}, "alone")
    assert reads(family.fuse, "family") == one
    assert len(family.members) == 3


def test_what_is_common_is_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fusion_bench.method.ties_merging as ties

    merged: Counter[str] = Counter()
    search: list[object] = []
    own, largest = ties.disjoint_merge, ties.largest
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(ties, "disjoint_merge", lambda *a: merged.update(["pieces"]) or own(*a))
    monkeypatch.setattr(ties, "largest", lambda *a, **k: search.append(a) or largest(*a, **k))
    pool = Pool({name: TensorWeights(own) for name, own in tensors().items()})
    family = Family(TiesMergingAlgorithm(), {"threshold": [10, 20], "scaling_factor": FACTORS})
    in_turn(family.fuse(pool), tmp_path)
    assert len(search) == 2
    assert merged["pieces"] == 2 * 4  # of each threshold: two of the large matrix, two others


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"options": {"scaling": [1]}},
            "options.scaling: TaskArithmeticAlgorithm takes no such key. Did you mean "
            "'scaling_factor'?",
        ),
        ({"options": {"scaling_factor": 0.1}}, "options.scaling_factor: '0.1' is not a list."),
        ({"options": {"scaling_factor": []}}, "options.scaling_factor: the list is empty."),
        (
            {"options": {"scaling_factor": [0.1, "x"]}},
            "options.scaling_factor[1]: 'x' is not a number.",
        ),
        (
            {"options": {"scaling_factor": [1, 1]}},
            "options.scaling_factor[1]: 'scaling_factor=1' is there twice.",
        ),
        ({}, "options: it has no values, and there are no other methods."),
        ({"base_method": None, "options": {"a": [1]}}, "base_method: missing; its options vary."),
        ({"base_method": 3}, "base_method: 3 is not a method."),
        ({"methods": {"..": SimpleAverageAlgorithm()}}, "methods...: '..' is not a valid"),
        ({"methods": {"x": "ties"}}, "methods.x: 'ties' is not a method."),
        (
            {"methods": {"x": Family(None, {}, {"y": SimpleAverageAlgorithm()})}},
            "methods.x: Family inside of another.",
        ),
        (
            {
                "options": {"scaling_factor": [1]},
                "methods": {"scaling_factor=1": SimpleAverageAlgorithm()},
            },
            "methods.scaling_factor=1: another model is called 'scaling_factor=1'.",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FusionBenchError) as caught:
        Family(**{"base_method": TaskArithmeticAlgorithm(), **given})
    assert str(caught.value).startswith(said)


def test_all_wrong_values_are_told_together() -> None:
    with pytest.raises(FusionBenchError) as caught:
        Family(TiesMergingAlgorithm(), {"threshold": [101, 20, 200], "keep": ["some"]})
    assert {problem.key for problem in caught.value.problems} == {
        "options.threshold[0]",
        "options.threshold[2]",
        "options.keep[0]",
    }


def test_models_that_do_not_fit_are_told_once() -> None:
    family = Family(TaskArithmeticAlgorithm(), {"scaling_factor": FACTORS})
    pool = Pool({"a": TensorWeights(tensors()["a"])})
    with pytest.raises(FusionBenchError, match="_pretrained_") as caught:
        family.check_pool(pool)
    assert len(caught.value.problems) == 1
    weights = Family(TaskArithmeticAlgorithm(), {"weights": [1.0, [1, 2]]})
    fitting = Pool({name: TensorWeights(own) for name, own in tensors().items()})
    with pytest.raises(FusionBenchError, match=r"^options\.weights\[1\]"):
        weights.check_pool(fitting)


def test_what_is_not_finite_is_noticed() -> None:
    models = tensors()
    models["b"]["layers.1.bias"][3] = float("nan")
    family = Family(TaskArithmeticAlgorithm(), {"scaling_factor": FACTORS})
    made = family.fuse(Pool({name: TensorWeights(own) for name, own in models.items()}))
    for weights in made.values():
        assert isinstance(weights, Weights)
        with pytest.raises(FusionBenchError, match=r"b: 'layers\.1\.bias'"):
            in_memory(weights)


def test_needs_are_those_of_all() -> None:
    assert Family(SimpleAverageAlgorithm(), methods={"x": SimpleAverageAlgorithm()}).needs.base is (
        False
    )
    assert Family(None, {}, {"x": SimpleAverageAlgorithm(), "y": TiesMergingAlgorithm()}).needs.base


def test_inputs_are_shared_only_by_families() -> None:
    pool = Pool({name: TensorWeights(own) for name, own in tensors().items()})
    inputs = inputs_of([TaskArithmeticAlgorithm()], pool)
    key = "layers.1.bias"
    assert inputs.read(key, 0, 9) is not inputs.read(key, 0, 9)
    shared = inputs.shared()
    assert shared.read(key, 0, 9) is shared.read(key, 0, 9)
