"""The plan tells what each option is for which entries."""

from typing import Any

import pytest
import torch

from fusion_bench.instantiate import instantiate
from fusion_bench.method import (
    KnOTSMerging,
    SimpleAverageAlgorithm,
    StackedLayers,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
)
from fusion_bench.method.checks import Pool
from fusion_bench.plan import Plan
from fusion_bench.problems import ConfigError
from fusion_bench.programs.told_options import tell_filters, tell_options
from fusion_bench.weights import TensorWeights

KEYS = [
    "embed",
    *(f"layers.{layer}.{part}" for layer in range(3) for part in ("attn.q", "attn.k", "mlp.up")),
    "head",
]
POOL: Any = Pool(
    {name: TensorWeights({key: torch.ones(4) for key in KEYS}) for name in ("_pretrained_", *"ab")}
)
RULES = [
    {"match": "*attn*", "scaling_factor": 0.5, "threshold": {"b": {"gradient": [10, 20]}}},
    {"match": "layers.1.*", "scaling_factor": 2, "threshold": 30},
    {"match": "*attn.q", "scaling_factor": 3},
]
TOLD = [
    "scaling_factor 1.0: embed, layers.{0,2}.mlp.up, head (4 tensors)",
    "scaling_factor 0.5: layers.{0-2}.attn.* (6 tensors)",
    "scaling_factor 2: layers.1.mlp.up",
    "threshold 20: embed, layers.{0,2}.mlp.up, head (4 tensors)",
    "threshold a=20, b=10 at layer 0 to 20 at layer 2: layers.{0,2}.attn.* (4 tensors)",
    "threshold a=30, b=15: layers.1.attn.* (2 tensors)",
    "threshold 30: layers.1.mlp.up",
]


def told(method: Any, *place: str) -> tuple[list[str], list[str]]:
    plan = Plan()
    steps = tell_options(plan, method, POOL, place)
    assert {step.verb for step in steps} <= {"option"}
    return [step.what for step in steps], plan.notes


def test_each_value_is_told_with_the_entries_that_it_is_for() -> None:
    lines, notes = told(TiesMergingAlgorithm(where=RULES), "method")
    assert sorted(lines) == sorted(f"method.{line}" for line in TOLD)
    assert notes == [
        "method.where[2].scaling_factor decides nothing: rules before it do, for all that it "
        "matches."
    ]


def test_rules_of_a_base_method_have_its_place() -> None:
    rules = [{"match": "head", "threshold": 1}]
    lines, _ = told(KnOTSMerging(TiesMergingAlgorithm(where=rules)), "method")
    assert lines[-1] == "method.base_method.threshold 1: head"


def test_without_rules_nothing_is_told() -> None:
    assert told(SimpleAverageAlgorithm()) == ([], []) == told(KnOTSMerging())


def test_a_rule_that_may_match_nothing_is_no_news_if_it_does() -> None:
    rules = [{"match": "*mpl*", "scaling_factor": 2, "optional": True}]
    assert told(TiesMergingAlgorithm(where=rules))[1] == []


def test_filters_of_a_recipe_that_fit_nothing_are_told_with_near_names() -> None:
    plan, where = Plan(), "models[0].parameters.weight"
    filters = [(where, part) for part in ("mlp", "mpl", "layers.1.", "mlp*")]
    tell_filters(plan, filters, [POOL.weights(name) for name in "ab"])
    assert plan.notes == [
        f"{where}: the filter '{part}' matches no tensor; near: layers.0.mlp.up. A filter is a "
        "part of a name, without * or ?."
        for part in ("mpl", "mlp*")
    ]


def test_options_that_differ_between_models_are_told() -> None:
    method = TiesMergingAlgorithm(threshold={"b": 30, "a": 20}, weights=[2, 2])
    assert told(method, "method") == (["method.threshold a=20, b=30: all 11 tensors"], [])
    method.where = [{"match": "head", "scaling_factor": 2}]
    assert told(method)[0][-1] == "threshold a=20, b=30: all 11 tensors"


def test_a_gradient_is_told_by_what_it_gives() -> None:
    rules = [
        {"match": "*attn.q", "scaling_factor": {"gradient": [0, 1, 0]}},
        {"match": "layers.[12].*", "scaling_factor": {"gradient": [0.1, 0.3]}},
        {"match": "layers.0.*", "threshold": {"gradient": [10, 20]}},
        {"scaling_factor": {"gradient": [0.4, 0]}},
    ]
    lines, _ = told(TiesMergingAlgorithm(where=rules))
    assert lines == [
        "scaling_factor 0.4: embed, layers.0.attn.k, layers.0.mlp.up, head (4 tensors)",
        "scaling_factor 0 at layer 0 to 0 at layer 2 along [0, 1, 0]: layers.{0-2}.attn.q "
        "(3 tensors)",
        "scaling_factor 0.2 at layer 1 to 0.3 at layer 2: layers.{1-2}.attn.k, "
        "layers.{1-2}.mlp.up (4 tensors)",
        "threshold 20: embed, layers.{1-2}.*, head (8 tensors)",
        "threshold 10: layers.0.* (3 tensors)",
    ]


def test_weights_by_pattern_are_told() -> None:
    method = WeightedAverageAlgorithm([1, 2], layer_weights={"*attn*": [3, 4], "*mlp*": [1, 1]})
    assert told(method)[0] == [
        "weights a=1, b=2: embed, head (2 tensors)",
        "weights a=3, b=4: layers.{0-2}.attn.* (6 tensors)",
        "weights 1: layers.{0-2}.mlp.up (3 tensors)",
    ]


def test_a_dry_run_shows_it(
    program_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ties = "fusion_bench.method.TiesMergingAlgorithm"
    rules = [{"match": "*self_attn*", "scaling_factor": 0.5}]
    method = {"_target_": ties, "where": rules}
    models = program_config["modelpool"]["models"]
    models.setdefault("_pretrained_", models["a"])
    instantiate({**program_config, "method": method, "dry_run": True}).run()
    shown = " ".join(capsys.readouterr().out.split())
    assert "option method.scaling_factor 0.5: encoder.layers." in shown
    rules[0]["match"] = "*self_atn*"
    with pytest.raises(ConfigError, match=r"^method\.where\[0\]\.match: '\*self_atn\*' matches no"):
        instantiate({**program_config, "method": method, "dry_run": True}).run()


def test_options_of_slices() -> None:
    rules = [
        {"match": "*attn*", "scaling_factor": {"gradient": [0, 1]}},
        {"match": "head", "scaling_factor": 7, "optional": True},
    ]
    task = TaskArithmeticAlgorithm(0.5, where=rules)
    ties = TiesMergingAlgorithm(where=[{"match": "head", "threshold": 1}])
    slices = [
        {"models": {"a": [0, 2]}},
        {"models": {"b": [0, 3]}},
        {"models": {"a": [2, 3]}, "base_method": ties},
    ]
    lines, notes = told(StackedLayers(slices, task), "method")
    assert notes == []
    assert lines == [
        "method.base_method.scaling_factor 0.5: embed, layers.{0-4}.mlp.up (6 tensors)",
        "method.base_method.scaling_factor 0 at layer 0 to 1 at layer 1: layers.{0-1}.attn.* "
        "(4 tensors)",
        "method.base_method.scaling_factor 0 at layer 2 to 1 at layer 4: layers.{2-4}.attn.* "
        "(6 tensors)",
        "method.slices[2].base_method.threshold 20: layers.5.* (3 tensors)",
        "method.slices[2].base_method.threshold 1: head",
    ]
    task.where = [*rules, {"match": "*attn.q", "scaling_factor": 3}]
    assert told(StackedLayers(slices, task), "method")[1] == [
        "method.base_method.where[2].scaling_factor decides nothing: rules before it do, for all "
        "that it matches."
    ]
