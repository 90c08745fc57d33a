"""Mistakes that the schemas alone can tell; what is sound is never refused."""

from typing import Any

import pytest

from fusion_bench.precheck import problems
from fusion_bench.problems import text_of

PROGRAM = "fusion_bench.programs.FabricModelFusionProgram"
TIES = "fusion_bench.method.TiesMergingAlgorithm"
LINES = "fusion_bench.method.LiNeSAlgorithm"


def said(**config: Any) -> str:
    return text_of(problems({"_target_": PROGRAM, **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": "abc"}, "seed: 'abc' is not a whole number or null."),
        ({"seed": True}, "seed: 'True' is not a whole number or null."),
        ({"sead": 1}, "sead: FabricModelFusionProgram takes no such key. Did you mean 'seed'?"),
        ({"dry_run": "yes"}, "dry_run: 'yes' is not true or false."),
        (
            {"method": {"_target_": TIES, "threshold": "high"}},
            "method.threshold: 'high' is not a number or a mapping or a list of numbers.",
        ),
        (
            {"method": {"_target_": TIES, "treshold": 20}},
            "method.treshold: TiesMergingAlgorithm takes no such key. Did you mean 'threshold'?",
        ),
        (
            {"method": {"_target_": TIES, "merge_func": "maen"}},
            "method.merge_func: 'maen' is unknown. Did you mean 'mean'?",
        ),
        (
            {"method": {"_target_": TIES, "remove_keys": "a.*"}},
            "method.remove_keys: 'a.*' is not a list.",
        ),
        (
            {
                "method": {
                    "_target_": LINES,
                    "base_method": {"_target_": TIES, "scaling_factor": None},
                }
            },
            "method.base_method.scaling_factor: null is not a number.",
        ),
        (
            {"method": {"_target_": TIES, "where": [{"match": "*a*"}, {"thresold": 1}]}},
            "method.where[1].thresold: TiesMergingAlgorithm has no such option. "
            "Did you mean 'threshold'?",
        ),
        (
            {"method": {"_target_": TIES, "where": [{"scope": "tensors"}]}},
            "method.where[0].scope: 'tensors' is unknown. Did you mean 'tensor'?",
        ),
        (
            {"method": {"_target_": LINES, "base_method": {"_target_": TIES, "where": [1]}}},
            "method.base_method.where[0]: '1' is not a mapping.",
        ),
        (
            {"method": {"_target_": TIES, "where": [{"inplace": True}]}},
            "method.where[0].inplace: 'inplace' holds for the whole model. "
            "Set it outside of 'where'.",
        ),
        (
            {"method": {"_target_": TIES, "where": {"match": "*a*", "threshold": 1}}},
            "method.where: it is not a list of rules. Put it in a list: [{…}].",
        ),
        (
            {"method": {"_target_": TIES, "scaling_factor": {"gradient": [0, 1]}}},
            "method.scaling_factor: a gradient has to be in a rule. In place of it, give "
            "'method.where=[{scaling_factor: {gradient: [0, 1]}}]'.",
        ),
        (
            {"method": {"_target_": TIES, "weights": {"a": {"gradient": [1, 0.5]}, "b": 1}}},
            "method.weights: a gradient has to be in a rule. In place of it, give "
            "'method.where=[{weights: {a: {gradient: [1, 0.5]}, b: 1}}]'.",
        ),
        (
            {
                "method": {"_target_": TIES, "tokenizer": "union"},
                "modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool"},
            },
            "method.tokenizer: TiesMergingAlgorithm takes no such key. It is a key of the pool: "
            "give 'modelpool.tokenizer=union'.",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place(config: dict[str, Any], message: str) -> None:
    assert said(**config) == message


def test_all_are_told_at_once() -> None:
    method = {"_target_": TIES, "threshold": "x", "kept": 1}
    lines = said(seed="abc", method=method).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed", "method.threshold", "method.kept"]


def test_what_is_not_ours_is_left_alone() -> None:
    node = {"_target_": "my_methods.Own", "anything": object()}
    assert said(method=node, fabric={"_target_": "lightning.Fabric", "devices": "x"}) == ""


def test_rules_with_gradients_and_values_of_models_pass() -> None:
    rules = [
        {"match": "*attn*", "threshold": {"gradient": [1, 5]}, "scaling_factor": 0.5},
        {"match": ["*a", "b*"], "threshold": {"a": 1, "b": {"gradient": [1, 2]}}},
        {"threshold": [1, {"gradient": [1, 2]}], "weights": [1, 2]},
    ]
    assert said(method={"_target_": TIES, "where": rules, "threshold": {"a": 20, "b": 30}}) == ""
