from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_data import CPU, Array, Task, clip_family, learned, linear, normal, regmean
from fixtures_weights import all_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion_bench.method
from fusion_bench.instantiate import instantiate
from fusion_bench.method import RegMeanAlgorithm
from fusion_bench.method import regmean as under_test
from fusion_bench.method.checks import BASE
from fusion_bench.method.regmean import collected_grams
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import in_memory

ROOT = 2**0.5  # two rows, so that the mean of the squares is the square

#: Inputs whose Gram matrices are diag(1, 4) and diag(9, 1).
DIAGONAL = {"a": Task([[ROOT, 0], [0, 2 * ROOT]]), "b": Task([[3 * ROOT, 0], [0, ROOT]])}


@pytest.mark.parametrize("ratio", [0, 0.95, 1])
def test_by_hand(ratio: float) -> None:
    modules = {"a": linear([[1, 1]]), "b": linear([[3, 5]])}
    found = learned(RegMeanAlgorithm(reduce_non_diagonal_ratio=ratio), modules, DIAGONAL)
    assert found["weight"][0].tolist() == pytest.approx([2.8, 1.8])


def test_only_the_diagonal_counts_with_a_ratio_of_0() -> None:
    # The Gram matrices are [[1, 1], [1, 4]] and [[9, -3], [-3, 1]].
    data = {"a": Task([[ROOT, ROOT], [0.0, 6**0.5]]), "b": Task([[3.0, -1]])}
    modules = {"a": linear([[1, 1]]), "b": linear([[3, 5]])}
    diagonal = learned(RegMeanAlgorithm(reduce_non_diagonal_ratio=0), modules, data)
    assert diagonal["weight"][0].tolist() == pytest.approx([2.8, 1.8])
    whole = learned(RegMeanAlgorithm(reduce_non_diagonal_ratio=1), modules, data)
    # [[10, -2], [-2, 5]] w = [1 + 1, 1 + 4] + [27 - 15, -9 + 5]
    assert whole["weight"][0].tolist() == pytest.approx([72 / 46, 38 / 46])


def problem(seed: int, models: int, rows: int = 9) -> tuple[dict[str, nn.Module], dict[str, Task]]:
    """Return layers of 4 inputs and 3 outputs, and inputs; all in float64."""
    modules: dict[str, nn.Module] = {}
    data = {}
    for i, name in enumerate("abcd"[:models]):
        own = 4 * seed + i
        modules[name] = linear(normal(3, 4, seed=own), normal(3, seed=own))
        data[name] = Task(normal(rows, 4, seed=-own) @ normal(4, 4, seed=-own - 1))
    return modules, data


def arrays(tensors: Any) -> list[Array]:
    return [tensor.detach().numpy().astype(np.float64) for tensor in tensors]


@settings(deadline=None, max_examples=examples(40))
@given(
    seed=st.integers(0, 10**6),
    models=st.integers(1, 4),
    ratio=st.sampled_from([0, 0.5, 0.95, 1]),
    batch_size=st.sampled_from([1, 4, 32]),
)
def test_against_the_formula(seed: int, models: int, ratio: float, batch_size: int) -> None:
    modules, data = problem(seed, models, rows=9)
    weights = arrays(module.get_parameter("weight") for module in modules.values())
    expected = regmean(weights, arrays(task.inputs for task in data.values()), ratio)
    method = RegMeanAlgorithm(reduce_non_diagonal_ratio=ratio, batch_size=batch_size)
    found = learned(method, modules, data)
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-4, atol=1e-4)
    biases = [module.get_parameter("bias").detach() for module in modules.values()]
    torch.testing.assert_close(found["bias"], torch.stack(biases).mean(dim=0))


def test_no_other_weight_is_nearer_to_the_models_outputs() -> None:
    modules, data = problem(1, models=3)
    found = learned(RegMeanAlgorithm(reduce_non_diagonal_ratio=1), modules, data)["weight"]

    @torch.no_grad()
    def distance(weight: Tensor) -> float:
        return sum(
            float((data[name].inputs @ (weight - module.get_parameter("weight")).T).square().sum())
            for name, module in modules.items()
        )

    least = distance(found)
    for seed in range(20):
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        assert distance(found + 1e-3 * noise) > least


def test_one_and_the_same_data_give_the_average() -> None:
    modules, data = problem(2, models=3)
    found = learned(RegMeanAlgorithm(), modules, dict.fromkeys(modules, data["a"]))
    weights = [module.get_parameter("weight").detach() for module in modules.values()]
    torch.testing.assert_close(found["weight"], torch.stack(weights).mean(dim=0))


@pytest.mark.parametrize("ratio", [0, 0.95, 1])
def test_inputs_that_never_occur_give_the_average(ratio: float) -> None:
    modules = {"a": linear([[1, 1, 1]]), "b": linear([[3, 5, 2]])}
    data = {name: Task([[*row, 0] for row in DIAGONAL[name].inputs]) for name in "ab"}
    data["b"].inputs *= 1e3  # the average is no matter of sizes
    method = RegMeanAlgorithm(reduce_non_diagonal_ratio=ratio)
    assert learned(method, modules, data)["weight"][0, 2] == pytest.approx(1.5)
    nothing = dict.fromkeys("ab", Task(torch.zeros(2, 3)))
    assert learned(method, modules, nothing)["weight"][0].tolist() == [2, 3, 1.5]


def test_a_layer_that_nothing_enters_in_one_model_is_the_others() -> None:
    modules = {"a": linear([[1, 1]]), "b": linear([[3, 5]])}
    data = {"a": Task(torch.zeros(2, 2)), "b": Task(1e-3 * DIAGONAL["b"].inputs)}
    assert learned(RegMeanAlgorithm(), modules, data)["weight"][0].tolist() == pytest.approx([3, 5])


def test_fewer_samples_than_inputs_in_single_precision() -> None:
    """With a ratio of 1 the matrix is singular, and rounding makes it indefinite."""
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(-3, 3, 64)
    data = {name: Task(torch.randn(5, 64, generator=random) * scales) for name in "ab"}
    modules = {name: linear(torch.randn(2, 64, generator=random)) for name in "ab"}
    found = learned(RegMeanAlgorithm(reduce_non_diagonal_ratio=1), modules, data)["weight"]
    for name, module in modules.items():
        wanted = module(data[name].inputs)
        answer = data[name].inputs @ found.T
        assert (answer - wanted).norm() < 0.01 * wanted.norm()


class Attention(nn.Module):
    """Three layers that are fed one tensor, one that is fed another, and ones that differ."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
            self.out = nn.Linear(4, 3)
            self.never = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4, bias=False)
        self.embed = self.tied  # one module under two names

    def forward(self, inputs: Tensor) -> Tensor:
        attention = (self.q(inputs) * self.k(inputs)).softmax(dim=-1)
        answer: Tensor = self.out(input=attention * self.v(inputs))
        return answer


def test_layers_that_are_fed_one_tensor_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Attention(), torch.randn(5, 7, 4)
    summed = under_test.gram_sum
    sums: list[Tensor] = []

    def counted(rows: Tensor) -> Tensor:
        sums.append(rows)
        return summed(rows)

    monkeypatch.setattr(under_test, "gram_sum", counted)
    with torch.no_grad(), collected_grams(model) as grams:
        model(inputs[:3])
        model(inputs[3:])
    assert len(sums) == 4  # two batches, each with one tensor for three layers and one for the last
    assert list(grams) == ["q.weight", "k.weight", "v.weight", "out.weight"]
    rows = inputs.reshape(-1, 4).double()
    for key in ("q.weight", "k.weight", "v.weight"):
        torch.testing.assert_close(grams[key].mean(), rows.T @ rows / 35, rtol=1e-5, atol=1e-5)
    model(inputs)
    assert len(sums) == 4


def test_layers_that_share_a_tensor_only_now_and_then() -> None:
    a, b = linear(torch.eye(2)), linear(torch.eye(2))
    module = nn.ModuleList([a, b])
    x, y = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 2]])
    with torch.no_grad(), collected_grams(module) as grams:
        a(x)
        b(x)
        b(y)
        a(y.clone())
        a(x)
        x += 1
        b(x)
    assert grams["0.weight"].mean().tolist() == [[2 / 3, 0], [0, 4 / 3]]
    expected = (torch.tensor([[1.0, 0], [0, 4]]) + torch.tensor([[4.0, 2], [2, 1]])) / 3
    torch.testing.assert_close(grams["1.weight"].mean(), expected.double())


def test_what_is_no_row_or_no_batch_of_rows_counts_too() -> None:
    layer = linear([[1.0, 2]])
    with collected_grams(layer) as grams:
        layer(torch.empty(0, 2))
        assert grams["weight"].mean().tolist() == [[0, 0], [0, 0]]
        layer(torch.tensor([1.0, 2]))
        layer(torch.ones(1, 1, 1, 2))
    assert grams["weight"].mean().tolist() == [[1, 1.5], [1.5, 2.5]]


def attention() -> tuple[dict[str, nn.Module], dict[str, Task]]:
    modules: dict[str, nn.Module] = {name: Attention(i) for i, name in enumerate((BASE, "a", "b"))}
    random = torch.Generator().manual_seed(1)
    return modules, {name: Task(torch.randn(9, 6, 4, generator=random)) for name in "ab"}


def mean(modules: dict[str, nn.Module], key: str) -> Tensor:
    return torch.stack([modules[name].state_dict()[key] for name in "ab"]).mean(dim=0)


def test_what_is_no_linear_layer_or_never_runs_is_averaged() -> None:
    modules, data = attention()
    found = learned(RegMeanAlgorithm(), modules, data)
    for key in ("q.bias", "out.bias", "never.weight", "tied.weight", "embed.weight"):
        torch.testing.assert_close(found[key], mean(modules, key))
    for key in ("q.weight", "out.weight"):
        assert not torch.allclose(found[key], mean(modules, key), atol=1e-3)


def test_what_is_excluded_stays_the_pretrained_model_s() -> None:
    modules, data = attention()
    method = RegMeanAlgorithm(exclude_param_names_regex=["^q", r"v\.bias"])
    found = learned(method, modules, data)
    for key in ("q.weight", "q.bias", "v.bias"):
        assert torch.equal(found[key], modules[BASE].state_dict()[key])
    assert not torch.allclose(found["v.weight"], modules[BASE].state_dict()["v.weight"])
    del modules[BASE]
    found = learned(method, modules, data)
    torch.testing.assert_close(found["q.weight"], mean(modules, "q.weight"))


def test_a_seed_tells_all_and_the_models_stay_as_they_are() -> None:
    modules, data = attention()
    before = {name: all_bits(module.state_dict()) for name, module in modules.items()}

    def found(seed: int) -> Any:
        return all_bits(learned(RegMeanAlgorithm(4, seed=seed), modules, data))

    assert found(1) == found(1) != found(2)
    assert {name: all_bits(module.state_dict()) for name, module in modules.items()} == before
    model = Attention()
    with pytest.raises(ZeroDivisionError), collected_grams(model):
        raise ZeroDivisionError
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_broken_model_is_noticed() -> None:
    modules, data = attention()
    data["b"].inputs[0] = torch.nan
    with pytest.raises(FusionBenchError, match="NaN"):
        learned(RegMeanAlgorithm(), modules, data)


def test_the_clip_family(family: Path, program_config: dict[str, Any]) -> None:
    pool, _, data = clip_family(family, program_config, dtype=torch.float64)
    found = in_memory(RegMeanAlgorithm().run(pool, CPU, data))
    keys = [key for key in found if ".layers." in key and found[key].ndim == 2]
    assert len(keys) == 12  # of two layers the four of attention and the two of the MLP
    inputs: dict[str, list[Array]] = {key: [] for key in keys}
    for name in pool.model_names:
        model = pool.load_model(name)
        for key in keys:
            model.get_submodule(key.removesuffix(".weight")).register_forward_hook(
                lambda _, args, __, key=key: inputs[key].append(args[0].detach().flatten(0, 1))
            )
        images, _ = next(data[name].batches(np.arange(4), 4))
        model(images.double())
    weights = [pool.weights(name) for name in pool.model_names]
    for key, value in found.items():
        own = arrays(model[key] for model in weights)
        average = sum(own) / 2
        if key not in keys:
            np.testing.assert_allclose(value.numpy(), average, rtol=1e-12)
            continue
        rows = arrays(inputs[key])
        expected = regmean(own, rows, 0.95)
        for inside in rows:  # a weight whose input is next to nothing may be anything
            answer = np.linalg.norm(inside @ expected.T)
            assert np.linalg.norm(inside @ (value.numpy() - expected).T) < 1e-4 * answer
            assert np.linalg.norm(inside @ (average - expected).T) > 0.1 * answer


def test_fusion_bench_s_config_is_taken() -> None:
    node = {
        "_target_": "fusion_bench.method.RegMeanAlgorithmForCLIP",
        "num_regmean_examples": 256,
        "exclude_param_names_regex": [],
        "reduce_non_diagonal_ratio": 0.95,
        "weight_transpose": True,
        "batch_size": 32,
        "num_workers": 0,
    }
    assert isinstance(instantiate(node), RegMeanAlgorithm)
    assert "RegMeanAlgorithmForCLIP" in fusion_bench.method.__all__


def test_bad_arguments() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"split": "val"}, r"split: 'val' is unknown"),
        ({"reduce_non_diagonal_ratio": 1.1}, r"reduce_non_diagonal_ratio: 1\.1"),
        ({"num_regmean_examples": 0}, r"num_regmean_examples: 0"),
        ({"batch_size": 0}, r"batch_size: 0"),
        ({"weight_transpose": False}, r"weight_transpose: false"),
    ]
    for options, message in bad:
        with pytest.raises(FusionBenchError, match=message):
            RegMeanAlgorithm(**options)
