"""What is sent to a stand-in of the Hub, by its real client, and what is not."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from commandline import fusion_bench
from fixtures_llm import metadata, tensors, write_bert
from hub import Fault, Hub, closed_endpoint, hub_stand_in
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fusion_bench.instantiate import instantiate
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.programs.sharing import packed, sent
from fusion_bench.report import Report

TOKEN = "hf_" + "x" * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that was merged of two, one of which states its licence."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    (root / "a" / "README.md").write_text("---\nlicense: mit\n---\n")
    pool = HFModelPool({"a": root / "a", "b": root / "b"})
    weights: Any = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    pool.save_model(weights, root / "merged", {"seed": None})
    return root / "merged"


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "merged"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with hub_stand_in(tmp_path / "hub") as running:
        running.token = TOKEN
        yield running


def push(
    hub: Hub, folder: Path, *words: str, token: str | None = TOKEN, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    env = hub.environment(folder.parent / "cache", offline=offline)
    env |= {} if token is None else {"HF_TOKEN": token}
    return fusion_bench("push", str(folder), "me/merged", *words, cwd=folder.parent, env=env)


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Let the client of this process write there."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return hub


def written(hub: Hub) -> list[tuple[str, str]]:
    return [(how, where) for how, where in hub.requests if how in ("POST", "PUT")]


def test_a_model_is_sent_privately_with_its_card(hub: Hub, folder: Path) -> None:
    done = push(hub, folder)
    assert done.returncode == 0, done.stderr
    there = hub.root / "models" / "me" / "merged"
    assert {f.name for f in there.iterdir()} == {f.name for f in folder.iterdir()}
    assert hub.private == {"me/merged"} and f"{hub.endpoint}/me/merged" in done.stdout
    for file in folder.iterdir():
        if file.name != "README.md":
            assert (there / file.name).read_bytes() == file.read_bytes()
    card = (there / "README.md").read_text()
    assert 'name = "me/merged"' in card
    assert f"| `{folder.parent}" not in card
    rows = [line for line in card.split("## Licences")[1].splitlines() if line.startswith("| `")]
    assert [row.rpartition("/")[2] for row in rows] == ["a` | mit |", "b` | not stated |"]
    assert ModelCard(card).data.license is None  # of which but one is known
    assert "No licence is known of" in done.stdout and "names paths of this machine" not in card
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, "--dry-run", token=None, offline=True)
    assert done.returncode == 0, done.stderr
    for name in ("README.md", "config.json", "model.safetensors", "## Usage", "## Recipe"):
        assert name in done.stdout
    assert "in all" in done.stdout and "Dry run: nothing was sent" in done.stdout
    assert hub.requests == []


def test_public_is_asked_for(here: Hub, folder: Path) -> None:
    package = packed(folder, "me/merged")
    sent(package, public=True, overwrite=False)
    assert here.private == set()
    with pytest.raises(ConfigError, match="'me/merged' is public\\. Give --public"):
        sent(package, public=False, overwrite=True)
    sent(package, public=True, overwrite=True)


def test_a_private_repository_is_made_public(here: Hub, folder: Path) -> None:
    package = packed(folder, "me/merged")
    sent(package, public=False, overwrite=False)
    sent(package, public=True, overwrite=True)
    assert here.private == set()


def test_other_content_is_replaced_where_asked_for(here: Hub, folder: Path) -> None:
    there = here.root / "models" / "me" / "merged"
    there.mkdir(parents=True)
    (there / "old.bin").write_bytes(b"x")
    (there / ".gitattributes").write_text("")
    here.private = {"me/merged"}
    package = packed(folder, "me/merged")
    with pytest.raises(ConfigError, match="'me/merged' holds 1 files already, such as 'old\\.bin'"):
        sent(package, public=False, overwrite=False)
    assert written(here) == []
    sent(package, public=False, overwrite=True)
    names = {file.name for file in there.iterdir()}
    assert names == {".gitattributes"} | {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("pattern", ["repos/create", "preupload", "objects/batch", "commit/main"])
def test_a_failing_hub_is_asked_again(
    here: Hub, folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    here.spoil(Fault(pattern, 503, times=1))
    sent(packed(folder, "me/merged"), public=False, overwrite=False)
    there = tensors(here.root / "models" / "me" / "merged")
    assert all((there[key] == value).all() for key, value in tensors(folder).items())


def test_whoever_is_not_logged_in_is_told_what_to_do(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, token=None)
    assert done.returncode == 2 and "Run 'hf auth login'" in done.stderr
    assert hub.requests == []


def test_another_token_may_not_write(
    here: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 20)
    with pytest.raises(ConfigError, match=r"does not let you write to 'me/merged' \(401\)"):
        sent(packed(folder, "me/merged"), public=False, overwrite=False)
    assert not (here.root / "models").exists()


def test_without_a_network(here: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        sent(packed(folder, "me/merged"), public=False, overwrite=False)


def foreign(folder: Path) -> None:
    (folder / "modeling.py").write_text("")


def hidden(folder: Path) -> None:
    (folder / ".env").write_text("")


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def linked(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "vocab.json").symlink_to(folder.parent / "secret.json")


def linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def token_in_config(folder: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | {"note": "hf_" + "A" * 30}
    file.write_text(json.dumps(content))


def token_in_card(folder: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write("git clone https://me:password@example.org/x\n")


def token_in_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    said = metadata(file)
    save_file(load_file(file), file, metadata=said | {"note": "hf_" + "A" * 30})


def without_recipe(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoilt_header(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n# m\n\n## Recipe\n")


REFUSED: list[tuple[Any, str]] = [
    (foreign, "modeling.py' is not part of a merged model"),
    (hidden, ".env' is not part of a merged model"),
    (pickled, "pytorch_model.bin' is not part of a merged model"),
    (linked, "is a link to"),
    (linked_folder, "more' is not part of a merged model"),
    (token_in_config, r"config.json' holds what looks like a token: .*\*\*\*"),
    (token_in_card, r"README.md' holds what looks like a token: .*\*\*\*@example"),
    (token_in_header, r"model.safetensors' holds what looks like a token"),
    (without_recipe, "was not merged by FusionBench"),
    (without_config, "has no config.json"),
    (without_weights, "is not a merged model: it has no weights"),
    (cut_off, "model.safetensors"),
    (spoilt_header, "header of .*README.md' cannot be read"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_what_is_not_sent(spoil: Any, message: str, folder: Path) -> None:
    assert packed(folder, "me/m").files
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        packed(folder, "me/m")
    assert "A" * 30 not in str(caught.value) and "password" not in str(caught.value)


@pytest.mark.parametrize("name", ["me", "me/", "a/b/c", "../x", "me/a b", "me/-x-", "m--e/x"])
def test_names_of_repositories(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a repository\. Give owner/name"):
        packed(folder, name)


def test_a_common_licence_is_in_the_header(folder: Path, model: Path) -> None:
    card = model.parent / "b" / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    try:
        package = packed(folder, "me/m")
    finally:
        card.unlink()
    assert ModelCard(package.card).data.license == "mit"
    assert not any("licence" in note for note in package.notes)


def test_what_people_wrote_stays(folder: Path) -> None:
    file = folder / "README.md"
    text = file.read_text().replace("# merged\n", "# My model\n\nIt rhymes.\n")
    text = text.replace(
        "library_name: transformers\n", "library_name: transformers\nlanguage: en\n"
    )
    file.write_text(text)
    (folder / "LICENSE").write_text("Do what you like.")
    package = packed(folder, "me/m")
    assert "# My model\n\nIt rhymes.\n" in package.card and "language: en" in package.card
    assert "LICENSE" in package.files
    assert file.read_text() == text  # the folder stays as it is
    file.unlink()
    assert "## Usage" in packed(folder, "me/m").card  # also where there was none


def test_the_runs_table_is_in_the_card(program_config: dict[str, Any], tmp_path: Path) -> None:
    paths = {"output_dir": tmp_path / "out", "merged_model_save_path": str(tmp_path / "merged")}
    run = instantiate({**program_config, **paths}).run
    report = run()
    assert isinstance(report, Report)
    card = (tmp_path / "merged" / "README.md").read_text()
    accuracy = report.models["merged"].tasks["a"].main.value
    (row,) = [line for line in card.splitlines() if line.startswith("| merged |")]
    assert row.split("|")[2].strip().startswith(f"{100 * accuracy:.1f} ±")
    run()  # which is done already
    assert (tmp_path / "merged" / "README.md").read_text() == card
    package = packed(tmp_path / "merged", "me/m")
    assert row in package.card and not any("no results" in note for note in package.notes)
    (tmp_path / "merged" / "README.md").write_text(card.replace(row, "| lost |"))
    assert row in packed(tmp_path / "merged", "me/m", tmp_path / "out" / "report.json").card


def test_several_models_are_pushed_one_by_one(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "several" / "one")
    with pytest.raises(ConfigError, match=r"holds several models: push each, such as .*one'"):
        packed(tmp_path / "several", "me/m")


def test_an_unreachable_hub(here: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_endpoint())
    package = packed(folder, "me/m")
    with pytest.raises(EnvironmentProblem, match=r"^'me/m' was not written: .* Start the command"):
        sent(package, public=False, overwrite=False)
