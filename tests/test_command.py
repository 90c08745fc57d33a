"""What was typed is read in one place, whatever libraries are given to read."""

import ast
import sys
from pathlib import Path

import pytest

import fusion_bench
from fusion_bench.command import file_as_options, option, overrides, replaced, typed
from fusion_bench.problems import FusionBenchError


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["method=ties", "++seed=1", "--config-path", "here", "--config-dir=there", "-cd"]
    monkeypatch.setattr(sys, "argv", ["fusion_bench", *words])


def test_overrides_and_options() -> None:
    assert typed()[:2] == ["fusion_bench", "method=ties"]
    assert overrides() == {"method": "ties", "seed": "1", "--config-dir": "there"}
    assert option("--config-path", "--config-dir") == ["here", "there"]
    assert option("-cd") == []


def test_what_libraries_read_is_not_what_was_typed() -> None:
    before = typed()
    with replaced(["seed=2"]):
        assert sys.argv == ["fusion_bench", "seed=2"]
        assert typed() == before
    assert sys.argv == before


def test_nobody_else_reads_it() -> None:
    package = Path(fusion_bench.__file__).parent
    readers = [
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "argv"
    ]
    assert set(readers) == {"command.py"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a/b.yaml", "x=1"], ["--config-path", "a", "--config-name", "b", "x=1"]),
        (["-m", "b.yml"], ["-m", "--config-path", ".", "--config-name", "b"]),
        (["x=1", "/b.yaml"], ["x=1", "--config-path", "/", "--config-name", "b"]),
        (["--config-name", "b.yaml"], ["--config-name", "b.yaml"]),
        (["report_save_path=b.yaml"], ["report_save_path=b.yaml"]),
        ([], []),
    ],
)
def test_a_config_file_stands_for_two_options(words: list[str], wanted: list[str]) -> None:
    assert file_as_options(words) == wanted


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a b/own.yaml", "defaults: [search]", ["{}/a b", "own"]),
        ("a=b/config.yml", "", ["{}/a=b", "config"]),
        (
            "conf/method/own/x.yaml",
            "_target_: my.X",
            ["{}/conf", "fabric_model_fusion", "method=own/x"],
        ),
        ("conf/modelpool/CLIP/x.yaml", "", ["{}/conf", "fabric_model_fusion", "modelpool=CLIP/x"]),
        ("conf/modelpool/CausalLM/x.yaml", "", ["{}/conf", "merge_llm", "modelpool=CausalLM/x"]),
        ("conf/taskpool/x.yaml", "", ["{}/conf", "demo_language", "taskpool=x"]),
        ("conf/fabric/x.yaml", "", ["{}/conf", "fabric_model_fusion", "fabric=x"]),
        ("method/x.yaml", "_target_: fusion_bench.programs.Any", ["{}/method", "x"]),
        ("method/x.yaml", "seed: 1\nmodelpool:\n  _target_: x", ["{}/method", "x"]),
        ("dataset/x.yaml", "defaults: [search]", ["{}/dataset", "x"]),
    ],
)
def test_a_file_that_is_run(file: str, text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    folder, config, *choice = (word.format(tmp_path) for word in words)
    expected = ["--config-path", folder, "--config-name", config, *choice, "seed=1"]
    assert file_as_options([str(path), "seed=1"]) == expected


def test_a_part_that_no_run_is_made_of_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "launcher" / "x.yaml"
    path.parent.mkdir()
    path.write_text("_target_: hydra_plugins.x.Launcher")
    with pytest.raises(FusionBenchError, match=r"x\.yaml' is a part .* group 'launcher'\. Name it"):
        file_as_options([str(path)])
    assert file_as_options(["key=x.yaml"]) == ["key=x.yaml"]
    assert file_as_options(["not/there.yaml"])[1:] == ["not", "--config-name", "there"]
