"""What is known before a run begins: the plan, and every problem at once."""

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from commandline import fusion_bench
from fixtures_clip import vision_config, write_dataset
from fixtures_llm import rewrite, write_llama
from hub import hub_stand_in
from safetensors.torch import load_file, save_file

from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.programs import FabricModelFusionProgram, preflight

Config = dict[str, Any]
TARGET = "fusion_bench.method."


def dry(config: Config, **changes: Any) -> None:
    instantiate(config | changes | {"dry_run": True}).run()


def problems(config: Config, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        dry(config, **changes)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make whoever reads an element of a mapped or downloaded tensor fail."""

    def refused(*_: Any) -> None:
        raise AssertionError("a weight was read")

    for kind in ("mapping.TensorWeights", "hub.HubWeights"):
        for how in ("__getitem__", "read"):
            monkeypatch.setattr(f"fusion_bench.weights.{kind}.{how}", refused)


@pytest.fixture
def own(program_config: Config, family: Path, tmp_path: Path) -> Config:
    """Return a config over a copy of the family, whose files may be changed."""
    shutil.copytree(family, tmp_path / "family")
    text = yaml.safe_dump(program_config).replace(str(family), str(tmp_path / "family"))
    return dict(yaml.safe_load(text))


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_mistakes_of_all_sections_come_at_once(program_config: Config) -> None:
    config = deepcopy(program_config)
    config["method"] = {"_target_": TARGET + "TaskArithmeticAlgorithm", "scaling_facto": 1}
    config["modelpool"]["models"]["a"] = "/no/such"
    config["modelpool"]["models"]["b"] = "zoo:clip-tinny"
    config["taskpool"]["test_datasets"]["a"]["split"] = "tset"
    config["taskpool"]["tasks"] = {"b": {"class_names": ["cat", "dog"]}}
    found = problems(config, seed="x", baselines="all", fabric={"accelerator": "gpu"})
    keys = [line.partition(": ")[0] for line in found]
    assert keys == [
        "seed",
        "baselines",
        "method.scaling_facto",
        "fabric.accelerator",
        "modelpool.models.a",
        "modelpool.models.b",
        "taskpool.test_datasets.a",
        "taskpool.test_datasets.b",
    ]
    assert "the dataset has 5 classes, the class names are 2" in found[-1]


def test_what_a_pool_names_is_found_though_the_pool_itself_is_wrong(program_config: Config) -> None:
    config = deepcopy(program_config)
    config["modelpool"] |= {"polcy": {}}
    config["modelpool"]["models"]["a"] = "/no/such"
    config["taskpool"] |= {"max_samples": 0}
    config["taskpool"]["test_datasets"]["b"]["split"] = "tset"
    keys = [line.partition(": ")[0] for line in problems(config)]
    assert keys == [
        "modelpool.polcy",
        "taskpool.max_samples",
        "modelpool.models.a",
        "taskpool.test_datasets.b",
    ]


def test_a_sound_config_has_a_plan_and_leaves_nothing(
    program_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = program_config | {"merged_model_save_path": str(tmp_path / "m")}
    assert instantiate(config | {"dry_run": True}, output_dir=tmp_path / "out").run() is None
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    for fact in ("3 models", "SimpleAverageAlgorithm of 2 models, on cpu", "on 2 tasks"):
        assert fact in shown
    assert "the merged model" in shown


def test_the_zoo_is_planned_and_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    from fusion_bench.configs import composed

    dry(composed())
    assert "the zoo of tiny models" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_differences_of_models_are_seen_in_their_headers(own: Config, tmp_path: Path) -> None:
    a, b = (tmp_path / "family" / "models" / name / "model.safetensors" for name in "ab")
    norm = "vision_model.post_layernorm.weight"
    changed(a, lambda tensors: tensors.update({norm: tensors[norm][:2].clone()}))
    changed(b, lambda tensors: tensors.update({norm: tensors[norm].half()}))
    own["modelpool"]["policy"] = {"on_dtype": "error"}
    found = "\n".join(problems(own))
    width = vision_config()["hidden_size"]
    assert f"a: 'post_layernorm.weight' is [2], in _pretrained_ [{width}]" in found
    assert "b: 'post_layernorm.weight' is float16, in _pretrained_ float32" in found
    assert found.startswith("modelpool.models: ") and "modelpool.policy.on_dtype=cast" in found


def test_a_type_that_differs_is_told_in_the_plan(
    own: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = tmp_path / "family" / "models" / "b" / "model.safetensors"
    norm = "vision_model.post_layernorm.weight"
    changed(b, lambda tensors: tensors.update({norm: tensors[norm].half()}))
    dry(own)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("b: 1 entry is float16, and float32 in _pretrained_") == 1


def test_models_that_are_there_are_compared_though_another_is_not(
    own: Config, tmp_path: Path
) -> None:
    place = tmp_path / "family" / "models" / "b" / "model.safetensors"
    changed(place, lambda tensors: tensors.pop("vision_model.post_layernorm.weight"))
    own["modelpool"]["models"]["a"] = "/no/such"
    found = "\n".join(problems(own))
    assert "modelpool.models.a: There is no such directory" in found
    assert "b: lacks 'post_layernorm.weight'" in found


def test_an_ensemble_may_have_models_that_differ(own: Config, tmp_path: Path) -> None:
    place = tmp_path / "family" / "models" / "a" / "model.safetensors"
    changed(place, lambda tensors: tensors.pop("vision_model.post_layernorm.weight"))
    dry(own, method={"_target_": TARGET + "SimpleEnsembleAlgorithm"})


def test_what_the_models_compute_with_is_compared(
    own: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "family" / "models"
    rewrite(models / "a", lambda config: config.update(hidden_act="gelu"))
    rewrite(models / "b", lambda config: config.update(layer_norm_eps=1e-3, odd=["/red"]))
    (head, line) = problems(own)
    assert head.startswith("modelpool.models: the configs of these models differ")
    assert line == '  a: \'hidden_act\' is "gelu", in _pretrained_ "quick_gelu"'
    dry(own, method={"_target_": TARGET + "SimpleEnsembleAlgorithm"})
    assert "layer_norm_eps" not in capsys.readouterr().out
    rewrite(models / "a", lambda config: config.update(hidden_act="quick_gelu", odd="[/]"))
    dry(own)
    shown = " ".join(capsys.readouterr().out.split())
    assert "note b: 'layer_norm_eps' is 0.001, in _pretrained_ 1e-05;" in shown
    assert "odd" not in shown  # no class of transformers knows it


def test_configs_and_tokens_that_differ_come_at_once(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_llama(tmp_path / name, seed=seed)
    rewrite(tmp_path / "b", lambda config: config.update(hidden_act="gelu"))
    rewrite(
        tmp_path / "b",
        lambda content: content["model"]["vocab"].update({"cat": 6, "dog": 5}),
        "tokenizer.json",
    )
    config = {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "method": {"_target_": TARGET + "SimpleAverageAlgorithm"},
        "modelpool": {
            "_target_": "fusion_bench.modelpool.CausalLMPool",
            "models": {name: str(tmp_path / name) for name in "ab"},
            "policy": {},
        },
        "merged_model_save_path": str(tmp_path / "merged"),
    }
    found = "\n".join(problems(config))
    assert "policy.on_config=warn" in found and "policy.on_tokenizer=warn" in found
    config["modelpool"]["policy"] = {"on_config": "warn", "on_tokenizer": "warn"}  # as it says
    dry(config)


def test_damaged_files_are_found(own: Config, tmp_path: Path) -> None:
    place = tmp_path / "family" / "models" / "a" / "model.safetensors"
    place.write_bytes(place.read_bytes()[:-1])
    (line,) = problems(own)
    assert line.startswith("modelpool.models.a: ") and "damaged" in line


def test_methods_and_pools_that_do_not_fit(program_config: Config) -> None:
    config = deepcopy(program_config)
    weights = {"_target_": TARGET + "WeightedAverageAlgorithm", "weights": [1, 2, 3]}
    (line,) = problems(config, method=weights)
    assert line == "method.weights: 3 values for 2 models (a, b). Give one for each."
    del config["modelpool"]["models"]["_pretrained_"]
    arithmetic = {"_target_": TARGET + "TaskArithmeticAlgorithm", "scaling_factor": 1}
    (line,) = problems(config, method=arithmetic)
    assert line.startswith("method: TaskArithmeticAlgorithm needs the pretrained model")


def test_tied_models_and_one_that_is_not(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(tmp_path / name, seed=seed, tied=False)
    models = {
        n: str(tmp_path / n.replace("_pretrained_", "base")) for n in ("_pretrained_", "a", "b")
    }
    rewrite(tmp_path / "base", lambda config: config.update(tie_word_embeddings=True))
    rewrite(tmp_path / "b", lambda config: config.update(tie_word_embeddings=True))
    config = {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "method": {"_target_": TARGET + "SimpleAverageAlgorithm"},
        "modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": models},
        "merged_model_save_path": str(tmp_path / "merged"),
    }
    (line,) = problems(config)
    assert line.startswith("modelpool.models.a: its output layer is untied")
    config["modelpool"]["policy"] = {"on_extra": "drop"}
    dry(config)


def test_datasets_are_held_against_their_tasks(program_config: Config, tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", ["cat", "dog"], splits={"train": 4, "test": 4})
    config = deepcopy(program_config)
    config["method"] = {"_target_": TARGET + "FisherMergingAlgorithm"}
    test = config["taskpool"]["test_datasets"]
    train = {name: node | {"split": "train"} for name, node in test.items()}
    config["modelpool"]["train_datasets"] = train
    dry(config)
    train["a"] = train["a"] | {"path": str(tmp_path / "few")}
    train["b"] = train["b"] | {"split": "test"}
    config["taskpool"]["tasks"] = {"b": {"label_column": "lable"}}
    found = problems(config)
    assert found == [
        "taskpool.tasks.b.label_column: the dataset has no column 'lable'. Did you mean 'label'?",
        "modelpool.train_datasets.a: its classes are not those of 'a'. It alone has 'cat', 'dog'. "
        "It lacks 'abbey', 'airplane cabin', 'beach'.",
        "modelpool.train_datasets.b: the models are evaluated on the same split. Choose another "
        "(method.split=train or validation), or set allow_test_split=true; the report will say "
        "so.",
    ]
    del train["a"], config["taskpool"]["tasks"]
    assert "modelpool.train_datasets: There is no data for the model 'a'" in problems(config)[0]


def test_a_search_is_looked_at_too(program_config: Config) -> None:
    config = deepcopy(program_config)
    config["method"] = {"_target_": TARGET + "TaskArithmeticAlgorithm", "scaling_factor": 1}
    config["search"] = {
        "_target_": "fusion_bench.programs.GridSearch",
        "space": {"scaling_factor": [0.1, 0.2]},
    }
    (line,) = problems(config)
    assert line.startswith("modelpool.val_datasets: missing; the search evaluates on")


DISK = namedtuple("DISK", "total used free")


def test_a_disk_that_is_too_small(
    program_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = program_config | {"merged_model_save_path": str(tmp_path / "m")}
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: DISK(9, 4, 5))
    (line,) = problems(config)
    assert line.startswith("merged_model_save_path")
    assert "has 5 bytes left" in line and f"in '{tmp_path / 'm'}'" in line


def test_a_place_that_cannot_be(program_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (line,) = problems(program_config | {"report_save_path": str(tmp_path / "file" / "r.json")})
    assert line.startswith("report_save_path: ") and "is not a directory" in line


@pytest.mark.parametrize(("kilobytes", "fits"), [(9, False), (9_000_000, True)])
def test_memory_that_is_too_small(
    program_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kilobytes: int,
    fits: bool,
) -> None:
    (tmp_path / "meminfo").write_text(f"MemAvailable: {kilobytes} kB\nSwapFree: 1 kB\n")
    monkeypatch.setattr(preflight, "_MEMINFO", tmp_path / "meminfo")
    if fits:
        return dry(program_config)
    (line,) = problems(program_config)
    assert line.startswith("modelpool.models: a merged model takes") and "10.2 kB are free" in line
    # written entry by entry it needs none
    dry(program_config, taskpool=None, merged_model_save_path=str(tmp_path / "m"))
    return None


def test_a_container_may_have_less_memory_than_its_machine(
    program_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text("100\n")
    monkeypatch.setattr(preflight, "_CGROUP", tmp_path / "max")
    assert "100 bytes are free" in problems(program_config)[0]


def test_plain_objects_know_nothing_ahead(program_config: Config) -> None:
    class Pool:
        model_names = ("a",)
        has_pretrained = False

    class Method:
        def run(self, modelpool: Any) -> Any:
            raise AssertionError

    assert (
        FabricModelFusionProgram(
            Method(), Pool(), dry_run=True, fabric={"accelerator": "cpu"}
        ).run()
        is None
    )


@pytest.fixture
def on_hub(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    root = tmp_path / "hub"
    shutil.copytree(family / "models", root / "models" / "org")
    with hub_stand_in(root) as hub:
        constants = huggingface_hub.constants
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_of_the_hub_only_headers_and_small_files_are_asked_for(
    on_hub: Any, program_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = deepcopy(program_config)
    models = config["modelpool"]["models"]
    models |= {"_pretrained_": "org/base", "a": "org/a", "b": "org/b"}
    config["taskpool"] |= {"clip_model": "org/base", "processor": "org/base"}
    dry(config)
    weights = [path for path in on_hub.downloads() if path.endswith(".safetensors")]
    headers = [path for path in on_hub.headers() if path.endswith(".safetensors")]
    assert weights == [] and len(headers) == 3
    assert not (tmp_path / "cache").exists()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("org/base", "org/a", "org/b"))
    place = tmp_path / "hub" / "models" / "org" / "a"
    size = sum((place / name).stat().st_size for name in ("config.json", "model.safetensors"))
    row = next(line for line in shown.splitlines() if "org/a" in line)
    assert f"{size / 1000:.1f} kB" in row
    models["b"] = "org/bb"
    assert problems(config)[0].startswith("modelpool.models.b: Cannot read the model 'org/bb'")


def test_headers_are_asked_for_once(on_hub: Any) -> None:
    pool = CausalLMPool({"a": "org/a"})
    pool.plan(built=False)
    pool.weights("a")
    assert len([path for path in on_hub.headers() if path.endswith(".safetensors")]) == 1


def test_the_console_script_lists_everything_and_ends_with_2(
    program_config: Config, family: Path, tmp_path: Path
) -> None:
    """The datasets are on the Hub, of which only the cards are asked for."""
    config = deepcopy(program_config)
    config["modelpool"]["models"]["a"] = "/no/such"
    test = config["taskpool"]["test_datasets"]
    test["a"]["path"], test["b"]["path"], test["b"]["split"] = "org/a", "org/b", "tset"
    cwd, root = tmp_path / "cwd", tmp_path / "hub"
    (cwd / "conf").mkdir(parents=True)
    (cwd / "conf" / "c.yaml").write_text(yaml.safe_dump(config | {"seed": None}))
    shutil.copytree(family / "datasets", root / "datasets" / "org")
    with hub_stand_in(root) as hub:
        env = hub.environment(tmp_path / "hf") | {"FUSION_BENCH_CACHE": str(tmp_path / "cache")}
        names = ("--config-path", "conf", "--config-name", "c")
        done = fusion_bench(*names, "dry_run=true", "seed=-1", cwd=cwd, env=env)
        assert {path.rpartition("/")[2] for path in hub.downloads()} == {"README.md"}
    assert done.returncode == 2
    lines = done.stderr.removeprefix("fusion_bench: ").splitlines()
    keys = [line.strip().partition(": ")[0] for line in lines]
    assert keys == ["seed", "modelpool.models.a", "taskpool.test_datasets.b"]
    assert "the plan" in done.stdout and "org/a" in done.stdout
    assert not [file for place in ("hf", "cache") for file in (tmp_path / place).rglob("*")]
    assert sorted(path.name for path in cwd.iterdir()) == ["conf", "outputs"]
    assert [path.name for path in (cwd / "outputs").glob("*/*/*")] == ["cli.log"]


def test_a_normal_run_looks_ahead_too(program_config: Config) -> None:
    config = deepcopy(program_config)
    config["taskpool"]["test_datasets"]["b"]["split"] = "tset"
    with pytest.raises(FusionBenchError, match=r"taskpool\.test_datasets\.b: .* no split 'tset'"):
        instantiate(config).run()


def test_a_merge_that_takes_much_memory_names_its_largest_entry(
    own: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "_LARGE", 0)
    dry(own, merged_model_save_path="merged", taskpool=None)
    told = " ".join(capsys.readouterr().out.split())
    assert "patch_embedding.weight', 24 x 3 x" in told and "exclude_keys" in told
