"""A program's pool tells whole keys, whatever kind of pool it is."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.programs.pools import placed
from fusion_bench.weights import MergePolicy


class Failing:
    """A user's pool, which fails at a key of its own, or with a file."""

    model_names = ("a", "file")
    has_pretrained = False

    def load_model(self, name: str) -> nn.Module:
        raise FusionBenchError("broken.", place=() if name == "file" else ("models", name))


def test_what_a_pool_raises_has_its_whole_key_once() -> None:
    pool = placed(Failing())
    with pytest.raises(FusionBenchError) as error, within("method", keyed_only=True):
        pool.load_model("a")
    assert str(error.value) == "modelpool.models.a: broken."


def test_a_problem_without_a_key_stays_without_until_someone_knows_one() -> None:
    with pytest.raises(FusionBenchError) as error:
        placed(Failing()).weights("file")
    assert str(error.value) == "broken."
    with pytest.raises(FusionBenchError) as error, within("modelpool", "models"):
        placed(Failing()).weights("file")
    assert str(error.value) == "modelpool.models: broken."


def test_a_plain_object_is_a_pool_that_knows_little() -> None:
    pool = placed(Failing())
    assert pool.model_names == ["a", "file"] and pool.policy == MergePolicy()
    assert pool.plan().problems == [] == pool.compare() and pool.architecture("a") is None
    assert pool.train_datasets == {} and pool.vocabulary is None and pool.notes == []
    with pytest.raises(FusionBenchError, match="a Failing has no 'build_model'"):
        pool.build_model({})


def test_weights_of_a_pool_of_modules_are_theirs() -> None:
    class Modules:
        model_names = ("a",)

        def load_model(self, name: str) -> nn.Module:
            return nn.Linear(2, 2, bias=False)

    assert list(placed(Modules()).weights("a")) == ["weight"]


def test_our_pools_are_pools_and_their_policy_is_told_by_its_whole_key(tmp_path: Path) -> None:
    modules = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 3)}
    own = HFModelPool(modules, policy={"on_dtype": "error"})
    pool = placed(own)
    assert pool._pool is own
    assert pool.policy.typed("on_dtype", "cast") == "modelpool.policy.on_dtype=cast"
    assert pool.policy == own.policy
    assert torch.equal(pool.weights("a")["weight"], modules["a"].weight)
