import torch

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.method.checks import Pool
from fusion_bench.programs.outline import outlined
from fusion_bench.weights import Stacked, TensorWeights, Weights

PARTS = ("q", "k", "v", "norm")


def llama(layers: int) -> Weights:
    keys = [
        "embed.weight",
        *(f"layers.{layer}.{part}.weight" for layer in range(layers) for part in PARTS),
        "norm.weight",
        "head.weight",
    ]
    return TensorWeights({key: torch.ones(4) for key in keys})


def test_entries_that_come_from_the_same_models_are_one_line() -> None:
    models = {"_pretrained_": llama(3), "a": llama(3), "b": llama(3)}
    merged = TaskArithmeticAlgorithm().outline(Pool(models))
    found = outlined(merged, models)
    assert found.lines == ("all 15 tensors from a, b and _pretrained_",)
    assert found.nbytes == 3 * 15 * 4 * 4


def test_layers_of_other_numbers_are_told() -> None:
    models = {"a": llama(4), "b": llama(4)}
    a, b = models.values()
    parts: dict[str, tuple[Weights, str]] = {"embed.weight": (a, "embed.weight")}
    for layer, (model, number) in enumerate([(a, 0), (a, 1), (b, 2), (b, 3), (b, 2)]):
        for part in PARTS:
            parts[f"layers.{layer}.{part}.weight"] = model, f"layers.{number}.{part}.weight"
    parts["head.weight"] = b, "head.weight"
    found = outlined(Stacked(parts), models)
    assert found.lines == (
        "embed.weight, layers.{0-1}.* (9 tensors) from a",
        "layers.{2-3}.*, head.weight (9 tensors) from b",
        "layers.4.* (4 tensors) from b (layer 2)",
    )
    assert found.nbytes == 18 * 4 * 4  # layer 2 of b is read once


def test_a_part_of_each_layer_is_named() -> None:
    models = {"a": llama(2), "b": llama(2)}
    a, b = models.values()
    parts = {key: (b if ".q." in key else a, key) for key in a}
    assert outlined(Stacked(parts), models).lines == (
        "embed.weight, layers.{0-1}.k.weight, layers.{0-1}.v.weight, 3 more patterns (9 tensors) "
        "from a",
        "layers.{0-1}.q.weight (2 tensors) from b",
    )


def test_another_name_is_told() -> None:
    models = {"a": llama(2)}
    stack = Stacked({"head.weight": (models["a"], "embed.weight")})
    assert outlined(stack, models).lines == ("all 1 tensor from a (embed.weight)",)


def test_an_outline_has_no_values() -> None:
    outline = SimpleAverageAlgorithm().outline(Pool({"a": llama(1), "b": llama(1)}))
    assert outline.spec("head.weight").shape == (4,)
    try:
        outline["head.weight"]
    except RuntimeError as error:
        assert "no values" in str(error)
    else:
        raise AssertionError
