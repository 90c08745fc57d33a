"""Documents: what is read, and what is told of mistakes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import models_of, named_after, translate
from fusion_bench.recipes.document import Reference
from fusion_bench.recipes.levels import patterns_of
from fusion_bench.recipes.text import read_text


def problems(text: str) -> dict[str, str]:
    """Return what is wrong with a recipe, by place."""
    with pytest.raises(FusionBenchError) as caught:
        translate(text)
    return {p.key: f"{p.reason} {p.remedy}".strip() for p in caught.value.problems}


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def test_references() -> None:
    parsed = Reference.parse("owner/name@main+other/adapter@v1")
    assert parsed == Reference("owner/name", "main", "other/adapter", "v1")
    assert str(parsed) == "owner/name@main+other/adapter@v1"
    with pytest.raises(FusionBenchError, match="is not of the form"):
        Reference.parse("a+b+c")


def test_a_model_as_a_mapping_says_the_same() -> None:
    one = "merge_method: passthrough\nmodels: [{model: 'a@r+b@s'}]"
    other = (
        "merge_method: passthrough\nmodels: [{model: {model: {path: a, revision: r}, "
        "lora: {path: b, revision: s}}}]"
    )
    assert translate(one) == translate(other)
    assert translate(one).modelpool["models"] == {"b": {"path": "b@s", "base": "a@r"}}


def test_every_mistake_is_told_at_once_with_its_place() -> None:
    found = problems(
        """
merge_method: ties
base_modle: c
models:
  - {model: a, parameters: {weigth: 1}}
  - {model: b, parameters: {weight: heavy}}
  - {modell: c}
dtype: float17
tokenizer_source: base
tokenizer: {source: union}
"""
    )
    assert found == {
        "base_modle": "there is no such key. Did you mean 'base_model'?",
        "models[0].parameters.weigth": "no method of mergekit's takes it. Did you mean 'weight'?",
        "models[0].parameters.weight": "missing; ties needs one of each model.",
        "models[1].parameters.weight": "'heavy' is not a number.",
        "models[2].modell": "there is no such key. Did you mean 'model'?",
        "models[2].model": "missing. Name a model.",
        "dtype": "'float17' is no type of weights. Did you mean 'float16'?",
        "tokenizer": "there is also 'tokenizer_source'. Give one of the two.",
        "base_model": "missing; ties compares the others with it. Name the model that they were "
        "fine-tuned from.",
    }


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("merge_method: tie\nmodels: [{model: a}]", "merge_method", "Did you mean 'ties'?"),
        ("merge_method: linear", "", "the recipe has none of: models, slices, modules."),
        ("merge_method: linear\nmodels: []\nslices: []", "", "models and slices"),
        (f"{LINEAR}parameters: {{t: 1}}", "parameters.t", "linear has no such parameter"),
        (f"{LINEAR}base_model: b", "base_model", "like the others, and it has no 'weight'"),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nbase_model: a", "parameters.t",
         "missing; slerp needs it."),
        ("merge_method: slerp\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {t: 1}",
         "models", "slerp merges exactly 1 model beside the base, and there are 2."),
        ("merge_method: slerp\nbase_model: c\nmodels: [{model: a}]\nparameters: "
         "{t: [{filter: mlp, value: 1}]}", "parameters.t", "none of the filters fits"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]",
         "slices[0].sources[0].layer_range", "no range of layers"),
        ("merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: "
         "[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]",
         "slices[0].sources", "the sources have 1, 2 layers. Give each equally many."),
        ("merge_method: slerp\nbase_model: b\nparameters: {t: 1}\n"
         "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
         "slices[0].sources", "the base 'b' is not among the sources."),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {value: 1, filtre: x}}}]",
         "models[0].parameters.weight.filtre", "Did you mean 'filter'?"),
        ("merge_method: linear\nmodels: [a]", "models[0]", "Write '{model: a}'."),
        (f"{LINEAR}tokenizer: {{tokens: {{x: {{source: {{kind: none}}}}}}}}",
         "tokenizer.tokens.x.source.kind", "'none' is unknown."),
    ],
)  # fmt: skip
def test_mistakes(text: str, place: str, reason: str) -> None:
    assert reason in problems(text).get(place, str(problems(text)))


def test_no_yaml_and_no_recipe() -> None:
    assert "no YAML" in problems("a: [")[""]
    assert "empty" in problems("")[""]
    assert "no mapping" in problems("[1]")[""]


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "too large" in problems("\n".join(lines))[""]


def test_objects_are_not_made() -> None:
    assert "no YAML" in problems("merge_method: !!python/object/apply:os.getcwd []")[""]


def test_a_file_that_is_none(tmp_path: Any) -> None:
    with pytest.raises(FusionBenchError, match="there is no recipe"):
        read_text(tmp_path / "none.yaml")
    (tmp_path / "large.yaml").write_text("#" * (5 * 2**20))
    with pytest.raises(FusionBenchError, match="too large"):
        read_text(tmp_path / "large.yaml")


def test_what_mergekit_ignores() -> None:
    text = yaml.safe_load(LINEAR)
    text["parameters"] = {"int8_mask": True}
    text["models"][0]["parameters"]["normalize"] = False
    found = translate(yaml.safe_dump(text))
    assert found.method["normalize"] is True
    assert found.notes == (
        "models[0].parameters.normalize: 'normalize' holds for all models; beside one of them it "
        "is ignored, as in mergekit.",
    )


def test_texts_are_numbers_where_numbers_are_wanted() -> None:
    assert translate(LINEAR.replace("weight: 1", "weight: 1e-3")).method["weights"] == {"a": 0.001}


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
@pytest.mark.parametrize("name", ["weight", "density"])
def test_values_are_finite(name: str, value: str) -> None:
    parameters = f"{{weight: 1, density: 1, {name}: {value}}}".replace(f"{name}: 1, ", "")
    text = f"merge_method: ties\nbase_model: b\nmodels: [{{model: a, parameters: {parameters}}}]\n"
    with pytest.raises(FusionBenchError, match=rf"{name}: '-?(nan|inf)' is not a number"):
        translate(text)


def test_what_cannot_be_read_is_not_also_missing() -> None:
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filtre: x, value: 1}]}}]"
    )
    with pytest.raises(FusionBenchError) as caught:
        translate(text)
    assert [own.key for own in caught.value.problems] == ["models[0].parameters.weight[0].filtre"]
    text = text.replace("filtre: x, value: 1", "filter: x")
    with pytest.raises(FusionBenchError) as caught:
        translate(text)
    assert [own.key for own in caught.value.problems] == ["models[0].parameters.weight[0].value"]


def test_types() -> None:
    policy = translate(f"{LINEAR}dtype: float32\nout_dtype: bfloat16").modelpool["policy"]
    assert policy == {"dtype": "bfloat16"}
    assert translate(f"{LINEAR}dtype: fp16").modelpool["policy"] == {"dtype": "float16"}
    assert "policy" not in translate(LINEAR).modelpool


def test_names_of_models() -> None:
    assert named_after(["x/a", "y/a@1", "y/a@2"]) == {"a": "x/a", "a-1": "y/a@1", "a-2": "y/a@2"}
    again = translate(LINEAR, names={"a": "first"})
    assert again.modelpool["models"] == {"first": "a"}


def test_stages_that_use_each_other_are_refused() -> None:
    stage = "name: {}\nmerge_method: passthrough\nmodels: [{{model: {}}}]\n---\n"
    text = stage.format("a", "b") + stage.format("b", "a") + LINEAR
    assert "stages use each other: a → b → a." in " ".join(problems(text).values())


def test_stages_of_one_name_and_two_ends_are_refused() -> None:
    stage = "name: a\nmerge_method: passthrough\nmodels: [{model: b}]\n---\n"
    found = problems(f"{stage}{stage}{LINEAR}---\n{LINEAR}")
    assert found["[1].name"] == "'a' is the name of another stage, too."
    assert found["[3]"].startswith("there are several final documents.")


def test_an_adapter_on_a_stage() -> None:
    text = (
        "name: one\nmerge_method: passthrough\nmodels: [{model: x/a}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: one+x/lora}]"
    )
    models = translate(text).modelpool["models"]
    assert isinstance(models, dict)
    assert models["lora"] == {"path": "x/lora", "base": "_one_"}
    assert models["_one_"]["_target_"] == "fusion_bench.modelpool.MergedModel"
    assert models_of(text)[0][0] == "x/a"


MODULES = """
merge_method: linear
parameters: {weight: 1}
modules:
  encoder:
    models: [{model: a}, {model: b, parameters: {weight: [{filter: SelfAttention, value: 2}]}}]
    parameters: {weight: 3}
  decoder:
    models: [{model: a}, {model: b}]
"""


def test_modules_are_rules() -> None:
    rules = translate(MODULES).method["where"]
    assert rules == [
        {
            "match": ["encoder.*SelfAttention*", "model.encoder.*SelfAttention*"],
            "optional": True,
            "weights": {"b": 2},
        },
        {"match": ["encoder.*", "model.encoder.*"], "optional": True, "weights": {"a": 3, "b": 3}},
        {"match": ["decoder.*", "model.decoder.*"], "optional": True, "weights": {"a": 1, "b": 1}},
    ]


def test_filters_become_patterns() -> None:
    assert patterns_of("a[0].*?", None) == ("*a[[]0].[*][?]*",)
    assert patterns_of("coder.bl", "encoder") == (
        *("encoder.*coder.bl*", "encoder.bl*"),
        *("model.encoder.*coder.bl*", "model.encoder.bl*"),
    )


@pytest.mark.parametrize("page", ["recipes.md", "from_mergekit.md"])
def test_recipes_that_pages_show(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    shown = [
        code for code in re.findall(r"```text.*?\n(.*?)```", text, re.S) if "merge_method" in code
    ]
    assert shown or page == "from_mergekit.md"
    for code in shown:
        assert translate(code).method


def test_the_filters_are_known_with_their_places() -> None:
    text = """\
merge_method: linear
models:
  - {model: s, parameters: {weight: [{filter: mpl, value: 2}, {filter: "*", value: 1}]}}
---
name: s
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: {filter: q_proj, value: 1}}}]
    parameters: {scale: [{filter: mlp, value: 2}, {value: 1}]}
merge_method: passthrough
"""
    assert translate(text).filters == (
        ("[1].slices[0].parameters.scale", "mlp"),
        ("[1].slices[0].sources[0].parameters.scale", "q_proj"),
        ("[0].models[0].parameters.weight", "mpl"),
    )


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("ties", "density", -0.5), ("dare_ties", "density", "[0.5, -0.1]"), ("della", "epsilon", 3),
     ("breadcrumbs", "gamma", -1)],
)  # fmt: skip
def test_values_beyond_the_limits_are_told_in_the_recipes_words(
    method: str, name: str, value: object
) -> None:
    text = f"merge_method: {method}\nbase_model: o\nmodels:\n"
    text += "  - {model: a, parameters: {weight: 1}}\n"
    text += f"  - {{model: b, parameters: {{weight: 1, {name}: {value}}}}}\n"
    (found,) = problems(text).items()
    assert found[0] == f"models[1].parameters.{name}"
    assert "is not a number from 0 to 1" in found[1]


SLICED_MODULES = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
modules:
  decoder:
    parameters: {lambda: 0.5}
    slices:
      - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
      - sources:
          - {model: base, layer_range: [2, 3]}
          - {model: b, layer_range: [3, 4], parameters: {weight: 0.3}}
  encoder:
    models: [{model: b}]
  shared:
    models: [{model: a}, {model: base}]
"""


def test_slices_in_several_modules() -> None:
    made = translate(SLICED_MODULES)
    slices = made.method["slices"]
    assert isinstance(slices, list)
    assert [(own["stack"], own["base"], own["models"]) for own in slices] == [
        (["decoder", "model.decoder"], "base", {"base": [0, 2], "a": [0, 2]}),
        (["decoder", "model.decoder"], "base", {"base": [2, 3], "b": [3, 4]}),
        (["encoder", "model.encoder"], "_pretrained_", {"b": None}),
        (["shared", "lm_head"], "_pretrained_", {"a": None}),
    ]
    options = [{k: v for k, v in own["base_method"].items() if k != "_target_"} for own in slices]
    assert options[0]["weights"] == {"a": 1} and options[0]["scaling_factor"] == 0.5
    assert options[1]["weights"] == {"b": 0.3} and options[2]["weights"] == {"b": 1}
    assert options[3]["scaling_factor"] == 1.0
    assert made.modelpool["models"] == {"_pretrained_": "base", "base": "base", "a": "a", "b": "b"}


def test_keys_that_are_given_twice_are_told_with_their_lines() -> None:
    text = (
        f"{LINEAR}dtype: float16\nparameters: {{normalize: true, normalize: false}}\ndtype: fp32\n"
    )
    assert problems(text) == {
        "dtype": "it is given 2 times, in the lines 3 and 5. Remove all but one.",
        "parameters.normalize": "it is given 2 times, in the lines 4 and 4. Remove all but one.",
    }
    stage = "name: s\nmerge_method: passthrough\nmodels: [{model: a, model: b}]\n---\n"
    assert [*problems(stage + LINEAR)] == ["[0].models[0].model"]


def test_merged_keys_of_yaml_are_not_twins() -> None:
    text = "merge_method: linear\nmodels:\n  - &a {model: a, parameters: {weight: 1}}\n"
    assert translate(f"{text}  - {{<<: *a, model: b}}\n").method["weights"] == {"a": 1, "b": 1}


def test_keys_that_say_nothing_are_noted_and_mistakes_refused() -> None:
    found = translate(
        "license: mit\nmerge_method: linear\nmodels:\n"
        "  - {model: a, layer_range: [0, 2], parameters: {weight: 1}, comment: x}\n"
        "tokenizer: {source: base, author: me, tokens: {q: {source: {kind: zero, reason: r}}}}\n"
        "base_model: a\n"
    )
    nothing = "there is no such key; it has no effect, as in mergekit."
    keys = ("license", "models[0].layer_range", "models[0].comment")
    keys += ("tokenizer.author", "tokenizer.tokens.q.source.reason")
    assert set(found.notes) == {f"{key}: {nothing}" for key in keys}
    assert problems(
        "merge_method: slerp\ntokeniser_source: base\nbase_model: a\nt: 0.5\n"
        "slices:\n  - {sources: [{model: a, layer_rnge: [0, 2]}], weight: 1}\n"
    ) == {
        "tokeniser_source": "there is no such key. Did you mean 'tokenizer_source'?",
        "t": "it is a parameter, and would be ignored. Write it as 'parameters: {t: …}'.",
        "slices[0].weight": "it is a parameter, and would be ignored. Write it as "
        "'parameters: {weight: …}'.",
        "slices[0].sources[0].layer_rnge": "there is no such key. Did you mean 'layer_range'?",
        "slices[0].sources[0].layer_range": "missing. Give the first layer and the one after the "
        "last: [0, 8].",
        "slices[0]": "slerp merges exactly 1 model beside the base, and there are 0.",
    }


def test_keys_of_mixtures() -> None:
    text = "base_model: b\ngate_mode: random\nexperts: [{source_model: a}, {source_model: c}]\n"
    assert "author: there is no such key" in translate(f"{text}author: me").notes[0]
    assert problems(f"{text}gate_mod: x")["gate_mod"].endswith("Did you mean 'gate_mode'?")


def near(text: str) -> dict[str, str]:
    return {own.problem.key: own.problem.remedy for own in translate(text).suspects}


def test_words_that_nearly_name_something() -> None:
    assert near(f"{LINEAR}tokenizer_source: unoin") == {"tokenizer_source": "Did you mean 'union'?"}
    assert near(f"{LINEAR}tokenizer: {{source: bsae}}") == {
        "tokenizer.source": "Did you mean 'base'?"
    }
    first = LINEAR.replace("model: a", "model: frist")
    assert near(f"{first}tokenizer_source: first")["tokenizer_source"] == "Did you mean 'frist'?"
    for fine in ("union", "a", "org/union", "gpt2"):
        assert near(f"{LINEAR}tokenizer_source: {fine}") == {}
    stage = "name: both\nmerge_method: passthrough\nmodels: [{model: x}]\n---\n"
    sliced = "slices: [{sources: [{model: boht, layer_range: [0, 1]}]}]\nmerge_method: passthrough"
    assert near(stage + sliced) == {"[1].slices[0].sources[0].model": "Did you mean 'both'?"}
    ties = "merge_method: ties\nbase_model: bothe\nmodels: [{model: a, parameters: {weight: 1}}]"
    assert near(stage + ties) == {"[1].base_model": "Did you mean 'both'?"}


def test_names_that_yaml_reads_as_something_else() -> None:
    false = "YAML reads an unquoted no, off or false as false, and not as a name. Put it in quotes."
    true = "YAML reads an unquoted yes, on or true as true, and not as a name. Put it in quotes."
    found = problems(
        """
merge_method: task_arithmetic
base_model: no
models:
  - {model: yes, parameters: {weight: 1}}
  - {model: {model: {path: a}, lora: off}, parameters: {weight: 1}}
  - {model: 7, parameters: {weight: 1}}
tokenizer: {source: base, tokens: {on: {force: true}}}
"""
    )
    assert found == {
        "base_model": false,
        "models[0].model": true,
        "models[1].model.lora": false,
        "models[2].model": "YAML reads an unquoted 7 as a number or a date, and not as a name. "
        "Put it in quotes.",
        "tokenizer.tokens.True": true,
    }
    quoted = "merge_method: linear\nmodels: [{model: 'no', parameters: {weight: 1}}]"
    assert translate(quoted).modelpool["models"] == {"no": "no"}
