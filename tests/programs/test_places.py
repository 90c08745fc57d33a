"""A problem names the key that is to be changed, wherever in a config a part stands."""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from commandline import compose
from datasets import Dataset, Image, Value, load_dataset
from transformers import CLIPConfig, CLIPModel

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.programs import ScalingStudy
from fusion_bench.programs.pools import placed

Config = dict[str, Any]
METHOD = "fusion_bench.method."
TIES: Config = {"_target_": f"{METHOD}TiesMergingAlgorithm"}


def lines(config: Config, **changes: Any) -> list[str]:
    """Return what a dry run says of a config."""
    with pytest.raises(FusionBenchError) as caught:
        instantiate(config | changes | {"dry_run": True}).run()
    return str(caught.value).splitlines()


def starts(found: list[str], *expected: str) -> bool:
    return len(found) == len(expected) and all(map(str.startswith, found, expected))


def over(outer: str, base_method: Config) -> Config:
    return {"_target_": f"{METHOD}{outer}", "base_method": base_method}


@pytest.mark.parametrize("outer", ["LiNeSAlgorithm", "KnOTSMerging"])
def test_options_of_a_method_in_a_method(program_config: Config, outer: str) -> None:
    high, weighed = TIES | {"threshold": 200}, f"{METHOD}WeightedAverageAlgorithm"
    assert lines(program_config, method=over(outer, high)) == [
        "method.base_method.threshold: 200 is not a number from 0 to 100."
    ]
    typed = TIES | {"threshold": "high"}
    assert lines(program_config, method=over(outer, typed)) == [
        "method.base_method.threshold: 'high' is not a number or a mapping or a list."
    ]
    one = {"_target_": weighed, "weights": [1.0]}
    assert lines(program_config, method=over(outer, one)) == [
        "method.base_method.weights: 1 value for 2 models (a, b). Give one for each."
    ]
    none = {"_target_": weighed, "weights": [1.0, -1.0]}
    assert lines(program_config, method=over(outer, none)) == [
        "method.base_method.weights: the weights sum to zero and cannot be normalised. "
        "Give method.base_method.normalize=false."
    ]
    remedied = lines(program_config, seed=-1, method=over(outer, none | {"normalize": False}))
    assert starts(remedied, "seed: ")  # nothing is said of the method


def test_weights_of_an_ensemble_are_counted_before_anything_is_loaded(
    program_config: Config,
) -> None:
    weighed = {"_target_": f"{METHOD}WeightedEnsembleAlgorithm", "weights": [1.0]}
    assert lines(program_config, method=weighed) == [
        "method.weights: 1 value for 2 models (a, b). Give one for each."
    ]


def test_two_methods_deep(program_config: Config) -> None:
    inner = over("KnOTSMerging", TIES | {"threshold": -1})
    assert starts(
        lines(program_config, method=over("LiNeSAlgorithm", inner)),
        "method.base_method.base_method.threshold: -1 is not",
    )


def test_what_a_nested_method_says_when_it_runs(program_config: Config) -> None:
    soup = {"_target_": f"{METHOD}SimpleEnsembleAlgorithm"}
    with pytest.raises(FusionBenchError, match=r"^method\.base_method: .* returns a module"):
        instantiate(program_config | {"method": over("LiNeSAlgorithm", soup)}).run()


def test_parts_of_pools(program_config: Config) -> None:
    modelpool, taskpool = program_config["modelpool"], program_config["taskpool"]
    policy = {"on_missing": "guess", "dtype": "int8"}
    found = lines(program_config, modelpool=modelpool | {"policy": policy})
    assert starts(
        found, "modelpool.policy.on_missing: 'guess' is unknown.", "modelpool.policy.dtype: 'int8'"
    )
    found = lines(program_config, modelpool=modelpool | {"max_shard_size": "abc"})
    assert starts(found, "modelpool.max_shard_size: 'abc' is not a size.")
    known = {"a": {"templates": ["no braces"]}}
    found = lines(program_config, taskpool=taskpool | {"tasks": known})
    assert starts(found, "taskpool.tasks.a.templates: the template 'no braces' needs")
    found = lines(program_config, taskpool=taskpool | {"tasks": {"z": {}}})
    assert starts(found, "taskpool.tasks.z: there is no such task.")
    assert found[0].endswith("To take its settings away too: '~taskpool.tasks.z'.")
    found = lines(program_config, taskpool=taskpool | {"dataloader_kwargs": {"batch_size": 0}})
    assert starts(found, "taskpool.dataloader_kwargs.batch_size: '0' is not 1 or more.")


def said(config: Config, **changes: Any) -> str:
    """Return what a run ends with."""
    with pytest.raises(FusionBenchError) as caught:
        instantiate(config | changes).run()
    return str(caught.value)


def test_datasets_of_tasks(program_config: Config, family: Path, tmp_path: Path) -> None:
    rows = load_dataset(str(family / "datasets" / "a"), split="test")
    tasks = program_config["taskpool"]["test_datasets"]
    rows.cast_column("label", Value("int64")).to_parquet(tmp_path / "plain.parquet")
    tasks["a"] |= {"path": "parquet", "data_files": {"test": str(tmp_path / "plain.parquet")}}
    rows.save_to_disk(tmp_path / "saved")
    saved = {"dataset_path": str(tmp_path / "saved"), "split": "train"}
    tasks["b"] = {"_target_": "datasets.load_from_disk", **saved}
    found = lines(program_config)
    assert found == [
        "taskpool.tasks.a.class_names: missing; the column 'label' of test_datasets.a does not "
        "name its classes. List them in label order: 'taskpool.tasks.a.class_names: […]'.",
        f"taskpool.test_datasets.b.split: '{tmp_path / 'saved'}' holds a single dataset, which has "
        "no split 'train'. Remove the key.",
    ]


def learning(config: Config, node: Config) -> Config:
    """Return the config of a method that learns from ``node``, and from others for ``b``."""
    train = {"a": node, "b": config["taskpool"]["test_datasets"]["b"] | {"split": "train"}}
    method = {"_target_": f"{METHOD}AdaMergingAlgorithm", "max_steps": 1, "batch_size": 4}
    return config | {
        "method": method,
        "modelpool": config["modelpool"] | {"train_datasets": train},
    }


def test_datasets_of_methods(program_config: Config, family: Path, tmp_path: Path) -> None:
    rows = load_dataset(str(family / "datasets" / "a"), split="train")
    plain = rows.cast_column("image", Image(decode=False))
    broken = [row | {"image": {"bytes": b"none", "path": None}} for row in plain.skip(1)]
    Dataset.from_list([plain[0], *broken], rows.features).to_parquet(tmp_path / "broken.parquet")
    files = {"train": str(tmp_path / "broken.parquet")}
    node = {"_target_": "datasets.load_dataset", "path": "parquet", "split": "train"}
    config = learning(program_config, node | {"data_files": files})
    found = said(config)  # in a thread, while the method learns
    assert re.match(r"modelpool\.train_datasets\.a: sample \d+ holds no readable image", found)
    del files["train"]
    files["test"] = str(tmp_path / "broken.parquet")
    assert starts(
        lines(config), "modelpool.train_datasets.a: Cannot read the dataset 'parquet': it"
    )
    assert starts(
        lines(learning(program_config, {"_target_": "datasets.load_from_disk"})),
        "modelpool.train_datasets.a.dataset_path: ",
    )


def test_encoders_of_another_size(program_config: Config, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(program_config["taskpool"]["clip_model"], wide)
    (wide / "pytorch_model.bin").unlink(missing_ok=True)
    parts = CLIPConfig.from_pretrained(wide)
    parts.vision_config.hidden_size *= 2
    CLIPModel(parts).save_pretrained(wide)
    taskpool = program_config["taskpool"] | {"clip_model": str(wide)}
    node = taskpool["test_datasets"]["a"] | {"split": "train"}
    expected = "taskpool.clip_model: its vision encoder has hidden_size 48, "
    for config, name in (
        (program_config, "_pretrained_"),
        (learning(program_config, node), "merg"),
    ):
        assert said(config, taskpool=taskpool).startswith(f"{expected}'{name}")


def test_all_mistakes_are_told_in_a_line_each(program_config: Config) -> None:
    modelpool, taskpool = program_config["modelpool"], program_config["taskpool"]
    found = lines(
        program_config,
        method=over("LiNeSAlgorithm", TIES | {"threshold": 200}),
        modelpool=modelpool | {"policy": {"on_missing": "guess"}, "max_shard_size": "abc"},
        taskpool=taskpool | {"max_samples": 0},
    )
    assert starts(
        found,
        "method.base_method.threshold: 200",
        "modelpool.max_shard_size: 'abc'",
        "modelpool.policy.on_missing: 'guess'",
        "taskpool.max_samples: '0'",
    )


def search(**space: Any) -> Config:
    return {"_target_": "fusion_bench.programs.GridSearch", "space": space, "split": "train"}


def test_values_that_a_search_tries(program_config: Config) -> None:
    dare = {"_target_": f"{METHOD}DareTaskArithmetic"}
    found = lines(program_config, method=dare, search=search(sparsity_ratio=[0.5, 2]))
    assert "search.space.sparsity_ratio[1]: 2 is not a number from 0 to 1." in found
    weighed = {"_target_": f"{METHOD}WeightedAverageAlgorithm", "weights": [1, 1]}
    found = lines(program_config, method=weighed, search=search(weights=[[1, 2], [1]]))
    assert "search.space.weights[1]: 1 value for 2 models (a, b). Give one for each." in found


def test_methods_of_a_study(program_config: Config) -> None:
    base = {name: program_config[name] for name in ("modelpool", "taskpool")}
    study = {"bases": {"tiny": base}, "counts": [2], "fabric": {"accelerator": "cpu"}}
    wrong = TIES | {"threshold": 200}
    with pytest.raises(FusionBenchError, match=r"^methods\[0\]\.threshold: 200 is not a number"):
        ScalingStudy(**study, methods=[wrong]).run()
    with pytest.raises(FusionBenchError, match=r"^methods\[1\]\.base_method\.threshold: 200"):
        ScalingStudy(**study, methods=["simple_average", over("LiNeSAlgorithm", wrong)]).run()


def test_pools_of_a_study(program_config: Config) -> None:
    base = {name: program_config[name] for name in ("modelpool", "taskpool")}
    a, b = deepcopy(base), deepcopy(base)
    a["taskpool"]["test_datasets"]["a"]["split"] = "tset"
    a["modelpool"]["models"]["b"] = "zoo:nothing"
    b["modelpool"]["policy"] = {"dtype": "int8", "device": "abacus"}
    b["taskpool"]["test_datasets"]["b"] = None
    target = {"_target_": "fusion_bench.programs.ScalingStudy"}
    one = {"_target_": f"{METHOD}WeightedAverageAlgorithm", "weights": [1.0]}
    study = target | {"bases": {"a": a, "b": b}, "methods": [one], "counts": [1, 2]}
    assert starts(
        lines(study, fabric={"accelerator": "cpu"}),
        "bases.a.modelpool.models.b: ",
        "bases.a.taskpool.test_datasets.a: Cannot read the dataset ",
        "methods[0].weights: 1 value for 2 models (a, b).",
        "bases.b.modelpool.policy.device: 'abacus' cannot be used here.",
        "bases.b.modelpool.policy.dtype: 'int8' is not a floating-point type.",
        "bases.b.taskpool.test_datasets.b: null is not allowed. "
        "Give a node or remove the key: '~bases.b.taskpool.test_datasets.b'.",
    )
    study["bases"] = {"a": base}
    study["counts"] = [1]
    assert instantiate(study | {"dry_run": True, "fabric": {"accelerator": "cpu"}}).run() is None


def test_what_methods_of_a_study_learn_from(program_config: Config) -> None:
    base = {name: program_config[name] for name in ("modelpool", "taskpool")}
    target = {"_target_": "fusion_bench.programs.ScalingStudy", "fabric": {"accelerator": "cpu"}}
    study = target | {"bases": {"x": base}, "counts": [2]}
    learns = {"_target_": f"{METHOD}AdaMergingAlgorithm"}
    (line,) = lines(study, methods=["simple_average", over("LiNeSAlgorithm", learns)])
    assert line.startswith("bases.x.modelpool.train_datasets: missing;")
    assert line.endswith("or choose another methods[1].base_method.split.")
    test = learns | {"split": "test"}
    assert all(
        line.startswith(f"bases.x.taskpool.test_datasets.{task}: the models are evaluated on")
        and "(methods[0].split=train or validation)" in line
        for task, line in zip("ab", lines(study, methods=[test]), strict=True)
    )
    with pytest.raises(FusionBenchError, match=r"^bases\.x\.taskpool\.test_datasets\.a: "):
        instantiate(study | {"methods": [test]}).run()


def test_a_study_names_a_pool_that_fails_while_it_merges(program_config: Config) -> None:
    """What shows only when weights are read stands at the same key."""
    place = ("bases", "x", "modelpool")
    program_config["modelpool"]["models"]["a"] = "/no/such"
    made = placed(instantiate(program_config["modelpool"] | {"_recursive_": False}), place)
    assert made.policy.typed("dtype", "bfloat16") == "bases.x.modelpool.policy.dtype=bfloat16"
    with (
        pytest.raises(FusionBenchError, match=r"^bases\.x\.modelpool\.models\.a: There is no"),
        within("methods", 0),
    ):
        made.weights("a")


#: What messages tell people to type, of each kind once.
REMEDIES = [
    "modelpool.policy.dtype=bfloat16 ~taskpool merged_model_save_path=m",
    "modelpool.policy.on_dtype=cast modelpool.policy.on_missing=base",
    "modelpool.policy.on_extra=drop modelpool.policy.on_vocabulary=common",
    "modelpool.policy.on_config=warn modelpool.policy.on_tokenizer=warn",
    "fabric.accelerator=auto fabric.devices=1",
    "fabric.accelerator=cpu",
    "method=ensemble/weighted_ensemble method.normalize=false method.of=outputs",
    "method=lines/lines method@method.base_method=ties_merging",
    "method=lines/lines method@method.base_method=linear/weighted_average "
    "method.base_method.normalize=false",
    "allow_test_split=true overwrite=true",
    "taskpool.tasks.faces.class_names=[a,b]",
    "taskpool.tasks.faces.class_names=null",
    "--config-name search ~search.space.scaling_factor search.metric=accuracy",
]


def test_what_is_told_to_be_typed_is_taken(tmp_path: Path) -> None:
    found = compose((words.split() for words in REMEDIES), cwd=tmp_path)
    refused = {words: text for words, (code, text) in zip(REMEDIES, found, strict=True) if code}
    assert not refused
    assert "scaling_factor" not in found[-1][1].partition("search:")[2]


def test_in_python_a_place_begins_at_the_object() -> None:
    from fusion_bench.method import TiesMergingAlgorithm

    with pytest.raises(FusionBenchError, match=r"^threshold: 200 is not a number from 0 to 100\.$"):
        TiesMergingAlgorithm(threshold=200)
