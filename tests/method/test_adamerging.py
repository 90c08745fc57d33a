import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_contract import family as small_models
from fixtures_method import module
from fixtures_tuning import CPU, Images, fused, learned, linear, linear_data, linear_models
from torch import Tensor, nn
from torch.func import functional_call

from fusion_bench.method import (
    AdaMergingAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.adamerging import Mixture, entropies
from fusion_bench.method.checks import BASE, TrainablePool, as_weights, assert_close
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, in_memory

LAYERS, TASKS = "layer", "task"
both = pytest.mark.parametrize("granularity", [LAYERS, TASKS])
KEYS = ["weight", "bias"]


def summed(models: dict[str, nn.Module], weights: Any) -> dict[str, Tensor]:
    """Return base plus weighted task vectors in float64; a row a model, a column a key."""
    states = {name: model.state_dict() for name, model in models.items()}
    base = {key: value.double() for key, value in states.pop(BASE).items()}
    rows = list(zip(weights, states.values(), strict=True))
    return {
        key: base[key] + sum(row[i] * (state[key] - base[key]) for row, state in rows)
        for i, key in enumerate(KEYS)
    }


def entropy(models: dict[str, nn.Module], weights: Any, data: dict[str, Images]) -> float:
    """Return, in float64, the sum over all tasks of the mean entropy."""
    state = summed(models, weights)
    total = 0.0
    for task in data.values():
        logits = functional_call(nn.Linear(4, 3).double(), state, task.images.double())
        total += float(torch.distributions.Categorical(logits=logits).entropy().mean())
    return total


def write(file: Path, models: list[str], keys: list[str], coefficients: Any) -> str:
    content = {"models": models, "keys": keys, "coefficients": coefficients}
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def test_entropies_of_answers() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [1000, 0, 0, 0], [0, 0, -1000, -1000]])
    assert entropies(logits).tolist() == pytest.approx([np.log(4), 0, np.log(2)])
    assert entropies(logits.bfloat16()).dtype == torch.float32


@both
def test_the_gradient_is_that_of_the_entropy(granularity: str) -> None:
    models, data = linear_models("abc"), linear_data("abc")
    weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    if granularity == TASKS:
        weights = weights[:, :1]
    weights64 = weights.double()
    built = deepcopy(models[BASE])
    tuned = {name: model.state_dict() for name, model in models.items() if name != BASE}
    mixture = Mixture(built, KEYS, models[BASE].state_dict(), tuned)
    mixture.set(weights)
    for task in data.values():
        entropies(built(task.images)).mean().backward()

    products = torch.zeros(3, 2, dtype=torch.float64)
    for row, state in enumerate(tuned.values()):
        for column, key in enumerate(KEYS):
            gradient = built.get_parameter(key).grad
            assert gradient is not None
            vector = state[key].double() - models[BASE].state_dict()[key]
            products[row, column] = (gradient * vector).sum()
    if granularity == TASKS:
        products = products.sum(dim=1, keepdim=True)

    found = mixture.gradient(weights.shape[1])
    torch.testing.assert_close(found.double(), products, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in built.parameters())
    for place in np.ndindex(*weights.shape):
        step = torch.zeros_like(weights64)
        step[place] = 1e-5
        ends = (entropy(models, (weights64 + sign * step).expand(-1, 2), data) for sign in (1, -1))
        up, down = ends
        assert float(found[place]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


def test_what_no_answer_depends_on_has_no_gradient() -> None:
    built = nn.ModuleDict({"used": linear(0), "idle": linear(1)})
    base, other = (as_weights({"": m})[""] for m in (built, deepcopy(built)))
    mixture = Mixture(built, list(base), base, {"a": other})
    built["used"](torch.ones(1, 4)).sum().backward()
    assert mixture.gradient(4).tolist() == [[0, 0, 0, 0]]  # the models are equal
    built["used"](torch.ones(1, 4)).sum().backward()
    assert built["idle"].weight.grad is None
    assert mixture.gradient(1).shape == (1, 1)


@both
def test_the_entropy_falls(granularity: Any) -> None:
    models, data = linear_models(), linear_data()
    found = []
    for steps in (0, 3, 10, 40):
        method = AdaMergingAlgorithm(granularity, lr=1e-2, max_steps=steps, batch_size=12)
        state = learned(method, models, data)
        logits = [functional_call(nn.Linear(4, 3), state, d.images) for d in data.values()]
        found.append(sum(float(entropies(own).mean()) for own in logits))
    assert found == sorted(found, reverse=True) and found[-1] < 0.9 * found[0]
    assert found[0] == pytest.approx(entropy(models, [[0.3, 0.3]] * 2, data), rel=1e-5)


def test_a_step_is_adams() -> None:
    models, data = linear_models(), linear_data()
    start, lr = torch.full((2, 2), 0.3, dtype=torch.float64), 0.01
    tuned = {name: model.state_dict() for name, model in models.items() if name != BASE}
    mixture = Mixture(built := deepcopy(models[BASE]), KEYS, models[BASE].state_dict(), tuned)
    mixture.set(start)
    for task in data.values():
        entropies(built(task.images)).mean().backward()
    expected = start - lr * mixture.gradient(2).sign()  # the first step has the length lr
    found = learned(AdaMergingAlgorithm(lr=lr, max_steps=1, batch_size=12), models, data)
    assert_close(found, {k: v.float() for k, v in summed(models, expected).items()}, 1e-4)


@both
@pytest.mark.parametrize("start", [0.3, 0, -1.5, None])
def test_without_a_step_it_is_task_arithmetic(granularity: Any, start: float | None) -> None:
    modules = {k: m for k, m in small_models("net").items() if k != "c"}
    data = {name: Images(torch.zeros(1, 2, 6, 6), [0]) for name in "ab"}
    found = learned(AdaMergingAlgorithm(granularity, start, max_steps=0), modules, data)
    factor = 0.5 if start is None else start
    expected = fused(TaskArithmeticAlgorithm(factor), modules)
    base = modules[BASE].state_dict()
    parameters = dict(modules[BASE].named_parameters(remove_duplicate=False))
    assert_close(found, {key: expected[key] if key in parameters else base[key] for key in base})
    if start is None:
        average = fused(SimpleAverageAlgorithm(), modules)
        assert_close({k: found[k] for k in parameters}, {k: average[k] for k in parameters})


def test_coefficients_from_a_file_are_used_as_they_are(tmp_path: Path) -> None:
    models, data = linear_models(), linear_data()
    layers, tasks = [[0.5, -1.0], [0.25, 2.0]], [[0.5], [2.0]]
    by_layer = write(tmp_path / "layers.json", ["a", "b"], KEYS, layers)
    found = learned(AdaMergingAlgorithm(weights=by_layer, max_steps=0), models, data)
    assert_close(found, {k: v.float() for k, v in summed(models, layers).items()}, 1e-6)
    by_task = write(tmp_path / "tasks.json", ["a", "b"], ["of another"], tasks)
    found = learned(AdaMergingAlgorithm("task", weights=by_task, max_steps=0), models, data)
    expected = summed(models, [row * 2 for row in tasks])
    assert_close(found, {k: v.float() for k, v in expected.items()}, 1e-6)


@both
@pytest.mark.parametrize("clamp", [False, True])
def test_what_was_learned_is_saved_and_can_be_used_again(
    granularity: Any, clamp: bool, tmp_path: Path
) -> None:
    models, data, file = linear_models(), linear_data(), tmp_path / "new" / "found.json"
    method = AdaMergingAlgorithm(
        granularity, lr=0.5, max_steps=8, clamp_weights=clamp, save_merging_weights=str(file)
    )
    found = learned(method, models, data)
    saved = json.loads(file.read_text())
    assert saved["models"] == ["a", "b"] and saved["keys"] == KEYS
    coefficients = np.array(saved["coefficients"])
    assert coefficients.shape == (2, 2 if granularity == LAYERS else 1)
    assert (coefficients.min() >= 0 and coefficients.max() <= 1) == clamp
    again = AdaMergingAlgorithm(granularity, weights=str(file), max_steps=0)
    assert_close(learned(again, models, data), found, 1e-6)


def test_clamped_coefficients_stay_between_0_and_1() -> None:
    models, data = linear_models(), linear_data()
    for start, used in ((2.0, 1.0), (-0.5, 0.0), (0.25, 0.25)):
        method = AdaMergingAlgorithm(init_values=start, max_steps=0, clamp_weights=True)
        expected = fused(TaskArithmeticAlgorithm(used), models)
        assert_close(learned(method, models, data), expected, 1e-6)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    models, data = linear_models(), linear_data()
    others = {
        "models": write(tmp_path / "1", ["b", "a"], KEYS, [[1, 1], [1, 1]]),
        "keys": write(tmp_path / "2", ["a", "b"], ["bias", "weight"], [[1, 1], [1, 1]]),
        "granularity": write(tmp_path / "3", ["a", "b"], KEYS, [[1], [1]]),
    }
    for file in others.values():
        with pytest.raises(FusionBenchError, match=r"weights: '.*' contains coefficients of"):
            learned(AdaMergingAlgorithm(weights=file), models, data)
    (tmp_path / "4").write_text("no JSON")
    (tmp_path / "5").write_text("[1]")
    (tmp_path / "6").write_text("{}")
    for name in "4567":
        with pytest.raises(FusionBenchError, match=r"weights: '.*' is not a file of coeff"):
            learned(AdaMergingAlgorithm(weights=str(tmp_path / name)), models, data)
    blocked = str(tmp_path / "4" / "found.json")
    with pytest.raises(FusionBenchError, match=r"save_merging_weights: cannot write"):
        learned(AdaMergingAlgorithm(max_steps=0, save_merging_weights=blocked), models, data)


AGREE = {  # of each task vector the two largest elements are kept
    "a": ([5, -1, 0.5, 3, -2], [5, 0, 0, 0, 0]),
    "b": ([-4, -2, 0.1, 1, 6], [0, 0, 0, 0, 6]),
    "c": ([1, -3, 0.2, -7, 0.3], [0, -3, 0, -7, 0]),
}


def test_plusplus_keeps_what_is_large_and_agrees(tmp_path: Path) -> None:
    base = [10.0, 20, 30, 40, 50]
    models = {BASE: module(base)}
    for name, (vector, _) in AGREE.items():
        models[name] = module(np.add(base, vector))
    pool = TrainablePool(models)
    found = TiesMergingAlgorithm(threshold=0.4).agreeing(pool)
    for name, (_, kept) in AGREE.items():
        assert found[name]["weight"].tolist() == np.add(base, kept).tolist()
    untouched = TiesMergingAlgorithm(threshold=0.4, remove_keys=["w*"]).agreeing(pool)
    assert untouched["a"]["weight"].tolist() == base

    data = {name: Images([0.0], [0]) for name in "abc"}
    file = write(tmp_path / "f", list("abc"), ["weight"], [[1], [2], [3]])
    method = AdaMergingAlgorithm(weights=file, max_steps=0, plusplus=True, threshold=40)
    merged = learned(method, models, data)
    assert merged["weight"].tolist() == np.add(base, [5, -9, 0, -21, 12]).tolist()


@pytest.mark.parametrize("granularity", [LAYERS, TASKS])
def test_plusplus_begins_with_the_sum_of_ties(granularity: Any) -> None:
    modules = small_models("net")
    data = {name: Images(torch.zeros(1, 2, 6, 6), [0]) for name in "abc"}
    method = AdaMergingAlgorithm(granularity, 0.4, max_steps=0, plusplus=True, threshold=30)
    found = learned(method, modules, data)
    ties = fused(TiesMergingAlgorithm(0.4, threshold=30, merge_func="sum"), modules)
    for key, _ in modules[BASE].named_parameters():
        torch.testing.assert_close(found[key], ties[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("plusplus", [False, True])
def test_every_precision(dtype: torch.dtype, plusplus: bool) -> None:
    wide, data = linear_models(), linear_data()
    models = {name: deepcopy(model).to(dtype) for name, model in wide.items()}
    for task in data.values():
        task.images = task.images.to(dtype)
    options: dict[str, Any] = {"lr": 0.05, "plusplus": plusplus, "threshold": 100}
    still = learned(AdaMergingAlgorithm(max_steps=0, **options), models, data)
    moved = learned(AdaMergingAlgorithm(max_steps=5, **options), models, data)
    for key in KEYS:
        assert still[key].dtype == moved[key].dtype == dtype
        assert moved[key].isfinite().all() and not torch.equal(moved[key], still[key])
    if not plusplus:
        exact = summed(models, [[0.3, 0.3]] * 2)
        for key in KEYS:
            torch.testing.assert_close(still[key], exact[key].to(dtype))


def test_what_is_stored_is_the_policys() -> None:
    models, data = linear_models(), linear_data()
    pool = TrainablePool(models)
    pool.policy = MergePolicy(dtype="bfloat16")
    result = in_memory(AdaMergingAlgorithm(max_steps=0).run(pool, CPU, data))
    expected = summed(models, [[0.3, 0.3]] * 2)
    for key in KEYS:
        assert torch.equal(result[key], expected[key].bfloat16())


def test_models_that_differ_are_refused() -> None:
    models, data = linear_models(), linear_data()
    with pytest.raises(FusionBenchError, match=r"b: 'weight' is \[3, 5\], in _pretrained_ \[3, 4"):
        learned(AdaMergingAlgorithm(), models | {"b": linear(1, inputs=5)}, data)
    broken = deepcopy(models["b"])
    nn.init.constant_(broken.get_parameter("bias"), torch.nan)
    with pytest.raises(FusionBenchError, match="NaN"):
        learned(AdaMergingAlgorithm(max_steps=1), models | {"b": broken}, data)


def test_no_label_is_looked_at_and_each_step_sees_each_task() -> None:
    models, data, blind = linear_models(), linear_data(), linear_data()
    for task in blind.values():
        task.labels = torch.full((12,), -1)
    method = AdaMergingAlgorithm(max_steps=4, batch_size=5)
    expected = learned(method, models, data)
    assert_close(learned(method, models, blind), expected, 0)
    assert [task.drawn for task in data.values()] == [4, 4]
    assert not AdaMergingAlgorithm.uses_labels


def test_a_seed_tells_which_images_come_when() -> None:
    models = linear_models()

    def found(seed: int | None) -> list[float]:
        method = AdaMergingAlgorithm(max_steps=4, lr=0.1, batch_size=2, seed=seed)
        return learned(method, models, linear_data())["bias"].tolist()

    assert found(7) == found(7) != found(8)
    assert found(None) == found(0)


def test_a_single_model_and_models_equal_to_the_base() -> None:
    models, data = linear_models("a"), linear_data("a")
    method = AdaMergingAlgorithm(init_values=None, max_steps=0)
    assert_close(learned(method, models, data), dict(models["a"].state_dict()), 1e-6)
    same = dict.fromkeys([BASE, "a", "b"], models[BASE])
    found = learned(AdaMergingAlgorithm(max_steps=3), same, linear_data())
    assert_close(found, dict(models[BASE].state_dict()), 0)


def test_numbers_alone_are_learned_too() -> None:
    models = {BASE: module(0.0), "a": module(1.0)}

    def classify(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([x * model.get_parameter("weight"), 0 * x], dim=-1)

    task = Images([1.0], [0], classify)
    found = learned(AdaMergingAlgorithm(lr=0.1, max_steps=10), models, {"a": task})
    assert found["weight"].shape == () and float(found["weight"]) > 0.3  # the larger, the surer


def test_models_and_data_belong_together_by_name() -> None:
    models, data = linear_models(), linear_data()
    method = AdaMergingAlgorithm(max_steps=2)
    expected = learned(method, models, data)
    more = {"c": Images([[0.0] * 4], [0]), **data}
    assert_close(learned(method, models, more), expected, 0)
    spelled = {BASE: models[BASE], "Task-A": models["a"], "b": models["b"]}
    assert_close(learned(method, spelled, {"task_a": data["a"], "b": data["b"]}), expected, 0)
    with pytest.raises(FusionBenchError, match=r"no data for the model 'b'.*datasets for: a\."):
        learned(method, models, {"a": data["a"]})
    with pytest.raises(FusionBenchError, match="_pretrained_"):
        learned(method, {name: models[name] for name in "ab"}, data)


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"granularity: 'layers' is unknown\. Did"):
        AdaMergingAlgorithm("layers")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"split: 'val' is unknown"):
        AdaMergingAlgorithm(split="val")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"batch_size: 0"):
        AdaMergingAlgorithm(batch_size=0)
    with pytest.raises(FusionBenchError, match=r"max_steps: -1"):
        AdaMergingAlgorithm(max_steps=-1)
