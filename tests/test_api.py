import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_llm import mean, metadata, tensors, write_llama, write_lora
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

import fusion_bench
from fusion_bench.instantiate import instantiate
from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.modelpool import CausalLMPool, modules
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report
from fusion_bench.taskpool import CLIPVisionModelTaskPool


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "first", "second")):
        write_llama(root / name, seed=seed, dtype=torch.float32)
    return root


def linear(weight: float) -> nn.Module:
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, weight)
    return module


def keys(act: Callable[[], object]) -> list[str]:
    """Return the places of what is wrong."""
    with pytest.raises(FusionBenchError) as refused:
        act()
    return [problem.key for problem in refused.value.problems]


def test_the_package_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import fusion_bench; "
    code += "print(*sorted(set(sys.modules) - before)); print(dir(fusion_bench))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, names = done.stdout.splitlines()
    rooms = {name.partition(".")[0] for name in imported.split()}
    assert (
        rooms - sys.stdlib_module_names == {"fusion_bench"} and "importlib.metadata" not in imported
    )
    assert all(f"'{name}'" in names for name in ("merge", "evaluate", "run", "load_report"))
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        _ = fusion_bench.marge  # type: ignore[attr-defined]


def test_language_models_are_merged_file_by_file(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "build", None)  # no module is built
    monkeypatch.setattr(modules, "read_whole", None)
    monkeypatch.chdir(llamas)
    out = fusion_bench.merge(["first", Path("second")], method="average", out=tmp_path / "merged")
    assert out == tmp_path / "merged"
    expected = mean(tensors(llamas / "first"), tensors(llamas / "second"))
    assert all(torch.equal(own, expected[key]) for key, own in tensors(out).items())
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    assert (out / "tokenizer.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_the_recipe_of_a_merge_makes_it_again(llamas: Path, tmp_path: Path) -> None:
    method = TaskArithmeticAlgorithm(scaling_factor=0.25)
    models = {name: llamas / name for name in ("first", "second")}
    out = fusion_bench.merge(models, base=llamas / "base", method=method, out=tmp_path / "merged")
    card = (out / "README.md").read_text()
    recipe = json.loads(metadata(out / "model.safetensors")["fusion_bench"])["config"]
    assert yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])["config"] == recipe
    assert recipe["method"]["scaling_factor"] == 0.25
    assert recipe["modelpool"]["models"]["_pretrained_"] == str(llamas / "base")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe))
    again = str(tmp_path / "again")
    fusion_bench.run(tmp_path / "again.yaml", merged_model_save_path=again)
    assert tensors(tmp_path / "again").keys() == tensors(out).keys()
    for key, own in tensors(tmp_path / "again").items():
        assert torch.equal(own, tensors(out)[key])


def test_paths_modules_and_adapters_are_mixed(llamas: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llamas / "base")
    layer = "model.layers.0.self_attn.q_proj"
    added = write_lora(tmp_path / "adapter", tensors(llamas / "base"), [layer])
    models = {
        "path": str(llamas / "first"),
        "module": AutoModelForCausalLM.from_pretrained(llamas / "second"),
        "adapter": {"path": str(tmp_path / "adapter"), "base": "_pretrained_"},
    }
    merged = fusion_bench.merge(models, base=base, method="task_arithmetic", scaling_factor=0.5)
    assert type(merged) is type(base) and not merged.training
    weight = {
        name: tensors(llamas / name)[f"{layer}.weight"] for name in ("base", "first", "second")
    }
    expected = 0.5 * (weight["first"] + weight["second"] - 2 * weight["base"])
    expected = weight["base"] + expected + 0.5 * added[f"{layer}.weight"].float()
    torch.testing.assert_close(merged.state_dict()[f"{layer}.weight"], expected)


def test_modules_of_any_class() -> None:
    models = [linear(1), linear(3)]
    merged = fusion_bench.merge(models, base=linear(0), method="ties", threshold=100)
    assert isinstance(merged, nn.Linear) and torch.equal(merged.weight, torch.full((2, 2), 2.0))
    assert torch.equal(models[0].weight, torch.full((2, 2), 1.0))
    half = fusion_bench.merge(models, policy={"dtype": "bfloat16"})
    assert half.weight.dtype == torch.bfloat16


def test_a_pool_serves_as_well(llamas: Path) -> None:
    paths = {name: str(llamas / name) for name in ("first", "second")}
    node = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": paths}
    merged = [fusion_bench.merge(models) for models in (paths, node, CausalLMPool(paths))]
    for other in merged[1:]:
        for key, own in merged[0].state_dict().items():
            assert torch.equal(own, other.state_dict()[key])


def test_each_seed_merges_otherwise() -> None:
    def merged(seed: int) -> list[float]:
        base, models = linear(0), [linear(1), linear(2)]
        made = fusion_bench.merge(models, base=base, method="dare_ties", seed=seed)
        return made.state_dict()["weight"].flatten().tolist()

    assert merged(1) == merged(1) and len({tuple(merged(seed)) for seed in range(4)}) > 1


def test_options_are_refused_before_a_model_is_looked_for() -> None:
    def merge(**options: Any) -> Callable[[], object]:
        return lambda: fusion_bench.merge(["/no/such"], base="/no/such", method="ties", **options)

    assert keys(merge(treshold=10, bas="x")) == ["treshold", "bas"]
    assert keys(merge(threshold="10", remove_keys=3)) == ["threshold", "remove_keys"]
    assert keys(merge(threshold=200)) == ["threshold"]
    with pytest.raises(FusionBenchError, match="Did you mean 'threshold'"):
        merge(treshold=10)()
    with pytest.raises(FusionBenchError, match="Did you mean 'base'"):
        merge(bas="x")()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"method": "tis"}, "method"),
        ({"method": {"_target_": "fusion_bench.method.Ties"}}, "method._target_"),
        ({"method": 3}, "method"),
        ({"method": TiesMergingAlgorithm(), "threshold": 3}, "threshold"),
        ({"method": "fisher"}, "method"),
        ({"method": "ties", "base": None}, "base"),
        ({"base": "/no/such"}, "base"),
        ({"base": 3}, "base"),
        ({"models": {"a": "/no/such"}}, "models.a"),
        ({"models": ["/no/such"]}, "models.such"),
        ({"models": [nn.Linear(2, 2), 3]}, "models[1]"),
        ({"models": []}, "models"),
        ({"models": "zoo:clip-tiny_digits"}, "models"),
        ({"policy": {"on_mising": "base"}}, "policy.on_mising"),
        ({"seed": "x"}, "seed"),
        ({"method": "emr"}, "out"),
        ({"out": __file__}, "out"),
        ({"fabric": {"accelerator": "tpuu"}}, "fabric.accelerator"),
    ],
)
def test_what_is_wrong_has_the_argument_s_name(arguments: dict[str, Any], key: str) -> None:
    good: dict[str, Any] = {"models": [linear(1), linear(2)], "base": linear(0)}
    assert keys(lambda: fusion_bench.merge(**good | arguments)) == [key]


def test_a_model_is_evaluated_as_in_a_run(
    program_config: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    whole = instantiate(program_config | {"baselines": "all_tasks"}).run()
    tasks, path = program_config["taskpool"], family / "models" / "a"
    pool = CLIPVisionModelTaskPool(**{k: v for k, v in tasks.items() if k != "_target_"})
    module = CLIPVisionModel.from_pretrained(path)
    reports = [
        fusion_bench.evaluate(path, tasks, fabric={"accelerator": "cpu"}),
        fusion_bench.evaluate(module, pool, output_dir=tmp_path / "out"),
        fusion_bench.evaluate({"a": path, "b": str(family / "models" / "b")}, pool),
    ]
    assert [list(report.models) for report in reports] == [["a"], ["model"], ["a", "b"]]
    for report in reports:
        for name, model in report.models.items():
            expected = whole.models["a" if name == "model" else name]
            assert model.identity == expected.identity
            for task, result in model.tasks.items():
                assert result.metrics["accuracy"].value == (
                    expected.tasks[task].metrics["accuracy"].value
                )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert fusion_bench.load_report(tmp_path / "out") == reports[1]
    assert "sha256" in reports[1].run.config["modelpool"]["models"]["model"]
    # what was made in Python is run again from its config, where the models have names
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(reports[2].run.config))
    again = fusion_bench.run(tmp_path / "config.yaml")
    assert isinstance(again, Report) and again.models == reports[2].models


def test_options_of_tasks(program_config: dict[str, Any], family: Path) -> None:
    tasks, path = program_config["taskpool"], family / "models" / "a"
    report = fusion_bench.evaluate(path, tasks, max_samples=5)
    assert {info.num_samples for info in report.tasks.values()} == {5}
    assert keys(lambda: fusion_bench.evaluate("/no", tasks, max_sample=5)) == ["max_sample"]
    assert keys(lambda: fusion_bench.evaluate(path, tasks, max_samples=0)) == ["max_samples"]
    assert keys(lambda: fusion_bench.evaluate("/no", tasks)) == ["model"]
    assert keys(lambda: fusion_bench.evaluate({"x": "/no"}, tasks)) == ["model.x"]
    assert keys(lambda: fusion_bench.evaluate(3, tasks)) == ["model"]  # type: ignore[arg-type]
    assert keys(lambda: fusion_bench.evaluate({}, tasks)) == ["model"]
    assert keys(lambda: fusion_bench.evaluate(path, "CLIPVisionModelTaskPool/zo")) == ["tasks"]
    assert keys(lambda: fusion_bench.evaluate(path, {"a": 1})) == ["tasks"]


def test_tasks_of_lm_eval_by_name(llamas: Path) -> None:
    assert keys(lambda: fusion_bench.evaluate(llamas / "base", "arc_eazy")) == ["tasks.arc_eazy"]
    names = ["arc_easy", "hellaswg"]
    assert keys(lambda: fusion_bench.evaluate(llamas / "base", names)) == ["tasks.hellaswg"]
    asked = lambda: fusion_bench.evaluate(llamas / "base", names[:1], num_fewshots=2)  # noqa: E731
    assert keys(asked) == ["num_fewshots"]


def test_a_module_needs_a_tokenizer(llamas: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 3)
    task = {
        "_target_": "fusion_bench.taskpool.PerplexityTask",
        "dataset": {"_target_": "datasets.load_dataset", "path": str(tmp_path), "split": "train"},
    }
    tasks = {"_target_": "fusion_bench.taskpool.TaskPool", "tasks": {"one": task, "two": task}}
    module = AutoModelForCausalLM.from_pretrained(llamas / "first")
    assert keys(lambda: fusion_bench.evaluate(module, tasks)) == ["tokenizer"]
    report = fusion_bench.evaluate(module, tasks, tokenizer=llamas / "first")
    beside = fusion_bench.evaluate(llamas / "first", tasks)
    assert report.models["model"].tasks == beside.models["first"].tasks


def test_a_config_is_run_with_changes(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program_config |= {"seed": 1, "alias": "${seed}", "baselines": "none"}
    del program_config["alias"]
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(program_config | {"defaults": ["_self_"]}))
    report = fusion_bench.run(
        file,
        method="ties",
        taskpool={"max_samples": 7},
        output_dir=tmp_path / "out",
        **{"modelpool.policy.dtype": "bfloat16"},
    )
    assert isinstance(report, Report)
    config = report.run.config
    assert config["method"]["_target_"] == "fusion_bench.method.TiesMergingAlgorithm"
    assert config["taskpool"]["max_samples"] == 7 and config["taskpool"]["test_datasets"]
    assert config["modelpool"]["policy"] == {"dtype": "bfloat16"} and config["seed"] == 1
    again = fusion_bench.run(tmp_path / "out" / "config.yaml")
    assert isinstance(again, Report) and again.models == report.models
    seeded = fusion_bench.run(file, method="dare_ties", seed=3, **{"method.sparsity_ratio": 0.25})
    assert isinstance(seeded, Report)
    node = seeded.run.config["method"]
    assert (node["seed"], node["sparsity_ratio"]) == (3, 0.25)
    method = TiesMergingAlgorithm(threshold=5)
    as_object = fusion_bench.run(file, method=method)
    assert isinstance(as_object, Report) and as_object.run.config["method"]["threshold"] == 5
    assert fusion_bench.run(file, dry_run=True) is None
    assert fusion_bench.run(program_config, taskpool=None, similarity=False) is not None
    for changes, key in (
        ({"sed": 2}, "sed"),
        ({"seed": "abc"}, "seed"),
        ({"method": {"treshold": 1}}, "method.treshold"),
        ({"method": "tis"}, "method"),
    ):
        assert keys(lambda changes=changes: fusion_bench.run(file, **changes)) == [key]


def test_configs_by_name_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys(lambda: fusion_bench.run("demo_languag")) == ["config"]
    assert keys(lambda: fusion_bench.run("missing.yaml")) == ["config"]
    assert keys(lambda: fusion_bench.run({"method": {}})) == ["config"]
    assert keys(lambda: fusion_bench.load_report("missing")) == ["path"]
    # ours are known by name, and what they lack is said
    assert "modelpool.models" in keys(lambda: fusion_bench.run("merge_llm", seed=1))[0]
    assert list(tmp_path.iterdir()) == []


def test_hydra_is_as_it_was_before(tmp_path: Path, program_config: dict[str, Any]) -> None:
    from hydra import compose, initialize_config_dir
    from hydra._internal import hydra as internal
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "theirs.yaml").write_text("key: value\n")
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(program_config))
    before = internal.ConfigLoaderImpl
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert fusion_bench.run(tmp_path / "ours.yaml", dry_run=True) is None
        assert fusion_bench.merge([linear(1)], method="average") is not None
        assert compose("theirs") == {"key": "value"}
    assert internal.ConfigLoaderImpl is before and not GlobalHydra.instance().is_initialized()


def test_a_config_from_elsewhere_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("_target_: os.system\ncommand: 'true'\n")
    assert keys(lambda: fusion_bench.run(file)) == ["_target_"]
    file.write_text("seed: ${oc.env:HOME}\n")
    with pytest.raises(FusionBenchError, match="environment variables are not allowed"):
        fusion_bench.run(file)
    shutil.rmtree(tmp_path)


RECIPE = "merge_method: {}\nbase_model: base\nmodels: [{{model: first}}]\nparameters: {{t: 0.25}}\n"


def test_a_recipe_in_place_of_models(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llamas)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format("slerp"))
    out = fusion_bench.merge(recipe=file, out=tmp_path / "merged", policy={"dtype": "float64"})
    merged = fusion_bench.merge(recipe=str(file))
    assert type(merged).__name__ == "LlamaForCausalLM"
    other = fusion_bench.merge(["first"], base="base", method="slerp", t=0.25)
    for key, own in other.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], own)
    assert {own.dtype for own in tensors(out).values()} == {torch.float64}
    assert file.read_text().splitlines()[0] in (out / "README.md").read_text()


def test_what_a_recipe_decides(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llamas)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format("slerp") + "\ntokenizer_source: base\n")
    wrong = {"base": "base", "method": "ties", "tokenizer": "base", "t": 0.5}
    assert keys(lambda: fusion_bench.merge(["first"], recipe=file, **wrong)) == ["models", *wrong]
    assert keys(lambda: fusion_bench.merge()) == ["models"]
    assert keys(lambda: fusion_bench.merge(recipe="none.yaml")) == ["recipe"]
    file.write_text(RECIPE.format("slurp"))
    assert keys(lambda: fusion_bench.merge(recipe=file)) == ["recipe.merge_method"]
