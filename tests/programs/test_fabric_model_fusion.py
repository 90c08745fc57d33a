import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import rewrite, write_llama
from fixtures_scores import loss_sum, num_right
from lightning.fabric import Fabric
from transformers import CLIPVisionModel

from fusion_bench.instantiate import instantiate
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.programs import FabricModelFusionProgram
from fusion_bench.report import Report, Scores
from fusion_bench.report.page import page
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.weights import TensorWeights, sha256


def run(config: dict[str, Any], **changes: Any) -> Report:
    report = instantiate(config | changes).run()
    assert isinstance(report, Report)
    return report


def test_the_report_compares_merged_with_where_it_came_from(
    program_config: dict[str, Any], family: Path
) -> None:
    report = run(program_config)
    assert {n: m.role for n, m in report.models.items()} == {
        "_pretrained_": "pretrained",
        "a": "individual",
        "b": "individual",
        "merged": "merged",
    }
    assert list(report.models["a"].tasks) == ["a"]
    assert list(report.models["merged"].tasks) == ["a", "b"]
    assert report.tasks["b"].num_classes == 5 and report.tasks["b"].num_samples == 23

    # the merged model, made and evaluated by hand
    a, b = (CLIPVisionModel.from_pretrained(family / "models" / n).state_dict() for n in "ab")
    mean = CLIPVisionModel.from_pretrained(family / "models" / "a")
    mean.load_state_dict({key: (a[key].double() + b[key].double()) / 2 for key in a})
    arguments = {k: v for k, v in program_config["taskpool"].items() if k != "_target_"}
    fabric = Fabric(accelerator="cpu", devices=1)
    scores = CLIPVisionModelTaskPool(**arguments).evaluate(mean, fabric)
    for task, score in scores.items():
        result = report.models["merged"].tasks[task]
        assert result.main.value == num_right(score) / 23
        assert result.metrics["loss"].value == pytest.approx(loss_sum(score) / 23, rel=1e-5)
        own = report.models[task].tasks[task].main.value
        assert result.main.normalized == pytest.approx(result.main.value / own)


def test_baselines(program_config: dict[str, Any]) -> None:
    full = run(program_config, baselines="all_tasks")
    assert list(full.models["a"].tasks) == ["a", "b"]
    none = run(program_config, baselines="none")
    assert [name for name, model in none.models.items() if model.tasks] == ["merged"]
    # the others are described
    assert none.models["a"].num_parameters == full.models["a"].num_parameters > 0
    assert (
        none.models["merged"].tasks["a"].main.value == full.models["merged"].tasks["a"].main.value
    )
    with pytest.raises(FusionBenchError, match="Did you mean 'own_task'"):
        run(program_config, baselines="own_tasks")


def test_the_report_names_what_the_models_differ_in(
    program_config: dict[str, Any], family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = program_config["modelpool"]["models"]
    for name, key in (("a", "layer_norm_eps"), ("b", "attention_dropout")):
        shutil.copytree(family / "models" / name, tmp_path / name)
        rewrite(tmp_path / name, lambda config, key=key: config.update({key: 0.25}))
    models["a"] = str(tmp_path / "a")
    models["b"] = {  # which is only known once it is made
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": str(tmp_path / "b"),
        "attn_implementation": "eager",
    }
    report = run(program_config, baselines="none", output_dir=tmp_path / "out")
    facts = [
        "a: 'layer_norm_eps' is 0.25, in _pretrained_ 1e-05; the merged model has that of "
        "_pretrained_.",
        "b: 'attention_dropout' is 0.25, in _pretrained_ 0.0; the merged model has that of "
        "_pretrained_.",
    ]
    assert report.run.notes == facts
    assert [message for message in caplog.messages if message in facts] == facts
    assert "layer_norm_eps" in (tmp_path / "out" / "report.md").read_text()


def test_names_match_tasks_whatever_the_spelling(program_config: dict[str, Any]) -> None:
    models = program_config["modelpool"]["models"]
    datasets = program_config["taskpool"]["test_datasets"]
    models["My_Task"], models["other"] = models.pop("a"), models.pop("b")
    datasets["my-task"] = datasets.pop("a")
    report = run(program_config)
    assert list(report.models["My_Task"].tasks) == ["my-task"]
    assert report.models["other"].tasks == {}


def test_several_processes_give_the_same_counts(program_config: dict[str, Any]) -> None:
    alone = run(program_config)
    fabric = {"accelerator": "cpu", "devices": 2}
    anew = program_config["taskpool"] | {"cache": False}
    together = run(program_config, taskpool=anew, fabric=fabric)
    assert together.run.world_size == 2
    assert list(together.models) == list(alone.models)
    for name, model in together.models.items():
        for task, result in model.tasks.items():
            expected = alone.models[name].tasks[task]
            assert result.main.value == expected.main.value
            assert result.num_samples == expected.num_samples
            assert result.metrics["loss"].value == pytest.approx(
                expected.metrics["loss"].value, rel=1e-6
            )


def test_what_a_run_leaves(program_config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(
        program_config,
        output_dir=out,
        report_save_path="{log_dir}/copies/r.json",
        merged_model_save_path="{log_dir}/merged",
        seed=1,
    )
    assert Report.load(out / "report.json") == Report.load(out / "copies" / "r.json") == report
    assert (out / "report.md").read_text().startswith("# Fusion report")
    assert (out / "report.html").read_text() == page(report, Scores.load(out / "report.json"))
    assert report.run.seed == 1 and report.run.config["seed"] == 1
    assert {p.name for p in out.iterdir()} == {
        *("config.yaml", "report.scores.safetensors"),
        *("report.html", "report.json", "report.md", "copies", "merged"),
    }
    assert {p.name for p in (out / "copies").iterdir()} == {"r.scores.safetensors", "r.json"}

    saved = deepcopy(program_config)
    saved["modelpool"]["models"] = {"merged": str(out / "merged")}
    again = run(saved, baselines="none")
    assert again.models["merged"] == report.models["merged"].model_copy(
        update={
            "tasks": again.models["merged"].tasks,
            "average": again.models["merged"].average,
        }
    )
    for task, result in again.models["merged"].tasks.items():
        assert result.main.value == report.models["merged"].tasks[task].main.value
        assert (
            result.metrics["loss"].value
            == report.models["merged"].tasks[task].metrics["loss"].value
        )


def test_bare_names_are_in_the_working_directory(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program_config["baselines"] = "none"
    run(program_config, report_save_path="r.json", merged_model_save_path="merged")
    assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == 2
    assert CLIPVisionModel.from_pretrained(tmp_path / "merged")
    with pytest.raises(FusionBenchError, match=r"report_save_path.*exists already"):
        run(program_config, report_save_path="r.json")
    run(program_config, report_save_path="r.json", overwrite=True)


def test_without_a_task_pool_it_only_fuses(program_config: dict[str, Any], tmp_path: Path) -> None:
    report = run(program_config, taskpool=None, merged_model_save_path=str(tmp_path / "m"))
    assert report.tasks == {} and report.models["merged"].tasks == {}
    assert CLIPVisionModel.from_pretrained(tmp_path / "m")


def test_a_dry_run_loads_nothing(program_config: dict[str, Any], tmp_path: Path) -> None:
    assert instantiate(program_config | {"dry_run": True, "output_dir": tmp_path}).run() is None
    assert list(tmp_path.iterdir()) == []
    program_config["modelpool"]["models"]["a"] = "/nowhere"
    with pytest.raises(ConfigError, match=r"modelpool\.models\.a: There is no such directory"):
        instantiate(program_config | {"dry_run": True, "output_dir": tmp_path}).run()
    assert list(tmp_path.iterdir()) == []


class TwoModels:
    """A method that returns a family of weights."""

    def run(self, modelpool: CLIPVisionModelPool) -> dict[str, dict[str, torch.Tensor]]:
        return {f"like_{name}": dict(modelpool.weights(name)) for name in ("a", "b")}


class Ensemble:
    """A method that returns a module."""

    def run(self, modelpool: CLIPVisionModelPool) -> torch.nn.Module:
        return modelpool.load_model("a")


def test_a_method_may_return_several_models_or_a_module(program_config: dict[str, Any]) -> None:
    family = run(program_config, method=TwoModels())
    merged = [name for name, model in family.models.items() if model.role == "merged"]
    assert merged == ["merged/like_a", "merged/like_b"]
    own = family.models["a"]
    assert family.models["merged/like_a"].identity == own.identity
    assert family.models["merged/like_a"].tasks["a"] == own.tasks["a"]
    module = run(program_config, method=Ensemble(), baselines="none")
    assert module.models["merged"].identity == own.identity


def test_objects_serve_as_well_as_nodes(program_config: dict[str, Any], family: Path) -> None:
    program = FabricModelFusionProgram(
        method=SimpleAverageAlgorithm(show_pbar=False),
        modelpool=CLIPVisionModelPool(program_config["modelpool"]["models"]),
        taskpool=instantiate(program_config["taskpool"] | {"_recursive_": False}),
        fabric=Fabric(accelerator="cpu", devices=1),
    )
    report = program.run()
    assert report is not None
    assert report.models == run(program_config).models
    # what was made in Python is recorded so that it can be made again
    again = instantiate(report.run.config).run()
    assert again.models == report.models and again.run.config == report.run.config


def test_nothing_is_written_where_fusing_fails(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    program_config["method"] = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    del program_config["modelpool"]["models"]["_pretrained_"]
    with pytest.raises(FusionBenchError, match="needs the pretrained model"):
        run(program_config, output_dir=tmp_path, merged_model_save_path=str(tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_was_merged_although_it_differs(tmp_path: Path) -> None:
    for seed, (name, dtype) in enumerate([("a", torch.float32), ("b", torch.bfloat16)]):
        write_llama(tmp_path / name, seed=seed, dtype=dtype)
    models = {name: str(tmp_path / name) for name in "ab"}
    config = {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        "modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": models},
    }
    (note,) = run(config).run.notes
    assert note.startswith("b: 21 entries are bfloat16, and float32 in a; they are merged in")
    config["modelpool"]["policy"] = {"on_dtype": "error"}
    with pytest.raises(ConfigError, match="b: all 21 tensors: bfloat16, in a float32"):
        run(config)


def test_the_log_tells_the_seconds_of_each_step(
    program_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fusion_bench"):
        run(program_config)
        steps = [message for message in caplog.messages if message.endswith(" s.")]
        caplog.clear()
        run(program_config, taskpool=None)
    assert [step.split(" in ")[0] for step in steps] == [
        *("Prepared", "Planned", "Loaded", "Fused", "Evaluated", "Reported")
    ]
    assert not any(message.startswith("Evaluated in") for message in caplog.messages)


def test_a_dict_of_modules_is_no_pool(capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError) as refused:
        FabricModelFusionProgram(SimpleAverageAlgorithm(), {"a": module}).run()
    assert str(refused.value).startswith("modelpool: has no _target_. Add one, such as ")


def test_a_node_may_hold_modules(tmp_path: Path) -> None:
    modules = {name: torch.nn.Linear(2, 2) for name in "ab"}
    pool = {"_target_": "fusion_bench.modelpool.HFModelPool", "models": modules}
    report = FabricModelFusionProgram(
        SimpleAverageAlgorithm(), pool, fabric={"accelerator": "cpu"}, output_dir=tmp_path / "out"
    ).run()
    assert report is not None
    recorded = report.run.config["modelpool"]["models"]
    for name, module in modules.items():
        digest = sha256(TensorWeights(module.state_dict()))
        assert recorded[name] == f"torch.nn.modules.linear.Linear in memory, sha256 {digest}"
    with pytest.raises(ConfigError, match=r"modelpool\.models\.a: .* in memory, sha256 "):
        instantiate(report.run.config).run()


def test_without_a_method_the_models_are_evaluated(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    merged = run(program_config, baselines="all_tasks")
    alone = run(program_config, method=None, baselines="all_tasks", output_dir=tmp_path)
    assert alone.models == {n: m for n, m in merged.models.items() if n != "merged"}
    assert "2 models evaluated" in (tmp_path / "report.html").read_text()
    assert "- method" not in (tmp_path / "report.md").read_text()
    for changes, key in (
        ({"baselines": "none"}, "method"),
        ({"taskpool": None}, "method"),
        ({"merged_model_save_path": str(tmp_path / "m")}, "merged_model_save_path"),
    ):
        with pytest.raises(ConfigError) as refused:
            run(program_config, **({"method": None, "baselines": "all_tasks"} | changes))
        assert [problem.key for problem in refused.value.problems] == [key]


def test_nothing_is_looked_at_before_it_runs() -> None:
    program = FabricModelFusionProgram(None, None, seed=-1, baselines="x", fabric="y")
    with pytest.raises(ConfigError) as refused:
        program.run()
    keys = [problem.key for problem in refused.value.problems]
    assert keys == ["baselines", "seed", "method", "modelpool", "fabric"]
