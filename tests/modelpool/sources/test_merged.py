from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import write_llama

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.modelpool import CausalLMPool, MergedModel
from fusion_bench.problems import FusionBenchError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Tensors]:
    return {
        name: write_llama(tmp_path / name, seed=seed, dtype=torch.float32)
        for seed, name in enumerate("abc")
    }


def node(folder: Path, **more: Any) -> dict[str, Any]:
    models = {"a": str(folder / "a"), "b": str(folder / "b")}
    return {
        "_target_": "fusion_bench.modelpool.MergedModel",
        "modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": models},
        "method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        **more,
    }


def test_a_merge_of_a_merge(three: dict[str, Tensors], tmp_path: Path) -> None:
    pool = CausalLMPool({"_pretrained_": node(tmp_path), "c": str(tmp_path / "c")})
    merged = TaskArithmeticAlgorithm(scaling_factor=0.5).fuse(pool)
    for key, own in three["c"].items():
        mean = (three["a"][key] + three["b"][key]) / 2
        torch.testing.assert_close(merged[key], mean + 0.5 * (own - mean))


def test_it_is_built_and_saved_like_its_own_reference(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    pool = CausalLMPool({"first": node(tmp_path), "c": str(tmp_path / "c")})
    assert not pool.plan().problems
    module = pool.load_model("first")
    key = "model.norm.weight"
    mean = (three["a"][key] + three["b"][key]) / 2
    torch.testing.assert_close(module.state_dict()[key], mean)
    pool.save_model(SimpleAverageAlgorithm().fuse(pool), tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names


def test_it_may_be_given_as_an_object(three: dict[str, Tensors], tmp_path: Path) -> None:
    inner = CausalLMPool({name: str(tmp_path / name) for name in "ab"})
    pool = CausalLMPool({"first": MergedModel(inner, SimpleAverageAlgorithm())})
    key = "lm_head.weight"
    mean = (three["a"][key] + three["b"][key]) / 2
    torch.testing.assert_close(pool.weights("first")[key], mean)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"method": {"_target_": "fusion_bench.method.SlerpMergeAlgorithm", "t": 2}},
         "models.x.method.t"),
        ({"method": None}, "models.x.method"),
        ({"modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool",
                        "models": {"a": "missing/here/a"}}}, "models.x.modelpool.models.a"),
    ],
)  # fmt: skip
def test_problems_have_their_places(
    more: dict[str, Any], key: str, three: dict[str, Tensors], tmp_path: Path
) -> None:
    pool = CausalLMPool({"x": node(tmp_path, **more), "c": str(tmp_path / "c")})
    found = [problem.key for problem in pool.plan(tmp_path).problems]
    assert any(own.startswith(key) for own in found), found


def test_models_that_do_not_fit_are_refused_in_the_plan(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    method = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    pool = CausalLMPool({"x": node(tmp_path, method=method), "c": str(tmp_path / "c")})
    assert "_pretrained_" in str(pool.plan().problems[0])
    with pytest.raises(FusionBenchError):
        pool.weights("x")
