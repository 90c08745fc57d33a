import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_contract import family as small_models
from fixtures_method import module
from fixtures_tuning import CPU, Images, fused, learned, linear, linear_data, linear_models
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fusion_bench.method import GreedySoupAlgorithm, LearnedSoupAlgorithm, SimpleAverageAlgorithm
from fusion_bench.method.adamerging import Mixture
from fusion_bench.method.checks import BASE, TrainablePool, assert_close
from fusion_bench.problems import FusionBenchError
from fusion_bench.results import ACCURACY, METRICS, Metric
from fusion_bench.weights import MergePolicy, TensorWeights, in_memory

both = pytest.mark.parametrize("granularity", ["model", "layer"])


class Evaluated:
    """A task whose score is a function of the weight; ``seen`` lists the weights."""

    def __init__(self, score: Callable[[float], float], metric: Metric = ACCURACY):
        self._score = score
        self.metric = metric
        self.seen: list[float] = []

    def evaluate(self, model: nn.Module) -> SimpleNamespace:
        self.seen.append(model.get_parameter("weight").item())
        found = self._score(self.seen[-1])
        return SimpleNamespace(value=lambda metric: found)


def greedy(
    values: Mapping[str, float], *scores: Callable[[float], float], accept_equal: bool = False
) -> tuple[float, list[float]]:
    """Return the soup of scalars, and the scalars that were evaluated."""
    tasks = {str(i): Evaluated(score) for i, score in enumerate(scores)}
    models = {name: module(value) for name, value in values.items()}
    state = learned(GreedySoupAlgorithm(accept_equal), models, tasks)
    return float(state["weight"]), tasks["0"].seen


def near(target: float) -> Callable[[float], float]:
    return lambda weight: -abs(weight - target)


def test_a_greedy_soup_by_hand() -> None:
    soup, seen = greedy({"a": 0.0, "b": 1.0, "c": 5.0}, near(0.5))
    assert soup == 0.5  # of 0 and 1, which are equally good, 0 is the first; 5 makes it worse
    assert seen == [0, 1, 5, 0.5, 2]
    soup, seen = greedy({"c": 5.0, "b": 1.0, "a": 0.0}, near(0.5))
    assert soup == 0.5 and seen == [5, 1, 0, 0.5, 2]


def soup_of(values: Mapping[str, float], tasks: Mapping[str, Evaluated]) -> float:
    models = {name: module(value) for name, value in values.items()}
    return float(learned(GreedySoupAlgorithm(), models, tasks)["weight"])


def test_where_lower_is_better_the_lowest_leads() -> None:
    def error(weight: float) -> float:
        return 1 + abs(weight - 0.5)

    tasks = {"t": Evaluated(error, METRICS["rmse"])}
    assert soup_of({"c": 5.0, "b": 1.0, "a": 0.0}, tasks) == 0.5


def test_tasks_of_different_metrics_count_by_shares_of_the_best() -> None:
    tasks = {
        "share": Evaluated(lambda weight: 0.9 if weight < 1 else 0.3),
        "error": Evaluated(lambda weight: 20 + abs(weight), METRICS["rmse"]),
    }
    # Of 0 and 4 the first is best on both; half way, the share is kept and the error grows.
    assert soup_of({"a": 4.0, "b": 0.0}, tasks) == 0.0
    tasks["error"] = Evaluated(lambda weight: 20 - abs(weight), METRICS["rmse"])
    # Now 4 has the lower error: the average of both has 18 to 16, and a share of 0.3.
    assert soup_of({"a": 4.0, "b": 0.0}, tasks) == 0.0
    plain = {"a": Evaluated(lambda weight: 0.5), "b": Evaluated(abs, METRICS["perplexity"])}
    with pytest.raises(FusionBenchError, match="perplexity cannot be normalised"):
        soup_of({"a": 4.0, "b": 1.0}, plain)


def test_a_model_that_changes_nothing_joins_only_if_told_to() -> None:
    models = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert greedy(models, lambda weight: -abs(weight - 2) // 1)[0] == 2  # c alone
    flat = lambda weight: 1.0  # noqa: E731
    assert greedy(models, flat) == (1, [1, 3, 2, 2, 1.5])
    assert greedy(models, flat, accept_equal=True) == (2, [1, 3, 2, 2, 2])


def test_all_tasks_count_alike() -> None:
    assert greedy({"a": 0.0, "b": 1.0}, near(0), near(0), near(1))[0] == 0
    big = lambda weight: 1000 * near(1)(weight)  # noqa: E731
    assert greedy({"a": 0.0, "b": 1.0}, near(0), big)[0] == 1


def test_a_soup_of_one_is_that_model_and_of_equals_too() -> None:
    assert greedy({"a": 4.0}, near(0)) == (4, [4])
    assert greedy({"a": 4.0, "b": 4.0}, near(0), accept_equal=True)[0] == 4


def by_hand(models: dict[str, nn.Module], data: dict[str, Images]) -> list[str]:
    """Return the names of those that make the best soup, with the counts of right answers."""

    def right(names: list[str]) -> float:
        states = [models[name].state_dict() for name in names]
        mean = {key: sum(s[key].double() for s in states) / len(states) for key in states[0]}
        found = 0.0
        for task in data.values():
            answers = functional_call(linear(0).double(), mean, task.images.double())
            found += float((answers.argmax(1) == task.labels).double().mean())
        return found

    ranked = sorted(models, key=lambda name: (-right([name]), list(models).index(name)))
    chosen = ranked[:1]
    for name in ranked[1:]:
        if right([*chosen, name]) > right(chosen):
            chosen.append(name)
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_a_greedy_soup_against_the_recipe(seed: int) -> None:
    models = {name: linear(10 * seed + i) for i, name in enumerate("abcde")}
    data = linear_data("xy", size=40)
    chosen = by_hand(models, data)
    expected = fused(SimpleAverageAlgorithm(), {name: models[name] for name in chosen})
    assert_close(learned(GreedySoupAlgorithm(), models, data), expected, 1e-6)


def test_soups_of_every_kind_of_entry() -> None:
    modules = small_models("net")
    images = Images(torch.randn(6, 2, 6, 6), torch.arange(6))
    pool = TrainablePool(modules)
    pool.policy = MergePolicy(dtype="bfloat16")
    average = fused(SimpleAverageAlgorithm(), modules)
    stay: Any
    for stay in (GreedySoupAlgorithm(accept_equal=True), LearnedSoupAlgorithm(max_steps=0)):
        images.evaluate = lambda model: SimpleNamespace(value=lambda metric: 1.0)  # type: ignore[method-assign]
        found = learned(stay, modules, {"a": images})
        assert_close(found, average, 1e-6)  # running statistics and counters too
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
        narrow = in_memory(stay.run(pool, CPU, {"a": images}))
        assert narrow["conv.weight"].dtype == torch.bfloat16


def quadratic(**best: float) -> Images:
    """Return a task whose loss is least where each parameter has its value in ``best``.

    The logit of the right class is the negative square of the distance from there. The rest of the
    rows, of fixed logits and two labels, are best answered at the temperature 1.
    """
    rows = [*range(len(best)), *[-1] * 4]
    labels = [*[0] * len(best), 0, 0, 0, 1]

    def classify(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def logits(images: Tensor) -> Tensor:
            right = [
                -4 * (model.get_parameter(list(best)[i]) - best[list(best)[i]]).square()
                if i >= 0
                else torch.tensor(math.log(3))
                for i in images.tolist()
            ]
            return torch.stack([torch.stack(right), torch.zeros(len(right))], dim=-1)

        return logits

    return Images(rows, labels, classify)


class Two(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(value)) for _ in range(2))


def test_the_learned_weight_is_the_best_one() -> None:
    method = LearnedSoupAlgorithm(lr=0.2, max_steps=120)
    for best in (0.3, 0.8):
        models = {"a": module(0.0), "b": module(1.0)}
        found = learned(method, models, {"a": quadratic(weight=best)})
        assert float(found["weight"]) == pytest.approx(best, abs=0.01)
    three = {"a": module(1.0), "b": module(3.0), "c": module(-5.0)}
    found = learned(method, three, {"a": quadratic(weight=2)})
    assert float(found["weight"]) == pytest.approx(2, abs=0.03)


def test_weights_never_leave_the_models_hull() -> None:
    models = {"a": module(0.0), "b": module(1.0)}
    found = learned(LearnedSoupAlgorithm(lr=0.2, max_steps=100), models, {"a": quadratic(weight=3)})
    assert 0.7 < float(found["weight"]) <= 1


def test_each_layer_has_a_weight_of_its_own_if_told_so() -> None:
    models = {"a": Two(0.0), "b": Two(1.0)}
    task = quadratic(u=0.3, v=0.8)
    by_layer = learned(LearnedSoupAlgorithm("layer", lr=0.2, max_steps=120), models, {"a": task})
    assert float(by_layer["u"]) == pytest.approx(0.3, abs=0.01)
    assert float(by_layer["v"]) == pytest.approx(0.8, abs=0.01)
    by_model = learned(LearnedSoupAlgorithm(lr=0.2, max_steps=120), models, {"a": task})
    assert float(by_model["u"]) == float(by_model["v"]) == pytest.approx(0.55, abs=0.01)


def loss(
    models: dict[str, nn.Module], logits: Tensor, temperature: float, data: dict[str, Images]
) -> float:
    """Return the mean cross entropy of the soup in float64."""
    weights = logits.softmax(dim=0).expand(-1, 2)
    states = [model.state_dict() for model in models.values()]
    soup = {
        key: sum(w * state[key].double() for w, state in zip(weights[:, i], states, strict=True))
        for i, key in enumerate(states[0])
    }
    found = 0.0
    for task in data.values():
        answers = functional_call(linear(0).double(), soup, task.images.double())
        found += float(cross_entropy(temperature * answers, task.labels)) / len(data)
    return found


@both
def test_the_gradient_is_that_of_the_cross_entropy(granularity: str) -> None:
    models = {name: model for name, model in linear_models("abc").items() if name != BASE}
    data, columns = linear_data("abc"), 2 if granularity == "layer" else 1
    logits = torch.randn(3, columns, generator=torch.Generator().manual_seed(5))
    logits.requires_grad_(True)
    built = deepcopy(models["a"])
    mixture = Mixture(
        built, ["weight", "bias"], None, {n: m.state_dict() for n, m in models.items()}
    )
    weights = logits.softmax(dim=0)
    mixture.set(weights.detach())
    for task in data.values():
        (cross_entropy(1.5 * built(task.images), task.labels) / 3).backward()
    weights.backward(mixture.gradient(columns))
    assert logits.grad is not None
    for place in np.ndindex(*logits.shape):
        step = torch.zeros(3, columns, dtype=torch.float64)
        step[place] = 1e-5
        up, down = (
            loss(models, logits.detach().double() + sign * step, 1.5, data) for sign in (1, -1)
        )
        assert float(logits.grad[place]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5)


@both
def test_the_loss_falls_from_that_of_the_average(granularity: Any) -> None:
    models, data = linear_models("abc"), linear_data("abc")
    found = []
    for steps in (0, 5, 20, 80):
        method = LearnedSoupAlgorithm(granularity, max_steps=steps)
        state = learned(method, models, data)
        if steps == 0:
            assert_close(state, fused(SimpleAverageAlgorithm(), models), 1e-6)
        answers = {n: functional_call(nn.Linear(4, 3), state, d.images) for n, d in data.items()}
        found.append(  # at the best temperature of a few
            min(
                sum(float(cross_entropy(t * own, data[n].labels)) for n, own in answers.items())
                for t in np.linspace(0.1, 4, 40)
            )
        )
    assert found == sorted(found, reverse=True) and found[-1] < found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    models = {name: deepcopy(model).to(dtype) for name, model in linear_models().items()}
    data = linear_data()
    for task in data.values():
        task.images = task.images.to(dtype)
    method: Any
    for method in (LearnedSoupAlgorithm(max_steps=5), GreedySoupAlgorithm()):
        found = learned(method, models, data)
        assert all(value.dtype == dtype and value.isfinite().all() for value in found.values())
    still = learned(LearnedSoupAlgorithm(max_steps=0), models, data)
    assert_close(still, fused(SimpleAverageAlgorithm(), models), 1e-6)


def test_a_seed_tells_which_images_come_when() -> None:
    def found(seed: int | None) -> list[float]:
        method = LearnedSoupAlgorithm(max_steps=4, batch_size=2, seed=seed)
        return learned(method, linear_models(), linear_data())["bias"].tolist()

    assert found(7) == found(7) != found(8)
    assert found(None) == found(0)


def test_models_that_differ_are_refused() -> None:
    models = linear_models() | {"b": linear(1, inputs=5)}
    method: Any
    for method in (LearnedSoupAlgorithm(), GreedySoupAlgorithm()):
        with pytest.raises(FusionBenchError, match=r"b: 'weight' is \[3, 5\]"):
            learned(method, models, linear_data())


def test_a_module_that_names_its_parameters_otherwise_is_refused() -> None:
    pool = TrainablePool(linear_models())
    pool._models = {
        name: TensorWeights({f"old.{key}": value for key, value in weights.items()})
        for name, weights in pool._models.items()
    }
    pool.build_model = lambda weights: linear(0)  # type: ignore[method-assign]
    with pytest.raises(FusionBenchError, match=r"has a parameter 'weight' .* with a Linear"):
        LearnedSoupAlgorithm().run(pool, CPU, linear_data())


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"granularity: 'task' is unknown"):
        LearnedSoupAlgorithm("task")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"split: 'val' is unknown"):
        LearnedSoupAlgorithm(split="val")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"split: 'val' is unknown"):
        GreedySoupAlgorithm(split="val")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"batch_size: 0"):
        LearnedSoupAlgorithm(batch_size=0)
    with pytest.raises(FusionBenchError, match=r"max_steps: -1"):
        LearnedSoupAlgorithm(max_steps=-1)
