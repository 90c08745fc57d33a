from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import BASE, module
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion_bench.method import EMRMerging
from fusion_bench.problems import FusionBenchError


def each(models: Mapping[str, Any], base: Any, rescale: Any = "paper") -> dict[str, list[float]]:
    """Return by task the merged `weight`."""
    pool = {BASE: module(base)} | {name: module(v) for name, v in models.items()}
    made: Any = EMRMerging(rescale).run(pool)
    return {name: state["weight"].tolist() for name, state in made.items()}


def test_by_hand() -> None:
    found = each({"a": [2.0, -1, 0.5], "b": [1.0, 3, -1]}, [0.0] * 3)
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx([1.75 * 2, 0, 0])
    assert found["b"] == pytest.approx([5 / 6 * v for v in (2, 3, -1)])


def test_of_opposites_the_negative_is_elected() -> None:
    found = each({"a": [1.0, 4.0], "b": [-1.0, 2.0]}, [0.0, 0.0])
    assert found["a"] == [0, 5]  # all of its magnitude where it has a share
    assert found["b"] == pytest.approx([-0.6, 2.4])


def unified(models: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Return the unified task vector and the tasks' masks, straight from the paper."""
    tau = np.stack(models)
    sign = np.where(tau.sum(axis=0) > 0, 1, -1)
    agree = tau * sign > 0
    return sign * np.abs(tau * agree).max(axis=0), list(agree)


quarters = st.integers(-8, 8).map(lambda n: n / 4)  # they add up without rounding
two_entries = st.lists(
    st.tuples(
        st.lists(quarters, min_size=3, max_size=3), st.lists(quarters, min_size=1, max_size=1)
    ),
    min_size=1,
    max_size=4,
)


@given(two_entries, st.sampled_from(["paper", "released"]))
@settings(deadline=None, max_examples=examples(60))
def test_against_the_formula(models: list[tuple[list[float], list[float]]], rescale: Any) -> None:
    def net(weight: Any, bias: Any) -> torch.nn.Module:
        own = torch.nn.Linear(3, 1)
        state = {"weight": torch.tensor([weight]), "bias": torch.tensor(bias)}
        own.load_state_dict(state)
        return own

    base = ([0.5, -1.0, 2.0], [0.25])
    pool = {BASE: net(*base)}
    for i, (weight, bias) in enumerate(models):
        pool[f"m{i}"] = net(np.add(base[0], weight).tolist(), np.add(base[1], bias).tolist())
    made: Any = EMRMerging(rescale).run(pool)
    mean = np.mean if rescale == "released" else np.sum
    entries = [unified([np.array(model[i]) for model in models]) for i in range(2)]
    for task, model in enumerate(models):
        shares = [whole * agree[task] for whole, agree in entries]
        own = sum(mean(np.abs(part)) for part in model)
        left = sum(mean(np.abs(share)) for share in shares)
        scale = own / left if left else 0
        for key, share, start in zip(("weight", "bias"), shares, base, strict=True):
            found = made[f"m{task}"][key].view(-1).double().numpy()
            np.testing.assert_allclose(found, start + scale * share, rtol=1e-6, atol=1e-6)


def test_one_model_alone_and_equal_models_are_themselves() -> None:
    model, base = [3.0, 1.0, -0.5], [1.0, 1.0, 1.0]
    assert each({"a": model}, base) == {"a": model}
    assert each({"a": model, "b": model}, base) == {"a": model, "b": model}


def test_magnitudes_are_restored() -> None:
    generator = torch.Generator().manual_seed(0)
    models = dict(zip("abc", torch.randn(3, 100, generator=generator).tolist(), strict=True))
    for name, found in each(models, [0.0] * 100).items():
        assert sum(map(abs, found)) == pytest.approx(sum(map(abs, models[name])), rel=1e-5)


@pytest.mark.parametrize("rescale", ["paper", "released"])
def test_no_change_is_no_nan(rescale: str) -> None:
    assert each({"a": [1.0, 2.0], "b": [1.0, 4.0]}, [1.0, 2.0], rescale)["a"] == [1, 2]
    assert each({"a": [1.0, 2.0]} | {"b": [1.0, 2.0]}, [1.0, 2.0], rescale)["b"] == [1, 2]
    assert each({"a": [1.0], "b": [0.0]}, [0.5], rescale)["a"] == [0.5]  # its sign lost
    assert each({"a": 2.0, "b": 3.0}, 1.0, rescale) == {"a": 2, "b": 3}


def test_models_without_floats_are_copied() -> None:
    counters = torch.nn.Module()
    counters.register_buffer("count", torch.tensor([1, 2]))
    made: Any = EMRMerging().run({BASE: counters, "a": counters})
    assert made["a"]["count"].tolist() == [1, 2]


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"rescale.*Did you mean 'paper'"):
        EMRMerging("papers")  # type: ignore[arg-type]
