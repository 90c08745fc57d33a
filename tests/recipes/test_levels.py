"""Parameters at all levels, drawn at random, against the reference."""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes.reference import Tensors, gradient, run
from torch import nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.rules import Gradient
from fusion_bench.recipes import translate

LAYERS = 4


class Tiny(nn.Module):
    """Layers of single numbers, with something before and behind them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = iter(np.random.default_rng(seed).normal(size=(2 + 3 * LAYERS, 2)))
        self.model = nn.Module()
        self.model.embed_tokens = _number(next(draws))
        self.model.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            for part in ("mlp", "self_attn", "norm"):  # fewer do not make a layer
                layer.add_module(part, _number(next(draws)))
            self.model.layers.append(layer)
        self.model.norm = _number(next(draws))


def _number(values: Any) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))
    return module


MODELS = {name: Tiny(seed) for seed, name in enumerate(["base", "a", "b"])}

numbers = st.floats(-2, 2, width=32).map(lambda value: round(value, 3))
values = numbers | st.lists(numbers, min_size=1, max_size=5)
filters = st.sampled_from(["mlp", "self_attn", "layers.1.", "embed", "no such", "*", "weight"])
conditions = st.lists(
    st.fixed_dictionaries({"value": values}, optional={"filter": filters}), min_size=1, max_size=3
)
anything = values | conditions | conditions.map(lambda own: own[0])
level = st.fixed_dictionaries({}, optional={"weight": anything})
wide = st.fixed_dictionaries({"weight": values}, optional={"lambda": values})


def load(name: str) -> Tensors:
    state = MODELS[name].state_dict()
    return {key: own.double().numpy() for key, own in state.items()}


@given(level, level, wide)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_first_level_with_a_value_decides(
    first: dict[str, Any], second: dict[str, Any], top: dict[str, Any]
) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": first}, {"model": "b", "parameters": second}],
        "parameters": top,
    }
    text = yaml.safe_dump(recipe)
    method = instantiate(translate(text).method, "method")
    found = method.run({"_pretrained_": MODELS["base"], "a": MODELS["a"], "b": MODELS["b"]})
    for key, own in run(text, load).items():
        np.testing.assert_allclose(found[key].double().numpy(), own, rtol=1e-5, atol=1e-5)


points = st.lists(numbers, min_size=1, max_size=6) | st.lists(st.booleans(), min_size=1, max_size=6)


@given(points, st.integers(0, 9), st.integers(1, 10))
def test_gradients(stated: list[Any], index: int, count: int) -> None:
    depth = min(index, count - 1) / (count - 1) if count > 1 else 1.0
    assert Gradient(tuple(stated)).at(depth) == pytest.approx(gradient(stated, depth))


def test_a_gradient_by_hand() -> None:
    found = [Gradient((0.1, 1, 0.3)).at(i / 3) for i in range(4)]
    assert found == pytest.approx([0.1, 0.7, 0.7667, 0.3], abs=1e-4)
