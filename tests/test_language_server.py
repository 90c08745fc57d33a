"""What an editor shows of YAMLs, by the real language server; npm fetches it, nothing is kept."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from language_server import PACKAGE, LanguageServer

from fusion_bench import catalog
from fusion_bench.configs import CONFIG_DIR, schema_line, without_schema_line
from fusion_bench.scripts.verbs.cp import copied

ROOT = Path(__file__).parents[1]
PROGRAM = "_target_: fusion_bench.programs.FabricModelFusionProgram\n"
WHOLE = f"""{PROGRAM}method:
  _target_: fusion_bench.method.TiesMergingAlgorithm
modelpool:
  _target_: fusion_bench.modelpool.CLIPVisionModelPool
  models:
    _pretrained_: zoo:clip-tiny
    digits: zoo:clip-tiny_digits
taskpool: null
"""
TIES = "  _target_: fusion_bench.method.TiesMergingAlgorithm\n"


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what starts the server; without node or the package the tests are skipped."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    install = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", PACKAGE]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm cannot fetch {PACKAGE} in two minutes")
    if done.returncode:
        pytest.skip(f"npm cannot fetch {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
    start = folder / "node_modules" / "yaml-language-server" / "bin" / "yaml-language-server"
    return [node, str(start), "--stdio"]


@pytest.fixture(scope="session")
def server(command: list[str]) -> Iterator[LanguageServer]:
    """Start it as VS Code does in the checkout, with its settings."""
    text = (ROOT / ".vscode" / "settings.json").read_text("utf-8")
    settings = {
        key.removeprefix("yaml."): own
        for key, own in yaml.safe_load(text).items()
        if key.startswith("yaml.")
    }
    with LanguageServer(command, settings, ROOT) as server:
        yield server


def shown(server: LanguageServer, file: Path, text: str) -> list[tuple[int, str]]:
    """Return line and message of what is wrong in a file of a user's own."""
    found = server.diagnostics({file: f"{schema_line(file)}\n{text}"})[file]
    return [(line - 1, message) for line, message in found]


def test_nothing_is_wrong_with_ours(server: LanguageServer) -> None:
    files = {file: file.read_text("utf-8") for file in CONFIG_DIR.rglob("*.yaml")}
    assert len(files) > 100
    wrong = {file: found for file, found in server.diagnostics(files).items() if found}
    assert wrong == {}


def test_nothing_is_wrong_with_copies(server: LanguageServer, tmp_path: Path) -> None:
    for number, entry in enumerate(catalog.entries()):
        if entry.target and entry.kind != "datasets" and number % 9 == 0:
            file = tmp_path / f"own {number}.yaml"
            assert server.diagnostics({file: copied(entry, file)})[file] == [], entry.name


def test_the_settings_find_the_same_schemas(server: LanguageServer) -> None:
    """Where a file does not name its schema."""
    files = {}
    for name in ("method/simple_average", "taskpool/CausalLMEvaluation/zoo", "suite/clip-vit"):
        file = CONFIG_DIR / f"{name}.yaml"
        files[file] = without_schema_line(file.read_text("utf-8")) + "no_such_key: 1\n"
    for path in ("config/mine.yaml", "outputs/2026-01-31/12-00-00/config.yaml"):
        files[ROOT / path] = f"{WHOLE}no_such_key: 1\n"
    for file, found in server.diagnostics(files).items():
        last = files[file].count("\n")
        assert found == [(last, "Property no_such_key is not allowed.")], file
    other = ROOT / ".pre-commit-config.yaml"
    assert server.diagnostics({other: other.read_text("utf-8")})[other] == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"{WHOLE}seed: abc\n", 10, 'Incorrect type. Expected "integer | null".'),
        (f"{WHOLE}sead: 1\n", 10, "Property sead is not allowed."),
        (
            WHOLE.replace(TIES, f"{TIES}  scaling_factor: high\n"),
            4,
            'Incorrect type. Expected "number".',
        ),
        (
            WHOLE.replace(TIES, f"{TIES}  threshold: 20\n  treshold: 20\n"),
            5,
            "Property treshold is not allowed.",
        ),
        (
            WHOLE.replace(TIES, f"{TIES}  merge_func: maen\n"),
            4,
            'Value is not accepted. Valid values: "mean", "sum", "max".',
        ),
        (WHOLE.replace("TiesMerging", "TiesMergin"), 3, "fusion_bench has no such class."),
        (WHOLE.replace(TIES, "  threshold: 20\n"), 2, 'Missing property "_target_".'),
        (WHOLE.replace("TiesMerging", "LiNeS"), 2, 'Missing property "base_method".'),
        (PROGRAM + "method: {_target_: mine.Own}\n", 1, 'Missing property "modelpool".'),
        (
            WHOLE.replace("digits: zoo:clip-tiny_digits", "digits: [zoo:clip-tiny_digits]"),
            8,
            "Incorrect type. Expected one of string, object.",
        ),
        (
            WHOLE.replace(f"\n{TIES}", " [ties]\n"),
            2,
            "Incorrect type. Expected one of object, null, string.",
        ),
        (
            WHOLE.replace("  models:\n", "  policy: {on_missing: bas}\n  models:\n"),
            6,
            'Value is not accepted. Valid values: "error", "base", "skip".',
        ),
        (
            WHOLE.replace("  models:\n", "  test_datasets:\n    digits: mnist\n  models:\n"),
            7,
            "This is a text, not a mapping.",
        ),
        (
            f"{WHOLE}fabric: {{precision: 15-mixed}}\n",
            10,
            "Value is not accepted. Valid values: 64",
        ),
        (f"{WHOLE}fabric: {{device: 1}}\n", 10, "Property device is not allowed."),
    ],
)
def test_a_mistake_is_shown_at_its_line(
    text: str, line: int, message: str, server: LanguageServer, tmp_path: Path
) -> None:
    assert shown(server, tmp_path / "own.yaml", WHOLE) == []
    found = shown(server, tmp_path / "own.yaml", text)
    assert {number for number, _ in found} == {line}
    assert any(said.startswith(message) for _, said in found), found


def labels(server: LanguageServer, file: Path, text: str) -> dict[str, str]:
    """Return what is offered where ``text`` has a ``|``, and what is written then."""
    items = server.completions(file, f"{schema_line(file)}\n{text}")
    return {item["label"]: item["insertText"].strip() for item in items}


def test_completion(server: LanguageServer, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    classes = labels(server, file, "method:\n  _target_: |\n")
    assert "fusion_bench.method.TiesMergingAlgorithm" in classes
    assert not [name for name in classes if "Pool" in name]
    options = labels(server, file, WHOLE.replace(TIES, f"{TIES}  threshold: 1\n  |\n"))
    assert options["merge_func"] == "merge_func: ${1:mean}"
    assert {"scaling_factor", "remove_keys"} < options.keys()
    assert not {"threshold", "lr", "models"} & options.keys()
    assert labels(server, file, WHOLE.replace(TIES, f"{TIES}  merge_func: |\n")).keys() >= {
        *("mean", "sum", "max")
    }
    policy = WHOLE.replace("  models:\n", "  policy:\n    |\n  models:\n")
    assert labels(server, file, policy)["on_missing"] == "on_missing: ${1:error}"
    chosen = "defaults:\n  - fabric_model_fusion\n  - override method: ties_merging\n"
    assert "merge_func" in labels(server, file, f"{chosen}method:\n  |\n")
    names = labels(server, file, "defaults:\n  - fabric_model_fusion\n  - method: |\n")
    assert {"ties_merging", "dare/ties_merging"} < names.keys()
    assert {"modelpool", "seed"} < labels(server, file, f"{PROGRAM}|\n").keys()


def test_hover(server: LanguageServer, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"

    def hover(text: str) -> str:
        return server.hover(file, f"{schema_line(file)}\n{text}")

    shown = hover(WHOLE.replace(TIES, f"{TIES}  thres|hold: 1\n"))
    assert shown.startswith("#### TiesMergingAlgorithm\n\nhow much of each task vector is kept")
    shown = hover(WHOLE.replace("TiesMerging", "Ties|Merging"))
    assert "the elements that agree in sign" in shown and "OPCM" not in shown
    assert "random" in hover(f"{WHOLE}se|ed: 1\n")


def test_classes_of_a_users_own(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "own_methods.py").write_text(
        'class Own:\n    """Mine.\n\n    Args:\n        share: how much.\n    """\n\n'
        "    def __init__(self, share: float = 0.5): ...\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    done = fusion_bench("schema", "--allow", "own_methods", cwd=folder)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    file, method = folder / "own.yaml", "  _target_: own_methods.Own\n"
    text = f"{line}\n{WHOLE.replace(TIES, method)}"
    with LanguageServer(command, {}, folder) as server:
        assert server.diagnostics({file: text})[file] == []
        wrong = text.replace(method, f"{method}  shear: 1\n")
        assert server.diagnostics({file: wrong})[file] == [(5, "Property shear is not allowed.")]
        offered = server.completions(file, text.replace(method, f"{method}  |\n"))
        assert [item["label"] for item in offered] == ["share"]


def test_a_server_that_says_nothing_is_no_proof(server: LanguageServer, tmp_path: Path) -> None:
    """Were the schema not found, all the files above would be sound."""
    file: Any = tmp_path / "own.yaml"
    line = "# yaml-language-server: $schema=no_such_schema.json\n"
    assert str(server.diagnostics({file: line + WHOLE})[file]).count("no_such_schema")
