from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_data import CPU, Array, Task, clip_family, learned, linear, normal
from fixtures_weights import all_bits
from torch import Tensor, nn

import fusion_bench.method
from fusion_bench.instantiate import instantiate
from fusion_bench.method import FisherMergingAlgorithm, fisher_merging
from fusion_bench.method.checks import BASE, TrainablePool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import in_memory


class Given(FisherMergingAlgorithm):
    """Fisher information that is given, not estimated."""

    given: dict[str, Sequence[float]]

    def fisher(self, module: nn.Module, name: str, data: Any) -> dict[str, Tensor]:
        return {"weight": torch.tensor([self.given[name]])}


@pytest.mark.parametrize(
    ("fishers", "models", "options", "expected"),
    [
        ([[1.0], [3.0]], [[1.0], [2.0]], {}, [1.75]),
        ([[5.0], [5.0]], [[1.0], [2.0]], {}, [1.5]),
        ([[0.0], [3.0]], [[1.0], [2.0]], {}, [2]),
        ([[0.0], [0.0]], [[1.0], [2.0]], {}, [1.5]),
        ([[0.0], [1.0]], [[1.0], [4.0]], {"minimal_fisher_weight": 1}, [3]),
        # F/|F| is (0.6, 0.8) and (0, 1)
        ([[3.0, 4.0], [0.0, 10.0]], [[1.0, 1.0], [2.0, 2.0]], {"normalize": True}, [1, 2.8 / 1.8]),
        ([[0.0, 0.0], [0.0, 9.0]], [[1.0, 1.0], [2.0, 2.0]], {"normalize": True}, [1.5, 2]),
        # (F+1)/(|F|+1) is 4/6, 5/6 and 1/3, 3/3
        (
            [[3.0, 4.0], [0.0, 2.0]],
            [[1.0, 1.0], [2.0, 2.0]],
            {"normalize": True, "minimal_fisher_weight": 1},
            [4 / 3, (5 / 6 + 2) / (5 / 6 + 1)],
        ),
    ],
)
def test_by_hand(
    fishers: list[list[float]],
    models: list[list[float]],
    options: dict[str, Any],
    expected: list[float],
) -> None:
    options = {"normalize": False, "minimal_fisher_weight": 0} | options
    method = Given(normalize_fisher_weight=options.pop("normalize"), **options)
    method.given = dict(zip("ab", fishers, strict=True))
    modules = {name: linear([values]) for name, values in zip("ab", models, strict=True)}
    found = learned(method, modules, {name: Task([[0.0]]) for name in "ab"})
    assert found["weight"][0].tolist() == pytest.approx(expected, rel=1e-6)


def logistic(seed: int, samples: int = 12) -> tuple[nn.Linear, Task]:
    """Return a multinomial logistic regression of 3 features and 4 classes, and data."""
    labels = torch.randint(0, 4, (samples,), generator=torch.Generator().manual_seed(seed))
    return linear(normal(4, 3, seed=seed)), Task(normal(samples, 3, seed=-seed), labels)


def answers(model: nn.Linear, task: Task) -> tuple[Array, Array]:
    """Return inputs and probabilities."""
    inputs = task.inputs.numpy().astype(np.float64)
    logits = inputs @ model.weight.detach().numpy().astype(np.float64).T
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return inputs, exponents / exponents.sum(axis=1, keepdims=True)


def closed_form(model: nn.Linear, task: Task) -> Array:
    inputs, probs = answers(model, task)
    return np.asarray((probs * (1 - probs)).T @ inputs**2 / len(task))


def estimated(model: nn.Linear, task: Task, **options: Any) -> Array:
    method = FisherMergingAlgorithm(num_fisher_examples=None, **options)
    return method.fisher(model, "a", task)["weight"].numpy().astype(np.float64)


def test_exact_is_the_closed_form_of_logistic_regression() -> None:
    model, task = logistic(1)
    found = estimated(model, task)
    np.testing.assert_allclose(found, closed_form(model, task), rtol=1e-12)
    single = estimated(model.float(), Task(task.inputs.float()))
    np.testing.assert_allclose(single, closed_form(model, task), rtol=1e-5)


def test_how_many_gradients_are_held_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = estimated(*logistic(1))
    for floats in (1, 3 * 12):
        monkeypatch.setattr(fisher_merging, "_FLOATS", floats)
        np.testing.assert_allclose(estimated(*logistic(1)), expected, rtol=1e-12)


def test_sampled_approaches_exact() -> None:
    model, task = logistic(2, samples=3)
    many = Task(task.inputs.repeat(400, 1))
    expected = closed_form(model, task)
    found = estimated(model, many, estimator="sampled")
    assert np.abs(found - expected).max() < 0.1 * expected.max()
    other = estimated(model, many, estimator="sampled", seed=1)
    assert (other != found).any()


def test_empirical_takes_the_labels() -> None:
    model, task = logistic(3)
    inputs, probs = answers(model, task)
    expected = ((np.eye(4)[task.labels] - probs) ** 2).T @ inputs**2 / len(task)
    np.testing.assert_allclose(estimated(model, task, estimator="empirical"), expected, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batch_sqrt_squares_a_batch_s_sum(batch_size: int) -> None:
    model, task = logistic(4)
    inputs, probs = answers(model, task)
    roots = np.sqrt(probs)
    per_logit = roots - probs * roots.sum(axis=1, keepdims=True)
    expected = np.zeros((4, 3))
    for start in range(0, 12, batch_size):
        part = slice(start, start + batch_size)
        expected += (per_logit[part].T @ inputs[part]) ** 2 / 12
    found = estimated(model, task, estimator="batch_sqrt", batch_size=batch_size)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_merging_against_the_formula() -> None:
    (a, of_a), (b, of_b) = logistic(5), logistic(6)
    fishers = [closed_form(a, of_a), closed_form(b, of_b)]
    weights = [(f + 1e-3) / (np.linalg.norm(f) + 1e-3) for f in fishers]
    thetas = [model.weight.detach().numpy() for model in (a, b)]
    expected = sum(w * t for w, t in zip(weights, thetas, strict=True)) / sum(weights)
    method = FisherMergingAlgorithm(minimal_fisher_weight=1e-3)
    found = learned(method, {"a": a, "b": b}, {"a": of_a, "b": of_b})
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-12)


class Small(nn.Module):
    """Entries of which some do not matter, some are no parameters, and some are frozen."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
            self.unused = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(5)
            self.norm.get_buffer("running_mean").copy_(torch.randn(5))
        self.first.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.second(self.norm(self.first(inputs)).tanh())
        return answer


def small() -> tuple[dict[str, nn.Module], dict[str, Task]]:
    modules: dict[str, nn.Module] = {name: Small(i) for i, name in enumerate((BASE, "a", "b"))}
    return modules, {"a": logistic(7)[1], "b": logistic(8)[1]}


def single(data: dict[str, Task]) -> dict[str, Task]:
    return {name: Task(task.inputs.float(), task.labels) for name, task in data.items()}


def mean(modules: dict[str, nn.Module], key: str) -> Tensor:
    return torch.stack([modules[name].state_dict()[key] for name in "ab"]).mean(dim=0)


def test_what_is_excluded_stays_the_pretrained_model_s() -> None:
    modules, data = small()
    method = FisherMergingAlgorithm(["^second", r"norm\.weight"])
    found = learned(method, modules, single(data))
    base = modules[BASE].state_dict()
    for key in ("second.weight", "second.bias", "norm.weight"):
        assert torch.equal(found[key], base[key])
    assert not torch.allclose(found["first.weight"], base["first.weight"])
    del modules[BASE]
    found = learned(method, modules, single(data))
    torch.testing.assert_close(found["second.weight"], mean(modules, "second.weight"))
    everything = learned(FisherMergingAlgorithm([""]), small()[0], single(data))
    assert all(torch.equal(everything[key], base[key]) for key, _ in Small(0).named_parameters())


def test_what_has_no_gradient_is_averaged() -> None:
    modules, data = small()
    found = learned(FisherMergingAlgorithm(minimal_fisher_weight=0), modules, single(data))
    for key in ("unused.weight", "unused.bias", "norm.running_mean"):
        torch.testing.assert_close(found[key], mean(modules, key))
    assert found["norm.num_batches_tracked"] == 0


def test_frozen_parameters_count_like_any_other() -> None:
    modules, data = small()
    found = learned(FisherMergingAlgorithm(), modules, single(data))
    for module in modules.values():
        module.requires_grad_(True)
    thawed = learned(FisherMergingAlgorithm(), modules, single(data))
    assert all_bits(thawed) == all_bits(found)
    assert not torch.allclose(found["first.weight"], mean(modules, "first.weight"))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "batch_sqrt"])
def test_a_seed_tells_all_and_the_models_stay_as_they_are(estimator: Any) -> None:
    modules, data = small()
    before = {name: all_bits(module.state_dict()) for name, module in modules.items()}

    def found(seed: int) -> Any:
        method = FisherMergingAlgorithm(num_fisher_examples=5, estimator=estimator, seed=seed)
        with torch.no_grad():  # which must not matter
            return all_bits(learned(method, modules, single(data)))

    assert found(1) == found(1) != found(2)
    assert {name: all_bits(module.state_dict()) for name, module in modules.items()} == before
    for module in modules.values():
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not module.get_parameter("first.weight").requires_grad


def test_half_precision_is_summed_wide() -> None:
    model, task = logistic(9)
    exact = estimated(model, task)
    half = model.bfloat16()
    method = FisherMergingAlgorithm(num_fisher_examples=None)
    found = method.fisher(half, "a", Task(task.inputs.repeat(50, 1).bfloat16()))["weight"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), exact, rtol=0.1)


def test_a_broken_model_is_noticed() -> None:
    modules, data = small()
    task = Task(torch.full((2, 3), torch.nan))
    with pytest.raises(FusionBenchError, match="NaN"):
        learned(FisherMergingAlgorithm(), modules, single(data) | {"b": task})


def test_the_clip_family(family: Path, program_config: dict[str, Any]) -> None:
    pool, _, data = clip_family(family, program_config)
    method = FisherMergingAlgorithm(minimal_fisher_weight=0)
    found = in_memory(method.run(pool, CPU, data))
    fishers = []
    for name in pool.model_names:
        module = pool.load_model(name)
        parameters = dict(module.named_parameters())
        classify = data[name].classify(module)
        total = {key: torch.zeros_like(value) for key, value in parameters.items()}
        for images, _ in data[name].batches(np.arange(4), 1):
            log_probs = classify(images)[0].log_softmax(dim=0)
            for log_prob in log_probs:
                gradients = torch.autograd.grad(
                    log_prob, list(parameters.values()), retain_graph=True
                )
                for key, gradient in zip(parameters, gradients, strict=True):
                    total[key] += log_prob.detach().exp() * gradient**2
        norm = torch.cat([value.flatten().double() for value in total.values()]).norm()
        fishers.append({key: value / norm for key, value in total.items()})
    weights = [pool.weights(name) for name in pool.model_names]
    for key, value in found.items():
        # Keys' biases do not change what attention does: their gradients are noise.
        if not key.endswith("k_proj.bias"):
            sums = [f[key] * w[key] for f, w in zip(fishers, weights, strict=True)]
            expected = sum(sums) / sum(f[key] for f in fishers)
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    assert list(found) == list(pool.weights(BASE))


def test_fusion_bench_s_config_is_taken() -> None:
    node = {
        "_target_": "fusion_bench.method.FisherMergingForCLIPVisionModel",
        "exclude_param_names_regex": [],
        "normalize_fisher_weight": True,
        "minimal_fisher_weight": 1e-6,
        "num_fisher_examples": 256,
        "dataloader_kwargs": {"batch_size": 16, "num_workers": 0},
    }
    method = instantiate(node)
    assert isinstance(method, FisherMergingAlgorithm) and method.batch_size == 16
    assert "FisherMergingForCLIPVisionModel" in fusion_bench.method.__all__


def test_only_empirical_looks_at_labels() -> None:
    assert FisherMergingAlgorithm(estimator="empirical").uses_labels
    assert not FisherMergingAlgorithm(estimator="sampled").uses_labels


def test_bad_arguments() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"estimator": "exakt"}, r"estimator.*Did you mean 'exact'"),
        ({"split": "val"}, r"split: 'val' is unknown"),
        ({"minimal_fisher_weight": -1}, r"minimal_fisher_weight: -1"),
        ({"num_fisher_examples": 0}, r"num_fisher_examples: 0"),
        ({"batch_size": 0}, r"batch_size: 0"),
        ({"dataloader_kwargs": {"shuffel": 1}}, r"dataloader_kwargs: 'shuffel'"),
    ]
    for options, message in bad:
        with pytest.raises(FusionBenchError, match=message):
            FisherMergingAlgorithm(**options)
    modules, data = small()
    with pytest.raises(FusionBenchError, match="no data for the model 'b'"):
        FisherMergingAlgorithm().run(TrainablePool(modules), CPU, {"a": data["a"]})
