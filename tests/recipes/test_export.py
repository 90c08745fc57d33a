"""A config becomes a recipe that means the same, or is refused with its places."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from recipes.test_merging import DRAWN, EXAMPLES, MORE, PLAIN, here, models, recipe

from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import translate
from fusion_bench.recipes.export import export

__all__ = ["here", "models"]

ALL = {**PLAIN, **EXAMPLES, **MORE} | {
    name: recipe(name, 2, own=own) for name, own in DRAWN.items()
}


def config(method: dict[str, Any], **pool: Any) -> dict[str, Any]:
    models = {"_pretrained_": "base", "a": "x/a", "b": "x/b"}
    target = "fusion_bench.modelpool.CausalLMPool"
    name, options = method["name"], {k: v for k, v in method.items() if k != "name"}
    method = {"_target_": f"fusion_bench.method.{name}", **options}
    return {"method": method, "modelpool": {"_target_": target, "models": models, **pool}}


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name: str) -> None:
    # The same config comes back, and so the same weights.
    found = translate(ALL[name])
    again = translate(export({"method": found.method, "modelpool": found.modelpool}).text)
    assert again.method == found.method
    assert again.modelpool == found.modelpool


TOKENS = """\
merge_method: linear
models:
  - {model: x/a, parameters: {weight: 1}}
  - {model: x/b, parameters: {weight: 1}}
dtype: bfloat16
tokenizer:
  source: union
  tokens:
    <one>: {source: x/a, force: true}
    <two>: {source: {kind: model_token, model: x/b, token_id: 7}}
    <three>: {source: {kind: zero}}
  pad_to_multiple_of: 64
chat_template: chatml
"""


def test_tokens_there_and_back() -> None:
    found = translate(TOKENS)
    again = translate(export({"method": found.method, "modelpool": found.modelpool}).text)
    assert again.modelpool == found.modelpool


def test_a_config_of_ones_own() -> None:
    rules = [{"match": "*mlp*", "threshold": {"a": 0.1}}, {"scaling_factor": {"gradient": [0, 1]}}]
    method = {
        "name": "TiesMergingAlgorithm",
        **{"scope": "tensor", "zero_sign": "positive", "keep": "at_least_one"},
        **{"threshold": 30, "weights": [0.5, 2], "where": rules},
    }
    found = export(config(method, policy={"dtype": "bfloat16"}))
    assert yaml.safe_load(found.text) == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {
                "model": "x/a",
                "parameters": {
                    "weight": 0.5,
                    "density": [{"filter": "mlp", "value": 0.1}, {"value": 0.3}],
                },
            },
            {"model": "x/b", "parameters": {"weight": 2, "density": 0.3}},
        ],
        "parameters": {"lambda": [0, 1]},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_an_average_is_linear() -> None:
    found = yaml.safe_load(export(config({"name": "SimpleAverageAlgorithm"})).text)
    assert found["merge_method"] == "linear"
    weights = [own["parameters"]["weight"] for own in found["models"]]
    assert weights == [1, 1, 0]  # the base takes no part


def test_what_no_recipe_has_is_told_with_its_place() -> None:
    method = {"name": "TiesMergingAlgorithm", "remove_keys": ["lm_head.*"]}
    method["where"] = [
        {"match": "*.mlp.up_proj.*", "threshold": 5},
        {"match": "lm_*", "threshold": 1},
    ]
    with pytest.raises(FusionBenchError) as caught:
        export(config(method, policy={"on_extra": "drop"}))
    assert [problem.key for problem in caught.value.problems] == [
        *("method.scope", "method.zero_sign", "method.keep", "method.remove_keys"),
        *("method.where[1].match", "modelpool.policy.on_extra"),
    ]


def test_a_method_that_mergekit_lacks() -> None:
    with pytest.raises(FusionBenchError, match="method: mergekit has no LiNeSAlgorithm"):
        export(config({"name": "LiNeSAlgorithm"}))


def test_random_draws_are_noted() -> None:
    method = {"name": "DareTaskArithmetic", "rescale": "l1", "seed": 3}
    assert any("draws other elements" in note for note in export(config(method)).notes)


def test_written_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    words = ["method=task_arithmetic", "modelpool.models={_pretrained_: p, a: q/a, b: q/b}"]
    done = fusion_bench("export-recipe", "merge_llm", *words, "-o", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert found["merge_method"] == "task_arithmetic"
    assert found["parameters"] == {"lambda": 0.3}
    assert [own["model"] for own in found["models"]] == ["q/a", "q/b"]


def exported(method: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    whole = config(method)
    whole["modelpool"]["models"] = models
    found: dict[str, Any] = yaml.safe_load(export(whole).text)
    return found


def test_an_average_says_nothing_of_options_that_it_lacks() -> None:
    text = export(config({"name": "SimpleAverageAlgorithm"})).text
    assert "parameters" not in yaml.safe_load(text)
    translate(text)


@pytest.mark.parametrize("empty", [None, {}, []])
def test_an_empty_option_is_as_none(empty: Any) -> None:
    method = {"name": "WeightedAverageAlgorithm", "layer_weights": empty}
    assert exported(method, {"a": "x/a", "b": "x/b"})["merge_method"] == "linear"


@pytest.mark.parametrize(
    ("name", "method"),
    [("SlerpMergeAlgorithm", "slerp"), ("NearSwapAlgorithm", "nearswap")],
)
def test_too_many_models_are_refused(name: str, method: str) -> None:
    reason = f"modelpool.models: mergekit's {method} merges exactly 1 model beside the base"
    with pytest.raises(FusionBenchError, match=f"{reason}, and there are 2"):
        exported({"name": name}, {"_pretrained_": "base", "a": "x/a", "b": "x/b"})


def test_too_many_models_in_a_slice_are_refused() -> None:
    slices = [{"models": {"a": [0, 2], "b": [0, 2]}}]
    with pytest.raises(FusionBenchError, match=r"method.slices\[0\].models: mergekit's passth"):
        exported({"name": "StackedLayers", "slices": slices}, {"a": "x/a", "b": "x/b"})


def test_slices_of_modules_there_and_back() -> None:
    from recipes.test_reading import SLICED_MODULES

    found = translate(SLICED_MODULES)
    text = export({"method": found.method, "modelpool": found.modelpool}).text
    again = translate(text)
    assert again.method == found.method
    assert again.modelpool["models"] == found.modelpool["models"]


def test_a_stack_in_a_word_is_a_module() -> None:
    slices = [{"stack": "encoder", "models": {"a": [0, 2]}}]
    method = {"name": "StackedLayers", "slices": slices}
    found = exported({**method}, {"a": "x/a", "b": "x/b"})
    sources = [{"model": "x/a", "layer_range": [0, 2]}]
    assert found["modules"] == {"encoder": {"slices": [{"sources": sources}]}}
    mixed = [slices[0], {"models": {"b": [0, 1]}}]
    with pytest.raises(FusionBenchError, match="some have a stack, and others none"):
        exported({**method, "slices": mixed}, {"a": "x/a", "b": "x/b"})


def test_nothing_is_written_as_an_alias() -> None:
    tokens = {"x": {"source": {"kind": "zero"}}}
    tokens["y"] = tokens["x"]
    rule = {"match": ["*a*", "*b*"], "scaling_factor": {"gradient": [0, 1]}}
    method = {"name": "TaskArithmeticAlgorithm", "where": [rule, rule]}
    text = export(config(method, tokenizer={"source": "union", "tokens": tokens})).text
    assert "&id" not in text and "*id" not in text
    assert "value: [0, 1]" in text
    assert yaml.safe_load(text)["tokenizer"]["tokens"] == tokens


def test_what_gives_way_does_not_count_where_nothing_has_to() -> None:
    method = {"name": "ModelBreadcrumbs", "merge": "linear", "density": 0.5, "gamma": 0.1}
    method |= {"merge_func": "sum"}
    assert yaml.safe_load(export(config({**method})).text)["merge_method"] == "breadcrumbs"
    rules = [{"match": "*mlp*", "density": {"gradient": [0.2, 0.95]}}]
    with pytest.raises(FusionBenchError, match=r"method\.gives_way: 'density' is not as in"):
        export(config({**method, "where": rules}))


def test_a_recipe_and_folders_are_told_apart(models: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(recipe("ties", 2, own="{weight: 1}"), encoding="utf-8")
    done = fusion_bench("export-recipe", str(file), cwd=models)
    assert done.returncode == 2
    assert "is a recipe of mergekit already. Merge it with: fusion_bench merge" in done.stderr
    done = fusion_bench("merge", str(file), str(out), cwd=models)
    assert done.returncode == 0, done.stderr
    done = fusion_bench("export-recipe", str(out), cwd=models)
    assert done.returncode == 0, done.stderr
    made = translate(file.read_text(encoding="utf-8"))
    assert translate(done.stdout).method == made.method
    assert translate(done.stdout).modelpool["models"] == made.modelpool["models"]
    done = fusion_bench("export-recipe", "a", cwd=models)
    assert "'a' does not say how it was merged. Name the report.json of its run." in done.stderr
    done = fusion_bench("export-recipe", str(out), "method=ties", cwd=models)
    assert "cannot be changed" in done.stderr
