from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError

AVERAGE = "fusion_bench.method.SimpleAverageAlgorithm"


def message(node: Any, key: str = "") -> str:
    with pytest.raises(FusionBenchError) as error:
        instantiate(node, key)
    return str(error.value)


def test_a_node_becomes_an_object() -> None:
    method = instantiate({"_target_": AVERAGE, "inplace": True})
    assert type(method).__name__ == "SimpleAverageAlgorithm" and method.inplace is True


def test_interpolations_are_resolved() -> None:
    config = OmegaConf.create({"flag": True, "m": {"_target_": AVERAGE, "inplace": "${flag}"}})
    assert instantiate(config.m).inplace is True


@pytest.mark.parametrize("thing", [None, 3, "name", {"a": 1}, [1]])
def test_what_is_no_node_stays_as_it_is(thing: Any) -> None:
    assert instantiate(thing) == thing


def test_configs_within_plain_nodes_become_plain() -> None:
    weights = OmegaConf.create([1, 2.5])
    node = {"_target_": "fusion_bench.method.WeightedAverageAlgorithm", "weights": weights}
    assert type(instantiate(node).weights) is list
    options = OmegaConf.create({"inner": {"_target_": AVERAGE, "inplace": True}})
    made = instantiate({"deep": [options]})  # without a target nothing is called
    assert made == {"deep": [{"inner": {"_target_": AVERAGE, "inplace": True}}]}


def test_an_unknown_key_names_the_nearest() -> None:
    text = message({"_target_": AVERAGE, "inplce": True}, "method")
    assert text.startswith("inplce: ") and "Did you mean 'inplace'?" in text


def test_an_unknown_target_names_the_nearest() -> None:
    text = message({"_target_": "fusion_bench.method.SimpleAverageAlgoritm"}, "method")
    assert text.startswith("_target_: ") and "Did you mean 'SimpleAverageAlgorithm'?" in text


def test_a_module_that_does_not_exist_is_named() -> None:
    assert "no_such_module" in message({"_target_": "no_such_module.Thing"})


def test_a_missing_argument_is_named() -> None:
    text = message({"_target_": "fusion_bench.modelpool.CLIPVisionModelPool"}, "modelpool")
    assert "models: missing" in text


def test_all_problems_are_listed_at_every_depth() -> None:
    node = {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "metod": {"_target_": AVERAGE, "b": 1},
        "modelpool": {"models": [{"_target_": "os.nothing"}]},
    }
    text = message(node)
    assert "metod: " in text and "method: missing" in text
    assert "metod.b" in text and "modelpool.models[0]._target_" in text


def test_what_the_target_raises_is_raised_plainly() -> None:
    with pytest.raises(FusionBenchError, match="the pool is empty"):
        instantiate({"_target_": "fusion_bench.modelpool.CLIPVisionModelPool", "models": {}})
    with pytest.raises(ValueError, match="Invalid learning rate"):
        instantiate({"_target_": "torch.optim.SGD", "params": [], "lr": -1})


@pytest.mark.parametrize(
    ("target", "given", "said"),
    [
        ("TiesMergingAlgorithm", {"threshold": "abc"}, "threshold: 'abc' is not a number"),
        ("TiesMergingAlgorithm", {"scaling_factor": None}, "scaling_factor: null is not a num"),
        ("TiesMergingAlgorithm", {"remove_keys": "a.*"}, "remove_keys: 'a.*' is not a list"),
        ("WeightedAverageAlgorithm", {"weights": "x"}, "weights: 'x' is not a number or a mapping"),
        ("WeightedAverageAlgorithm", {"weights": ["a", 1]}, "weights: '['a', 1]' is not a number"),
        ("ModelStock", {"clamp": "maybe"}, "clamp: 'maybe' is not true or false"),
        ("WUDIMerging", {"iter_num": 1.5}, "iter_num: '1.5' is not a whole number"),
        (
            "TaskSingularVectorMerging",
            {"alpha": "x"},
            "alpha: 'x' is not a number or a mapping or a list",
        ),
    ],
)
def test_a_value_of_another_type_is_named(target: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(FusionBenchError) as caught:
        instantiate({"_target_": f"fusion_bench.method.{target}", **given}, "method")
    assert said in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
    node = {"_target_": "fusion_bench.method.WeightedAverageAlgorithm", "weights": [1, 2.5]}
    assert instantiate(node, "method").weights == [1, 2.5]


def test_what_cannot_be_called_is_no_target() -> None:
    with pytest.raises(FusionBenchError, match=r"^_target_: 'torch\.float32' may not be called"):
        instantiate({"_target_": "torch.float32"})


@pytest.mark.parametrize(
    ("value", "said"), [("inf", "infinity"), ("-inf", "-infinity"), ("nan", "NaN")]
)
def test_numbers_are_finite(value: str, said: str) -> None:
    node = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "where": []}
    assert message({**node, "scaling_factor": float(value)}).startswith(
        f"scaling_factor: {said} is not allowed"
    )
    rules = [{"match": "*", "weights": {"a": float(value)}}]
    assert message({**node, "where": rules}) == (
        f"where[0].weights.a: {said} is not allowed. Give another."
    )


def test_a_gradient_outside_of_a_rule_is_refused() -> None:
    node = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    assert message({**node, "scaling_factor": {"gradient": [0, 1]}}) == (
        "scaling_factor: a gradient has to be in a rule. In place of it, give "
        "'where=[{scaling_factor: {gradient: [0, 1]}}]'."
    )


def test_one_rule_is_no_list() -> None:
    node = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    text = message({**node, "where": {"scaling_factor": 1}})
    assert text == "where: it is not a list of rules. Put it in a list: [{…}]."


def test_a_mistyped_key_of_a_tokenizer_is_left_to_the_pool() -> None:
    pool = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": {"a": "x"}}
    assert "has no _target_" in message({**pool, "tokenizer": {"path": "x"}}, "modelpool")
    text = message({**pool, "tokenizer": {"sorce": "union"}}, "modelpool")
    assert text == "tokenizer.sorce: there is no such key. Did you mean 'source'?"


def test_names_that_yaml_reads_as_something_else() -> None:
    models = yaml.safe_load("{no: a, b: yes, 7: c}")
    said = message(
        {"_target_": "fusion_bench.modelpool.HFModelPool", "models": models}, "modelpool"
    )
    assert said.splitlines() == [
        "models.False: YAML reads an unquoted no, off or false as false, and not as a name. "
        "Put it in quotes.",
        "models.7: YAML reads an unquoted 7 as a number or a date, and not as a name. "
        "Put it in quotes.",
        "models.b: YAML reads an unquoted yes, on or true as true, and not as a name. "
        "Put it in quotes.",
    ]
