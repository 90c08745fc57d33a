"""Overrides as people type them."""

from pathlib import Path

import pytest
import yaml
from commandline import compose

from fusion_bench.problems import ConfigError
from fusion_bench.recipes import named_after
from fusion_bench.scripts.words import choice, models


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("method=ties", "method=ties_merging"),
        ("method=TIES,dare_ties", "method=ties_merging,dare/ties_merging"),
        ("method=mine", "method=mine"),
        ("method=lines", "method=lines"),
        ("taskpool=zoo_choices", "taskpool=CausalLMEvaluation/zoo_choices"),
        ("taskpool=zoo", "taskpool=zoo"),  # there are several
        ("method={_target_: x}", "method={_target_: x}"),
        ("method.threshold=5", "method.threshold=5"),
        ("seed=1", "seed=1"),
    ],
)
def test_a_name_becomes_that_of_a_config(word: str, wanted: str) -> None:
    assert choice(word, {"lines"}) == wanted


def test_models_are_a_list_or_a_mapping() -> None:
    gone, given = models("modelpool.models=[a/x, 'b/y@main', c/deep.safetensors]")
    assert gone == "++modelpool.models=null"
    pairs = "x: 'a/x',y: 'b/y@main',deep.safetensors: 'c/deep.safetensors'"
    assert given == f"++modelpool.models={{{pairs}}}"
    assert list(models('modelpool.models={"gpt-3.5": a, b: {path: c, base: d}}'))[1] == (
        "++modelpool.models={gpt-3.5: 'a',b: {path: 'c',base: 'd'}}"
    )
    assert list(models("modelpool.models={no: yes, on: off}"))[1] == (
        "++modelpool.models={no: 'yes',on: 'off'}"
    )
    for word in ("modelpool.models={a: ${x", "modelpool.models=a,b", "modelpool.models=[1]"):
        assert list(models(word)) == [word]
    with pytest.raises(ConfigError, match="'a, b' cannot be a name on the command line"):
        list(models('modelpool.models={"a, b": c}'))


def test_a_model_is_named_after_the_end_of_its_path() -> None:
    assert named_after(["/a/x", "/b/x", "y"]) == {"a-x": "/a/x", "b-x": "/b/x", "y": "y"}
    assert named_after(["x", "a/x"]) == {"x": "x", "a-x": "a/x"}
    with pytest.raises(ConfigError, match="the same model twice"):
        named_after(["x", "x"])


def test_they_are_composed_in_the_place_of_others(tmp_path: Path) -> None:
    commands = (
        ["modelpool.models=[a/x,b/y]"],
        ['modelpool.models={"gpt-3.5": a, _pretrained_: b}', "method=dare_ties"],
        ["modelpool.models.gpt-3.5=a"],
        ["method=adamerging"],
        ["--config-name", "merge_llm", "modelpool.models=[a/x,b/y]"],
    )
    listed, mapping, dotted, several, empty = compose(commands, tmp_path)
    assert yaml.safe_load(listed[1])["modelpool"]["models"] == {"x": "a/x", "y": "b/y"}
    config = yaml.safe_load(mapping[1])
    assert config["modelpool"]["models"] == {"gpt-3.5": "a", "_pretrained_": "b"}
    assert config["method"]["_target_"].endswith("DareTiesMerging")
    assert dotted[0] == 2 and "'modelpool.models={gpt-3.5: path, …}'" in dotted[1]
    assert several[0] == 2 and several[1].count("\n    adamerging/") == 3
    assert len(several[1]) < 600
    assert yaml.safe_load(empty[1])["modelpool"]["models"] == {"x": "a/x", "y": "b/y"}


OWN = """
_target_: fusion_bench.programs.FabricModelFusionProgram
_recursive_: false
method: {_target_: fusion_bench.method.WeightedAverageAlgorithm, weights: [1, 2]}
modelpool: {_target_: fusion_bench.modelpool.HFModelPool, models: {a: x, b: y}}
"""
COPIED = """
defaults: [fabric_model_fusion, {override method: ties_merging}, _self_]
method: {threshold: 5}
"""
LISTED = """
defaults: [{method: ties_merging}, _self_]
method: {threshold: 5}
modelpool: {_target_: fusion_bench.modelpool.HFModelPool, models: {a: x, b: y}}
"""


def test_a_method_is_chosen_where_a_file_has_its_own(tmp_path: Path) -> None:
    for name, text in {"own": OWN, "copied": COPIED, "listed": LISTED}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    cases = {
        ("own", "ties"): ("TiesMergingAlgorithm", 20),
        ("own", "average"): ("SimpleAverageAlgorithm", None),
        ("copied", "ties"): ("TiesMergingAlgorithm", 5),  # its options are for that method
        ("copied", "average"): ("SimpleAverageAlgorithm", None),
        ("listed", "ties"): ("TiesMergingAlgorithm", 5),
        ("listed", "average"): ("SimpleAverageAlgorithm", None),
    }
    commands = [[str(tmp_path / f"{file}.yaml"), f"method={method}"] for file, method in cases]
    for (target, threshold), (code, text) in zip(
        cases.values(), compose(commands, tmp_path), strict=True
    ):
        assert code == 0 and "warn" not in text.lower(), text
        node = yaml.safe_load(text)["method"]
        assert node["_target_"] == f"fusion_bench.method.{target}"
        assert node.get("threshold") == threshold and node.get("weights") in (None, 1.0)
