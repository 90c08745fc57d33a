"""Recipes on the command line: merged into a folder, and evaluated."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from commandline import fusion_bench
from recipes.test_merging import TWO_STAGES, Load, agree, here, models, recipe, run
from safetensors.torch import load_file

from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import told_in_recipe, translate
from fusion_bench.scripts.recipes import sections

__all__ = ["here", "models"]


def test_a_recipe_is_merged_into_a_folder(here: Load, models: Path, tmp_path: Path) -> None:
    text = f"{TWO_STAGES}out_dtype: float32\n"
    file = tmp_path / "my recipe.yml"
    file.write_text(text, encoding="utf-8")
    words = ("--copy-tokenizer", "--lazy-unpickle", "--random-seed", "3", "--out-shard-size", "2K")
    done = fusion_bench("merge", str(file), str(tmp_path / "out"), *words, cwd=models)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    found = {
        key: own.double().numpy()
        for shard in shards
        for key, own in load_file(tmp_path / "out" / shard).items()
    }
    agree(found, run(text, here))
    (report,) = models.rglob("outputs/*/*/report.json")
    config = json.loads(report.read_text("utf-8"))["run"]["config"]
    assert config["recipe"] == text
    assert config["seed"] == 3
    assert config["method"]["_target_"] == "fusion_bench.method.TiesMergingAlgorithm"
    assert text.splitlines()[-1] in (tmp_path / "out" / "README.md").read_text("utf-8")
    # What was recorded is run again as it is, and exported back.
    again = fusion_bench("export-recipe", str(report), cwd=models)
    assert len(list(yaml.safe_load_all(again.stdout))) == 3, again.stderr


def test_the_plan_tells_what_is_surprising(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("linear", 2, own="{weight: 1, normalize: false}"), encoding="utf-8")
    text = file.read_text("utf-8").replace("base_model: base\n", "")
    file.write_text(text, encoding="utf-8")
    done = fusion_bench("merge", str(file), "out", "--dry-run", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "it is ignored, as in mergekit" in " ".join(done.stdout.split())
    stage = "merge_method: linear\nmodels: [{model: s, parameters: {weight: 1}}]\n---\nname: s\n"
    conditions = "weight: [{filter: self_atn, value: 2}, {value: 1}]"
    file.write_text(stage + text.replace("weight: 1", conditions), encoding="utf-8")
    done = fusion_bench("merge", str(file), "out", "--dry-run", cwd=models)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "[1].models[0].parameters.weight: the filter 'self_atn' matches no tensor; near" in shown
    assert "decides nothing" not in shown
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out", "threshold=0.1"], "method.threshold: the recipe decides it."),
        (["out", "where=[]"], "method.where: the recipe decides it."),
        (["out", "modelpool.models={a: a}"], "modelpool.models: the recipe decides it."),
        (["out", "--method", "ties"], "--method: the recipe decides it."),
        (["out", "more"], "'more' is one word too many beside a recipe."),
        ([], "there is no folder for the merged model. Add --out DIR."),
        (["out", "--num-threads", "4"], "set OMP_NUM_THREADS=4 in the environment."),
        (["out", "--no-safe-serialization"], "weights are only written as safetensors."),
        (["out", "--out-shard-size", "big"], "'big' is not a size."),
        (["out", "--unsafe-truncate-embeddings"], "--unsafe-truncate-embeddings: rows are never"),
        (["out", "-j", "4"], "set OMP_NUM_THREADS=4 in the environment."),
        (["--out-path", "out"], "name the folder behind the recipe"),
        (["b"], "is one of the models."),
    ],
)
def test_what_cannot_be_is_told(words: list[str], said: str, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("ties", 2, own="{weight: 1}"), encoding="utf-8")
    done = fusion_bench("merge", str(file), *words, cwd=models)
    assert done.returncode == 2
    assert said in done.stderr


def test_mistakes_have_their_places_in_the_recipe(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("ties", 2, own="{weigth: 1}"), encoding="utf-8")
    for words in (["merge", str(file), "out"], ["--config-name", "merge_llm", f"recipe={file}"]):
        done = fusion_bench(*words, cwd=models)
        assert done.returncode == 2
        assert "recipe.models[0].parameters.weigth:" in done.stderr
        assert "Did you mean 'weight'?" in done.stderr


def test_a_recipe_in_the_place_of_a_config(models: Path, here: Load, tmp_path: Path) -> None:
    text = recipe("ties", 2, own="{weight: 1, density: [0.2, 0.8]}")
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    done = fusion_bench(str(file), cwd=models)
    assert done.returncode == 2
    assert "is a recipe of mergekit. Merge it with 'fusion_bench merge" in done.stderr
    place = f"merged_model_save_path={tmp_path / 'merged'}"
    done = fusion_bench("--config-name", "merge_llm", f"recipe={file}", place, cwd=models)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "merged" / "model.safetensors")
    agree({key: np.asarray(own.double()) for key, own in found.items()}, run(text, here))


def test_dollars_in_texts_are_no_references(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    prompts = "positive_prompts: ['echo ${HOME}', '\\${x}', '${oc.env:HF_TOKEN}']"
    file.write_text(
        f"base_model: base\ngate_mode: random  # ${{y}}\nexperts: [{{source_model: a, {prompts}}}, "
        "{source_model: b}]\nexperts_per_token: 1",
        encoding="utf-8",
    )
    runs = set(models.rglob("outputs/*/*/config.yaml"))
    done = fusion_bench("merge", str(file), str(tmp_path / "out"), cwd=models)
    assert done.returncode == 0, done.stderr
    (written,) = set(models.rglob("outputs/*/*/config.yaml")) - runs
    report = json.loads((written.parent / "report.json").read_text("utf-8"))
    experts = report["run"]["config"]["method"]["experts"]
    assert experts[0]["positive_prompts"] == ["echo ${HOME}", "\\${x}", "${oc.env:HF_TOKEN}"]
    done = fusion_bench(str(written), "overwrite=true", cwd=models)
    assert done.returncode == 0, done.stderr
    done = fusion_bench("verify", str(tmp_path / "out"), cwd=models)
    assert done.returncode == 0, done.stderr


PLACES = {
    "layers": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [3, 9]}]\n",
        "recipe.slices[1].sources[0].layer_range: there are no layers [3, 9): 'b' has 4, 0 to 3.",
    ),
    "a model": (
        "merge_method: slerp\nbase_model: none\nmodels: [{model: no/such/x}]\nparameters: {t: 0}\n",
        "recipe.base_model: ",
    ),
    "an option": (
        recipe("nearswap", 1, "{t: -1}"),
        "recipe.parameters.t: -1 is less than 0.",
    ),
    "an option of a condition": (
        recipe("nearswap", 1, "{t: [{filter: mlp, value: -1}, {value: 1}]}"),
        "recipe.parameters.t: -1",
    ),
    "an option of a model": (
        recipe("multislerp", 3, "{eps: -1}", "{weight: 1}"),
        "recipe.parameters.eps: -1 is",
    ),
    "an option in a slice": (
        "merge_method: nearswap\nbase_model: a\nslices:\n- parameters: {t: -1}\n  sources: "
        "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n",
        "recipe.slices[0].parameters.t: -1",
    ),
    "a stage": (
        "name: one\nmerge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 7]}]"
        "}]\n---\nmerge_method: slerp\nbase_model: one\nmodels: [{model: b}]\nparameters: {t: 0}\n",
        "recipe[0].slices[0].sources[0].layer_range: there are no layers [2, 7)",
    ),
    "an expert": (
        "base_model: base\ngate_mode: random\nexperts: [{source_model: a}, {source_model: none/x}]",
        "recipe.experts[1].source_model: ",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_problems_are_told_where_the_recipe_has_them(
    name: str, models: Path, tmp_path: Path
) -> None:
    text, said = PLACES[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    done = fusion_bench("merge", str(file), "out", "--dry-run", cwd=models)
    assert done.returncode in (2, 3)
    assert said in done.stderr


def test_a_row_of_a_model_that_is_not_merged_is_refused() -> None:
    text = recipe("task_arithmetic", 2, own="{weight: 1}") + (
        "\ntokenizer: {source: union, tokens: {q: {source: c}, r: {source: {kind: model_token, "
        "model: d, token: q}}, s: {source: base}}}\n"
    )
    with pytest.raises(FusionBenchError) as caught:
        translate(text)
    assert [problem.key for problem in caught.value.problems] == [
        "tokenizer.tokens.q.source",
        "tokenizer.tokens.r.source.model",
    ]
    assert "'c' is not among the models. Known: a, b, base." in str(caught.value)


def told(text: str, place: tuple[str | int, ...], remedy: str, reason: str = "no.") -> str:
    places = translate(text).places
    with pytest.raises(FusionBenchError) as caught, told_in_recipe(places, "recipe"):
        raise FusionBenchError(reason, remedy, place=place)
    return str(caught.value)


def test_remedies_say_the_recipes_keys() -> None:
    text = recipe("task_arithmetic", 2, own="{weight: 1}")
    said = told(text, ("method", "weights"), "Give {here}normalize=false.")
    assert said == "recipe.models[0].parameters.weight: no. Give parameters.normalize: false."
    text += "\ntokenizer: {source: union, tokens: {q: {source: a}, r: {source: base}}}\n"
    key = ("modelpool", "tokenizer", "tokens", "r", "source")
    said = told(text, key, "", "'_pretrained_' has no row.")
    assert said == "recipe.tokenizer.tokens.r.source: the base has no row."
    slices = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
    said = told(slices, ("method", "slices", 0, "stack"), "Choose one: x, y.")
    assert "modules: {encoder: …, decoder: …}" in said


def test_what_a_recipe_has_no_word_for_may_be_added(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("model_stock", 2), encoding="utf-8")
    done = fusion_bench("merge", str(file), "out", "clamp=true", "--dry-run", cwd=models)
    assert done.returncode == 0, done.stderr
    again = ["--config-name", "merge_llm", f"recipe={file}", "++method.clamp=true"]
    done = fusion_bench(*again, "merged_model_save_path=out", "--cfg", "job", cwd=models)
    assert done.returncode == 0, done.stderr
    done = fusion_bench("merge", str(file), "out", "filter_wise=true", "--dry-run", cwd=models)
    assert done.returncode == 2
    assert "method.filter_wise: the recipe decides it." in done.stderr


def test_a_tokenizer_may_be_added_where_the_recipe_has_none(models: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "recipe.yaml", recipe("model_stock", 2)
    pool = {"_target_": "fusion_bench.modelpool.CausalLMPool", "tokenizer": "union"}
    file.write_text(text, encoding="utf-8")
    made = sections(str(file), pool, None)
    assert made.modelpool["tokenizer"] == "union"
    assert not made.decides("modelpool.tokenizer")
    file.write_text(f"{text}\ntokenizer_source: base\n", encoding="utf-8")
    assert sections(str(file), pool, None).decides("modelpool.tokenizer.source")
    done = fusion_bench("merge", str(file), "out", "modelpool.tokenizer=union", cwd=models)
    assert "modelpool.tokenizer: the recipe decides it." in done.stderr


def test_every_option_of_mergekit_is_answered() -> None:
    from argparse import ArgumentParser

    from fusion_bench.scripts import mergekit

    parser = ArgumentParser()
    mergekit.add_arguments(parser)
    flags = (
        "--no-unsafe-truncate-embeddings --no-allow-crimes --cuda --low-cpu-memory "
        "--lazy-unpickle --read-to-gpu --multi-gpu --gpu-rich --async-write --no-copy-tokenizer "
        "--clone-tensors --no-write-model-card --safe-serialization --quiet -vv --lazy "
        "--load-in-4bit --load-in-8bit --i-understand-this-is-not-useful-without-training"
    )
    values = (
        "--transformers-cache --lora-merge-cache --lora-merge-dtype --random-seed --device -j "
        "--write-threads --out-shard-size -I --out-path"
    )
    words = [*flags.split(), *(word for name in values.split() for word in (name, "1"))]
    parser.parse_args(words)  # which exits where one is unknown


def test_all_missing_models_are_told_at_once(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    listed = "{model: %s, parameters: {weight: 1}}"
    listed = ", ".join(listed % name for name in ("bse", "a", "./none", "b+./lora"))
    file.write_text(f"merge_method: linear\nmodels: [{listed}]\n", encoding="utf-8")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for words in (["merge", str(file), "out"], ["--config-name", "merge_llm", f"recipe={file}"]):
        done = fusion_bench(*words, "dry_run=true", cwd=models, env=offline)
        assert done.returncode == 2, done.stderr
        said = done.stderr
        assert "recipe.models[0].model: Cannot read the model 'bse': there is no folder" in said
        assert "Did you mean 'base'?" in said
        assert "recipe.models[2].model: There is no such directory: './none'." in said
        assert "recipe.models[3].model: There is no such directory: './lora'." in said
        assert said.count("Cannot read") == 1
    done = fusion_bench("merge", "bse", "./none", "a", "--out", "out", cwd=models, env=offline)
    assert "modelpool.models.bse" in done.stderr and "modelpool.models.none" in done.stderr


def test_a_tokenizer_that_is_nearly_a_word(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    text = recipe("ties", 2, own="{weight: 1}")
    file.write_text(f"{text}\ntokenizer_source: unoin\n", encoding="utf-8")
    done = fusion_bench("merge", str(file), "out", cwd=models)
    assert done.returncode == 2
    assert "recipe.tokenizer_source: there is no model 'unoin', and no such folder" in done.stderr
    assert "Did you mean 'union'?" in done.stderr
