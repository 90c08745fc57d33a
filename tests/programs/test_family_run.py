"""Families in whole runs: saved in one pass, evaluated one after another."""

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_llm import metadata
from fixtures_weights import all_bits, open_directory

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.programs import preflight, verify
from fusion_bench.report import Report
from fusion_bench.weights import write

TIES = "fusion_bench.method.TiesMergingAlgorithm"
AVERAGE = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
FAMILY = {
    "_target_": "fusion_bench.method.Family",
    "base_method": {"_target_": TIES},
    "options": {"scaling_factor": [0.3, 1.0], "threshold": [30]},
    "methods": {"average": AVERAGE},
}
NAMES = ["scaling_factor=0.3,threshold=30", "scaling_factor=1.0,threshold=30", "average"]
ALONE: dict[str, dict[str, Any]] = {
    NAMES[0]: {"_target_": TIES, "scaling_factor": 0.3, "threshold": 30},
    NAMES[1]: {"_target_": TIES, "scaling_factor": 1.0, "threshold": 30},
    NAMES[2]: AVERAGE,
}


def run(config: dict[str, Any], **changes: Any) -> Report:
    report = instantiate(config | changes).run()
    assert isinstance(report, Report)
    return report


def saved(config: dict[str, Any], path: Path, **changes: Any) -> Path:
    run(config, taskpool=None, merged_model_save_path=str(path), **changes)
    return path


def test_each_model_is_saved_as_its_method_alone_saves_it(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    out = saved(program_config, tmp_path / "out", method=FAMILY)
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    for name, method in ALONE.items():
        one = saved(program_config, tmp_path / f"one {name}", method=method)
        assert all_bits(open_directory(out / name)) == all_bits(open_directory(one))
        assert {f.name for f in (out / name).iterdir()} == {f.name for f in one.iterdir()}
        recipe = json.loads(metadata(out / name / "model.safetensors")["fusion_bench"])
        own = recipe["config"]["method"]
        assert own["_target_"] == method["_target_"]
        assert {key: own[key] for key in method} == method
        told = list(verify.verify(out / name, entries=None))
        assert told[-2].endswith("computed again from the recipe, are equal bit for bit.")


def test_figures_are_those_of_the_methods_alone(program_config: dict[str, Any]) -> None:
    report = run(program_config, method=FAMILY)
    merged = {name: own for name, own in report.models.items() if own.role == "merged"}
    assert list(merged) == [f"merged/{name}" for name in NAMES]
    for name, method in ALONE.items():
        alone = run(program_config, method=method).models["merged"]
        assert merged[f"merged/{name}"] == alone


def test_saved_and_evaluated_in_one_run(program_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out"
    report = run(program_config, method=FAMILY, merged_model_save_path=str(path))
    first, *_ = NAMES
    *_, told, verdict = verify.verify(path / first, entries=2)
    assert "bit for bit" in told and verdict.endswith("is verified.")
    assert report.models[f"merged/{first}"].tasks
    alone = run(program_config, method=ALONE[first]).models["merged"]
    assert report.models[f"merged/{first}"] == alone


def test_a_disk_that_is_full_leaves_nothing(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = write._write_at, []

    def full(file: int, data: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        own(file, data, offset)

    monkeypatch.setattr(write, "_write_at", full)
    with pytest.raises(EnvironmentProblem, match=r"disk is full\. The 3 models take 0\.\d\d GB"):
        saved(program_config, tmp_path / "out", method=FAMILY)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_plan_counts_all_models(
    program_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(method: dict[str, Any]) -> int:
        changes = {"taskpool": None, "dry_run": True, "method": method}
        path = str(tmp_path / "out")
        program = instantiate(program_config | changes | {"merged_model_save_path": path})
        plan = preflight.preflight(execute_prepared(program))
        (written,) = [step.nbytes for step in plan.steps if step.key == "merged_model_save_path"]
        assert written is not None
        return written

    assert planned(FAMILY) == 3 * planned(AVERAGE)
    assert f"3 models in one reading: {', '.join(NAMES)}" in " ".join(
        capsys.readouterr().out.split()
    )


def execute_prepared(program: Any) -> Any:
    """Return a program's objects."""
    from fusion_bench.instantiate import SharedObjects
    from fusion_bench.programs.prepare import prepare

    return prepare(program.spec, SharedObjects())


def test_a_wrong_value_is_told_with_its_key(program_config: dict[str, Any]) -> None:
    options = {"threshold": [20, 200], "keeps": ["ge_kth"]}
    with pytest.raises(ConfigError, match=r"method\.options\.keeps: TiesMergingAlgorithm takes no"):
        run(program_config, method={**FAMILY, "options": options})
    del options["keeps"]
    with pytest.raises(ConfigError, match=r"method\.options\.threshold\[1\]: 200 is not a number"):
        run(program_config, method={**FAMILY, "options": options})
    several = {"_target_": TIES, "scaling_factor": [0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"choose method=family and give it as method\.options\."):
        run(program_config, method=several)


def test_no_more_than_two_models_are_in_memory(
    program_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from fusion_bench.programs import ahead

    alive: list[weakref.ref[object]] = []
    own, most = ahead.in_memory_product, 0

    def counting(model: Any) -> Any:
        nonlocal most
        made = own(model)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(ahead, "in_memory_product", counting)
    options = {"scaling_factor": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    run(program_config, method={**FAMILY, "options": options}, baselines="none")
    assert len(alive) == 7 and most <= 3  # the one that is let go may still be there
