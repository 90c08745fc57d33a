"""What is there already is not lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.programs import execute
from fusion_bench.programs.output_paths import OutputPaths
from fusion_bench.report import Report


def run(config: dict[str, Any], **changes: Any) -> Report:
    report = instantiate({**config, **changes}).run()
    assert isinstance(report, Report)
    return report


def test_the_report_of_another_config_in_the_output_directory(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    first = run(program_config, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir: .* exists already"):
        run(program_config, output_dir=tmp_path, seed=1)
    assert Report.load(tmp_path / "report.json") == first
    second = run(program_config, output_dir=tmp_path, seed=1, overwrite=True)
    assert Report.load(tmp_path / "report.json") == second


def test_a_report_in_its_other_place_stands(program_config: dict[str, Any], tmp_path: Path) -> None:
    """As the output directory bears the time, the same command has another each time."""
    place = tmp_path / "r.json"
    saved = {"report_save_path": str(place), "merged_model_save_path": str(tmp_path / "model")}
    first = run(program_config, output_dir=tmp_path / "first", **saved)
    before = (tmp_path / "model" / "model.safetensors").stat()
    assert run(program_config, output_dir=tmp_path / "second", **saved) == first
    assert Report.load(tmp_path / "second" / "report.json") == first
    assert (tmp_path / "model" / "model.safetensors").stat() == before
    # It is no other report's place, nor that of anything else.
    with pytest.raises(ConfigError, match=r"report_save_path: .* exists already"):
        run(program_config, output_dir=tmp_path / "third", report_save_path=str(place))
    place.write_text('{"of": "somebody"}')
    with pytest.raises(ConfigError, match=r"report_save_path: .* exists already"):
        run(program_config, output_dir=tmp_path / "third", **saved)
    assert place.read_text() == '{"of": "somebody"}'


def test_a_model_that_was_taken_away_is_made_again(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    saved = {"output_dir": tmp_path / "out", "merged_model_save_path": "{log_dir}/merged"}
    first = run(program_config, **saved)
    (tmp_path / "out" / "merged").rename(tmp_path / "elsewhere")
    assert run(program_config, **saved).models == first.models
    own, other = (
        p / "model.safetensors" for p in (tmp_path / "out/merged", tmp_path / "elsewhere")
    )
    assert own.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_stopped_after_its_model_goes_on(
    program_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    model = {"merged_model_save_path": str(tmp_path / "model")}
    if not evaluated:
        program_config["taskpool"] = None
    with monkeypatch.context() as patch:
        patch.setattr(execute, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(program_config, output_dir=tmp_path / "1", **model)
    assert (tmp_path / "model").is_dir()
    with pytest.raises(ConfigError, match=r"merged_model_save_path: .* exists already"):
        run(program_config, output_dir=tmp_path / "2", seed=1, **model)
    report = run(program_config, output_dir=tmp_path / "3", **model)
    assert Report.load(tmp_path / "3" / "report.json") == report
    assert {p.name for p in tmp_path.iterdir()} == {"model", "3"}
    # Now it is finished, and so the same command has nothing of its own there.
    with pytest.raises(ConfigError, match=r"merged_model_save_path: .* exists already"):
        run(program_config, output_dir=tmp_path / "4", **model)


@pytest.mark.parametrize("foreign", [".git/config", "notes.txt", "task/thesis.tex", "model.py"])
def test_what_is_no_model_is_never_replaced(foreign: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    places = OutputPaths({}, None, overwrite=True)
    places.put_model(str(model))
    places.check_model()
    for name in ("config.json", "model-00001-of-00002.safetensors", "README.md", "a/vocab.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).touch()
    places.check_model()
    (model / foreign).parent.mkdir(exist_ok=True)
    (model / foreign).touch()
    with pytest.raises(ConfigError, match=f"is not replaced: '{foreign}' is not part"):
        places.check_model()


def test_what_is_no_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        places = OutputPaths({}, None, overwrite=True)
        places.put_model(str(tmp_path / name))
        with pytest.raises(ConfigError, match="is not replaced"):
            places.check_model()


def test_what_is_not_this_runs_stays_whatever_it_is(tmp_path: Path) -> None:
    places = OutputPaths({"a": 1}, tmp_path, overwrite=False)
    places.check_reports()
    for name, text in [
        ("report.json", "{"),
        ("report.json", "[]"),
        ("report.json", json.dumps({"run": 1})),
        ("report.html", "mine"),
        ("config.yaml", "a: 2"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"hydra\.run\.dir: .* overwrite=true"):
            places.check_reports()
        OutputPaths({"a": 1}, tmp_path, overwrite=True).check_reports()
        (tmp_path / name).unlink()
    # What this run had begun when it was killed.
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "report.html").write_text("half of it")
    places.check_reports()


def test_a_report_is_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_save_path: 'a\.html' does not end in"):
        OutputPaths({}, tmp_path, overwrite=False).put_report("a.html")


@pytest.mark.parametrize("key", ["output_dir", "report_save_path", "merged_model_save_path"])
def test_a_second_run_is_refused_before_it_computes(
    program_config: dict[str, Any],
    tmp_path: Path,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {"output_dir": "out", "report_save_path": "r.json", "merged_model_save_path": "m"}
    (tmp_path / "out").mkdir()
    config = {**program_config, key: str(tmp_path / named[key])}
    del config["taskpool"]
    first, second = instantiate(config), instantiate(config)
    places: list[EnvironmentProblem] = []

    def fuse(*arguments: Any, **more: Any) -> Any:
        with pytest.raises(
            EnvironmentProblem, match=f"'{tmp_path / named[key]}' is in use by"
        ) as refused:
            second.run()
        places.append(refused.value)
        with pytest.raises(EnvironmentProblem, match="is in use by"):
            instantiate({**config, "dry_run": True}).run()
        return real(*arguments, **more)

    real = execute.fuse
    monkeypatch.setattr(execute, "fuse", fuse)
    first.run()
    assert len(places) == 1 and places[0].exit_code == 3
    assert not list(tmp_path.rglob("*.claimed"))
    monkeypatch.undo()
    instantiate({**config, "overwrite": True}).run()  # and the next one may


def test_what_lies_in_another_place_is_held_with_it(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    model = tmp_path / "m"
    config = {**program_config, "merged_model_save_path": str(model)}
    config["report_save_path"] = str(model / "r.json")
    del config["taskpool"]
    instantiate(config).run()
    assert (model / "r.json").exists() and (model / "config.json").exists()
