from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_data import CPU, Array, Task, clip_family, learned, normal, regmean
from fixtures_weights import all_bits
from torch import Tensor, nn

import fusion_bench.method
from fusion_bench.instantiate import instantiate
from fusion_bench.method import RegMeanAlgorithm, RegMeanAlgorithmPlusPlus
from fusion_bench.method.checks import BASE
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import in_memory


class Block(nn.Module):
    """Two linear layers; called, and answering, in one of the ways that transformers do."""

    def __init__(self, way: str):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.way = way

    def forward(self, hidden_states: Tensor, scale: float) -> Any:
        hidden = hidden_states + self.down((scale * self.up(hidden_states)).tanh())
        return (hidden, None) if self.way == "tuple" else hidden


class Encoder(nn.Module):
    """Blocks between two linear layers, and a list that is shorter than theirs."""

    def __init__(self, seed: int, depth: int, way: str = "tensor"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.before = nn.Linear(3, 4)
            self.layers = nn.ModuleList(Block(way) for _ in range(depth))
            self.behind = nn.Linear(4, 2)
            self.double()
        self.others = nn.ModuleList()
        self.way = way

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.before(inputs)
        for block in self.layers:
            if self.way == "keywords":
                hidden = block(hidden_states=hidden, scale=0.5)
            else:
                output = block(hidden, scale=0.5)
                hidden = output[0] if self.way == "tuple" else output
        answer: Tensor = self.behind(hidden)
        return answer


def problem(depth: int, way: str = "tensor") -> tuple[dict[str, nn.Module], dict[str, Task]]:
    modules: dict[str, nn.Module] = {
        name: Encoder(i, depth, way) for i, name in enumerate((BASE, "a", "b"))
    }
    return modules, {name: Task(normal(40, 3, seed=i)) for i, name in enumerate("ab")}


def values(model: nn.Module) -> dict[str, Array]:
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


def affine(weights: dict[str, Array], name: str, inputs: Array) -> Array:
    return np.asarray(inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])


def reference(
    modules: dict[str, nn.Module], data: dict[str, Task], ratio: float
) -> dict[str, Array]:
    """Return the merged weights, block by block, in numpy."""
    models = [values(modules[name]) for name in "ab"]
    merged = {key: (models[0][key] + models[1][key]) / 2 for key in models[0]}
    hidden = [affine(merged, "before", data[name].inputs.numpy()) for name in "ab"]
    for index in range(len(list(modules["a"].get_submodule("layers").children()))):
        up, down = f"layers.{index}.up", f"layers.{index}.down"
        inside = [np.tanh(affine(m, up, h) / 2) for m, h in zip(models, hidden, strict=True)]
        for name, inputs in ((up, hidden), (down, inside)):
            key = f"{name}.weight"
            merged[key] = regmean([model[key] for model in models], inputs, ratio)
        hidden = [h + affine(merged, down, np.tanh(affine(merged, up, h) / 2)) for h in hidden]
    return merged


@pytest.mark.parametrize("way", ["tensor", "tuple", "keywords"])
@pytest.mark.parametrize("ratio", [0.5, 1])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_against_the_formula(way: str, ratio: float, batch_size: int) -> None:
    modules, data = problem(2, way)
    method = RegMeanAlgorithmPlusPlus(reduce_non_diagonal_ratio=ratio, batch_size=batch_size)
    found = learned(method, modules, data)
    expected = reference(modules, data, ratio)
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].numpy(), value, rtol=1e-6, atol=1e-6)


def test_one_block_is_regmean_where_what_stands_before_it_is_the_same() -> None:
    modules, data = problem(1)
    for module in modules.values():
        module.get_submodule("before").load_state_dict(
            modules["a"].get_submodule("before").state_dict()
        )
    found = learned(RegMeanAlgorithmPlusPlus(), modules, data)
    expected = learned(RegMeanAlgorithm(), modules, data)
    for key, value in found.items():
        same = torch.allclose(value, expected[key], rtol=1e-6, atol=1e-6)
        assert same == (key != "behind.weight")
    weights = [modules[name].state_dict()["behind.weight"] for name in "ab"]
    torch.testing.assert_close(found["behind.weight"], torch.stack(weights).mean(dim=0))


def test_two_blocks_are_not_regmean() -> None:
    modules, data = problem(2)
    found = learned(RegMeanAlgorithmPlusPlus(), modules, data)
    other = learned(RegMeanAlgorithm(), modules, data)
    key = "layers.1.up.weight"
    assert not torch.allclose(found[key], other[key], atol=1e-3)


def test_copies_of_one_model_give_that_model() -> None:
    modules, data = problem(3)
    found = learned(
        RegMeanAlgorithmPlusPlus(), dict.fromkeys("abc", modules["a"]), data | {"c": data["a"]}
    )
    for key, value in modules["a"].state_dict().items():
        torch.testing.assert_close(found[key], value)


def test_what_is_excluded_goes_on_through_the_blocks_as_the_pretrained_model_s() -> None:
    modules, data = problem(2)
    method = RegMeanAlgorithmPlusPlus(exclude_param_names_regex=[r"^layers\.0"])
    found = learned(method, modules, data)
    base = modules[BASE].state_dict()
    assert all(torch.equal(found[key], base[key]) for key in base if key.startswith("layers.0"))
    plain = learned(RegMeanAlgorithmPlusPlus(), modules, data)
    key = "layers.1.up.weight"
    assert not torch.allclose(found[key], plain[key], atol=1e-3)


def test_a_seed_tells_all_and_the_models_stay_as_they_are() -> None:
    modules, data = problem(2)
    before = {name: all_bits(module.state_dict()) for name, module in modules.items()}

    def found(seed: int) -> Any:
        return all_bits(learned(RegMeanAlgorithmPlusPlus(5, seed=seed), modules, data))

    assert found(1) == found(1) != found(2)
    assert {name: all_bits(module.state_dict()) for name, module in modules.items()} == before


def test_what_it_makes_and_what_it_read_can_be_trained(
    family: Path, program_config: dict[str, Any]
) -> None:
    pool, _, data = clip_family(family, program_config)
    merged = RegMeanAlgorithmPlusPlus().run(pool, CPU, data)
    images, _ = next(data["a"].batches(np.arange(2), 2))
    for weights in (merged, pool.weights(BASE), pool.weights("a")):
        module = pool.build_model(weights).requires_grad_(True)
        answers = data["a"].classify(module)(images).sum()
        assert torch.autograd.grad(answers, list(module.parameters()))


def test_the_clip_family(family: Path, program_config: dict[str, Any]) -> None:
    """Each block's inputs come from a whole model whose blocks before it are merged."""
    pool, _, data = clip_family(family, program_config, dtype=torch.float64)
    found = in_memory(RegMeanAlgorithmPlusPlus().run(pool, CPU, data))
    models = {name: pool.load_model(name) for name in pool.model_names}
    average = {
        key: torch.stack([pool.weights(name)[key] for name in models]).mean(dim=0) for key in found
    }
    merged = deepcopy(pool.build_model(average))
    for index in range(2):
        inputs: dict[str, list[Array]] = {}
        for name, model in models.items():
            images, _ = next(data[name].batches(np.arange(4), 4))
            hidden = merged(images.double(), output_hidden_states=True).hidden_states[index]
            block = model.encoder.layers[index]
            for key, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    rows = inputs.setdefault(f"encoder.layers.{index}.{key}.weight", [])
                    layer.register_forward_hook(
                        lambda _, args, __, rows=rows: rows.append(
                            args[0].detach().flatten(0, 1).numpy()
                        )
                    )
            block(hidden, None)
        assert len(inputs) == 6
        for key, rows in inputs.items():
            own = [pool.weights(name)[key].numpy() for name in models]
            expected = regmean(own, rows, 0.95)
            merged.get_parameter(key).data.copy_(torch.from_numpy(expected))
            for inside in rows:  # a weight whose input is next to nothing may be anything
                answer = np.linalg.norm(inside @ expected.T)
                assert np.linalg.norm(inside @ (found[key].numpy() - expected).T) < 1e-4 * answer
    for key, value in found.items():
        if key not in dict(merged.named_parameters()) or value.ndim != 2:
            torch.testing.assert_close(value, average[key])


def test_fusion_bench_s_config_is_taken() -> None:
    node = {
        "_target_": "fusion_bench.method.RegMeanAlgorithmForCLIPPlusPlus",
        "num_regmean_examples": 256,
        "exclude_param_names_regex": [],
        "reduce_non_diagonal_ratio": 0.95,
        "weight_transpose": True,
        "batch_size": 32,
        "num_workers": 0,
    }
    assert isinstance(instantiate(node), RegMeanAlgorithmPlusPlus)
    assert "RegMeanAlgorithmForCLIPPlusPlus" in fusion_bench.method.__all__


def test_a_model_without_blocks_is_refused() -> None:
    _, data = problem(1)
    modules = {name: nn.Linear(3, 2).double() for name in "ab"}
    with pytest.raises(FusionBenchError, match="block by block; a Linear has no blocks"):
        learned(RegMeanAlgorithmPlusPlus(), modules, data)
