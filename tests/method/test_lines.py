from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.method import (
    LiNeSAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TensorwiseAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.contract import Needs
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, MergePiece, MergePolicy, TensorWeights, Weights, in_memory

CONFIG = Path(__file__).parents[2] / "config"
BASE = "_pretrained_"
#: A key of each block, and what is outside of blocks; each has a number for its value.
KEYS = ["embed", *(f"encoder.layers.{i}.w" for i in range(4)), "head"]
DEPTHS = np.array([0, 0, 1 / 3, 2 / 3, 1, 0])


class Pool:
    """Weights as a model pool."""

    vocabulary = None

    def __init__(self, policy: MergePolicy | None = None, **models: Mapping[str, Tensor]):
        self._models = models
        self.policy = policy or MergePolicy()
        self.model_names = [name for name in models if name != BASE]
        self.has_pretrained = BASE in models

    def weights(self, name: str) -> Weights:
        return TensorWeights(self._models[name])


def state(*values: float, keys: Sequence[str] = KEYS) -> dict[str, Tensor]:
    return {key: torch.tensor([float(value)]) for key, value in zip(keys, values, strict=True)}


def scaled(method: Any, pool: Pool) -> list[float]:
    return [tensor.item() for tensor in method.run(pool).values()]


def module(values: Sequence[float]) -> nn.Module:
    result = nn.Module()
    result.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in values)
    for layer, value in zip(result.layers, values, strict=True):
        layer.weight.data.fill_(value)
    return result


ONE = Pool(**{BASE: state(*[0.0] * 6), "a": state(*[1.0] * 6)})
TWO = Pool(**{BASE: state(*[1.0] * 6), "a": state(2, 3, 4, 5, 6, 7), "b": state(3, 3, 2, 1, 0, 1)})
SUM = np.array([3, 4, 4, 4, 4, 6.0])  # of the task vectors


def test_by_hand() -> None:
    method = LiNeSAlgorithm(TaskArithmeticAlgorithm(1), alpha=0.125, beta=0.5)
    expected = [0.125, 0.125, 0.291667, 0.458333, 0.625, 0.125]
    assert scaled(method, ONE) == pytest.approx(expected, abs=1e-6)


def test_without_beta_all_is_scaled_alike() -> None:
    method = LiNeSAlgorithm(TaskArithmeticAlgorithm(1), alpha=0.3, beta=0)
    expected = TaskArithmeticAlgorithm(0.3).run(TWO)
    assert scaled(method, TWO) == pytest.approx([t.item() for t in expected.values()])


def test_the_last_block_may_stay_as_it_is() -> None:
    method = LiNeSAlgorithm(SimpleAverageAlgorithm(), alpha=0.4, beta=None)
    assert scaled(method, TWO) == pytest.approx(1 + SUM / 2 * (0.4 + 0.6 * DEPTHS))


@pytest.mark.parametrize("scaling", [0.3, 1, -1])
def test_auto_makes_the_first_block_s_change_that_of_the_average(scaling: float) -> None:
    method = LiNeSAlgorithm(TaskArithmeticAlgorithm(scaling), beta=0.5)
    alpha = 1 / abs(scaling) / 2
    expected = 1 + scaling * SUM * (alpha + 0.5 * DEPTHS)
    assert scaled(method, TWO) == pytest.approx(expected)


def test_auto_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [*KEYS, "encoder.layers.3.b"]
    models = {
        name: {key: torch.randn(5, 7, generator=generator) for key in keys}
        for name in (BASE, "a", "b", "c")
    }
    base_method = TiesMergingAlgorithm(threshold=30)
    result = LiNeSAlgorithm(base_method, beta=0.7).run(Pool(**models))
    ties = in_memory(base_method.run(Pool(**models)))  # type: ignore[arg-type]
    numbers = {
        name: np.stack([own[key].double().numpy() for key in keys])
        for name, own in {**models, "ties": ties}.items()
    }
    base, tau = numbers[BASE], numbers["ties"] - numbers[BASE]
    summed = numbers["a"] + numbers["b"] + numbers["c"] - 3 * base
    alpha = np.abs(summed).sum() / np.abs(tau).sum() / 3
    scale = alpha + 0.7 * np.array([*DEPTHS, 1])
    for key, want in zip(keys, base + scale[:, None, None] * tau, strict=True):
        np.testing.assert_allclose(result[key], want, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "depths"),
    [
        (["visual.resblocks.0.w", "visual.resblocks.2.w", "text.resblocks.1.w"], [0, 1, 1]),
        (["h.0.w", "h.1.h.0.w", "h.10.w"], [0, 0.1, 1]),
        (["encoder.block.0.layer.1.w", "encoder.block.1.layer.0.w", "layer1.2.w"], [0, 1, 0]),
        (["blocks.0.w", "blocks.1.w", "graph.1.w"], [0, 1, 0]),
        (["bert.layer.0.w", "model.layers.7.w", "model.layers.w"], [0, 1, 0]),
    ],
)
def test_the_outermost_block_counts_in_its_own_stack(keys: list[str], depths: list[float]) -> None:
    pool = Pool(**{BASE: state(0, 0, 0, keys=keys), "a": state(1, 1, 1, keys=keys)})
    method = LiNeSAlgorithm(TaskArithmeticAlgorithm(1), 1, 1)
    assert scaled(method, pool) == pytest.approx([1 + depth for depth in depths])


def test_one_block_is_the_first() -> None:
    keys = ["layers.0.w"]
    pool = Pool(**{BASE: state(0, keys=keys), "a": state(1, keys=keys)})
    assert scaled(LiNeSAlgorithm(SimpleAverageAlgorithm(), 0.25, 0.5), pool) == [0.25]


def test_no_block_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(**{BASE: state(0, keys=["w"]), "a": state(1, keys=["w"])})
    assert scaled(LiNeSAlgorithm(SimpleAverageAlgorithm(), 0.25, 0.5), pool) == [0.25]
    assert "no key contains a block's index" in caplog.text


def test_models_equal_to_the_base_give_the_base() -> None:
    pool = Pool(**{name: state(*[0.1, 0.7] * 3) for name in (BASE, "a", "b")})
    expected = [t.item() for t in state(*[0.1, 0.7] * 3).values()]
    assert scaled(LiNeSAlgorithm(TaskArithmeticAlgorithm(0.3)), pool) == expected


def test_of_modules_it_makes_a_state_dict_and_leaves_them() -> None:
    models = {BASE: module([0, 0, 0]), "a": module([1, 1, 1]), "b": module([1, 1, 1])}
    before = {name: deepcopy(model.state_dict()) for name, model in models.items()}
    result = LiNeSAlgorithm(TaskArithmeticAlgorithm(0.3, inplace=True), beta=1).run(models)
    assert isinstance(result, dict)
    assert [t.item() for t in result.values()] == pytest.approx([1, 1.3, 1.6])
    for name, model in models.items():
        assert all(torch.equal(t, before[name][key]) for key, t in model.state_dict().items())


class StateDict:
    """A method that returns plain tensors, in a type of their own."""

    def run(self, modelpool: Any, fabric: Any = None) -> dict[str, Tensor]:
        return {key: t.double() for key, t in modelpool.weights("a").items()}


class Family(TensorwiseAlgorithm):
    """A method that makes a model for each task."""

    elementwise = True

    def merger(self, inputs: Inputs) -> Mapping[str, MergePiece]:
        return {
            name: lambda key, start, tensors, base, i=i: tensors[i].clone()
            for i, name in enumerate(inputs.names)
        }


def test_a_base_method_may_return_a_state_dict() -> None:
    assert scaled(LiNeSAlgorithm(StateDict(), 0.5, 0.5), TWO) == pytest.approx(
        1 + np.array([1, 2, 3, 4, 5, 6]) * (0.5 + 0.5 * DEPTHS)
    )
    models = {BASE: module([0, 0]), "a": module([1, 2])}
    result = LiNeSAlgorithm(StateDict(), 0.5, 0.5).run(models)
    assert [t.item() for t in result.values()] == [0.5, 2]  # type: ignore[union-attr]


def test_a_base_method_may_make_several_models() -> None:
    family: Any = LiNeSAlgorithm(Family(), "auto", 0).run(TWO)
    assert list(family) == ["a", "b"]
    change, sizes = SUM.sum() / 2, {"a": 21, "b": 6}
    for name, weights in family.items():
        expected = [1 + change / sizes[name] * (t.item() - 1) for t in TWO.weights(name).values()]
        assert [t.item() for t in weights.values()] == pytest.approx(expected)
    models = {BASE: module([0, 0]), "a": module([1, 2]), "b": module([3, 4])}
    family = LiNeSAlgorithm(Family(), 0.5, 0.5).run(models)
    assert {name: [t.item() for t in own.values()] for name, own in family.items()} == {
        "a": [0.5, 2],
        "b": [1.5, 4],
    }


class Learner(StateDict):
    needs_data = True
    split = "validation"
    uses_labels = True

    def run(self, modelpool: Any, fabric: Any = None, data: Any = None) -> dict[str, Tensor]:
        assert data == {"a": "data"}
        return super().run(modelpool)


def test_a_base_method_may_learn_from_data() -> None:
    method = LiNeSAlgorithm(Learner(), 1, 0)
    place = ("base_method", "split")
    assert method.needs == Needs(base=True, split="validation", labels=True, split_place=place)
    assert LiNeSAlgorithm(StateDict()).needs.split is None
    result = method.run(TWO, None, {"a": "data"})
    assert [t.item() for t in result.values()] == [2, 3, 4, 5, 6, 7]  # type: ignore[union-attr]


def test_a_module_cannot_be_scaled() -> None:
    class Ensemble:
        def run(self, modelpool: Any, fabric: Any = None) -> nn.Module:
            return nn.Linear(1, 1)

    with pytest.raises(FusionBenchError, match=r"base_method: Ensemble returns a module"):
        LiNeSAlgorithm(Ensemble()).run(TWO)


def test_the_scaled_change_is_rounded_once() -> None:
    base, tuned = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool = Pool(**{BASE: {"layers.0.w": base}, "a": {"layers.0.w": tuned}})
    result = LiNeSAlgorithm(TaskArithmeticAlgorithm(0.37), 0.61, 0).run(pool)["layers.0.w"]
    wide = base.float() + (tuned.float() - base.float()) * 0.37 * 0.61
    assert isinstance(result, Tensor) and result.dtype == torch.bfloat16
    assert (result == wide.bfloat16()).double().mean() > 0.999
    pool = Pool(MergePolicy(dtype="float32"), **{name: pool._models[name] for name in (BASE, "a")})
    result = LiNeSAlgorithm(TaskArithmeticAlgorithm(0.37), 0.61, 0).run(pool)["layers.0.w"]
    torch.testing.assert_close(result, wide)


def test_the_model_that_is_not_finite_is_named() -> None:
    for method in (SimpleAverageAlgorithm(), TiesMergingAlgorithm()):
        models = {BASE: module([0, 0]), "a": module([1, 1]), "b": module([1, float("nan")])}
        with pytest.raises(FusionBenchError, match=r"b: 'layers\.1\.weight'"):
            LiNeSAlgorithm(method).run(models)


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"alpha: 'aut' is neither"):
        LiNeSAlgorithm(StateDict(), "aut")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match="Add '_pretrained_'"):
        LiNeSAlgorithm(SimpleAverageAlgorithm()).run(Pool(a=state(*[1.0] * 6)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TaskArithmeticAlgorithm),
        (["method.base_method.scaling_factor=1"], TaskArithmeticAlgorithm),
        (
            ["method@method.base_method=ties_merging", "method.base_method.threshold=10"],
            TiesMergingAlgorithm,
        ),
    ],
)
def test_the_base_method_is_chosen_in_the_config(overrides: list[str], expected: type) -> None:
    node = composed("method=lines/lines", *overrides)["method"]
    for recursive in (True, False):
        method = instantiate({"_recursive_": recursive, **node})
        assert type(method) is LiNeSAlgorithm and type(method.base_method) is expected
        for override in overrides:
            key, _, value = override.partition("=")
            option = key.removeprefix("method.base_method.")
            assert "@" in key or getattr(method.base_method, option) == int(value)
