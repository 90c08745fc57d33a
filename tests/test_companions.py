"""What is read of a model's folder lies in it."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from fusion_bench.companions import CONFIGS, KNOWN, check_folder, module_folders, own_file
from fusion_bench.problems import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.txt").write_text("a")
    return tmp_path / "model"


@pytest.mark.parametrize("name", KNOWN)
def test_no_file_that_libraries_know_may_be_a_link_to_elsewhere(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    with pytest.raises(ConfigError, match=f"{name}' is a link to .*secret'"):
        check_folder(folder)


def test_a_link_by_way_of_another_folder(folder: Path) -> None:
    (folder / "inner").symlink_to("..")
    (folder / "tokenizer.json").symlink_to("inner/secret")
    with pytest.raises(ConfigError, match="is a link to"):
        check_folder(folder)


def test_a_folder_of_templates_that_is_elsewhere(folder: Path) -> None:
    (folder.parent / "notes").mkdir()
    (folder.parent / "notes" / "private.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to("../notes")
    with pytest.raises(ConfigError, match=r"private\.jinja' is a link to"):
        check_folder(folder)


def test_what_is_hidden_in_the_folder_is_not_the_model(folder: Path) -> None:
    """A clone's .git/config may hold the token that it was fetched with."""
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("url = https://user:token@host")
    (folder / "chat_template.jinja").symlink_to(".git/config")
    with pytest.raises(ConfigError, match="is a link to"):
        check_folder(folder)


def test_links_inside_of_the_folder(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("vocab.txt")
    check_folder(folder)
    assert own_file(folder, "tokenizer.model") == folder / "tokenizer.model"


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    (folder.parent / "named").symlink_to(folder)
    check_folder(folder.parent / "named")
    assert own_file(folder.parent / "named", "vocab.txt").read_text() == "a"


def test_a_hard_link_is_a_file(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "config.json")
    check_folder(folder)


@pytest.mark.parametrize(
    "blob", [f"models--o--n/blobs/{'0a' * 20}", f"models--o--n/blobs/{'0a' * 32}"]
)
def test_the_layout_of_the_hubs_cache(
    tmp_path: Path, blob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "main"
    for place in (snapshot, (tmp_path / blob).parent):
        place.mkdir(parents=True)
    (tmp_path / blob).write_text("{}")
    (snapshot / "config.json").symlink_to(f"../../../{blob}")
    check_folder(snapshot)
    (tmp_path / "old").mkdir()  # as older clients laid out a local directory
    (tmp_path / "old" / "config.json").symlink_to(tmp_path / blob)
    with pytest.raises(ConfigError, match="is a link"):  # it only looks like the user's cache
        check_folder(tmp_path / "old")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    check_folder(tmp_path / "old")


def test_files_of_another_repository_are_not_the_models(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "main"
    secret = tmp_path / "models--me--private" / "blobs" / "x"
    for place in (snapshot, secret.parent):
        place.mkdir(parents=True)
    secret.write_text("{}")
    (snapshot / "config.json").symlink_to(secret)
    with pytest.raises(ConfigError, match="is a link"):
        check_folder(snapshot)


def test_the_store_that_repositories_in_the_hubs_cache_share(tmp_path: Path) -> None:
    shared = tmp_path / "blobs" / "0a" / ("0a" * 32)
    blob = tmp_path / "models--o--n" / "blobs" / ("1b" * 32)
    snapshot = tmp_path / "models--o--n" / "snapshots" / "main"
    for place in (shared.parent, blob.parent, snapshot):
        place.mkdir(parents=True)
    shared.write_text("x")
    blob.symlink_to(shared)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert own_file(snapshot, "model.safetensors")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [*CONFIGS, "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=f"{name}' is not a regular file"):
        check_folder(folder)


@pytest.mark.timeout(10)
def test_a_device_is_not_read(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a link to '/dev/zero'"):
        check_folder(folder)


def test_a_directory_is_no_file(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match="is not a regular file"):
        check_folder(folder)


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json"])
def test_a_link_that_leads_nowhere(folder: Path, target: str) -> None:
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(ConfigError, match="is a broken link"):
        check_folder(folder)


def test_a_size_that_no_tokenizer_has(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room
    with pytest.raises(ConfigError, match=r"tokenizer\.json' has 1048576 MiB; no more than 256"):
        check_folder(folder)


def test_weights_may_be_large(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2**40)
    assert own_file(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["a\0b", "../secret", "x/../../secret", "/etc/hostname", "gone"])
def test_names_of_no_file_of_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        own_file(folder, name)


def test_modules() -> None:
    kinds = {"": "s.Transformer", "1_Pooling": "s.Pooling", "2_Normalize": "s.Normalize"}
    listed = [{"idx": 0, "path": path, "type": kind} for path, kind in kinds.items()]
    assert module_folders(listed, "m") == {k: v for k, v in kinds.items() if k}


@pytest.mark.parametrize(
    "path", ["..", ".", "../x", "/etc", "a/b", ".git", "a\\b", "a\0", "a/", "./a", "~/.ssh"]
)
def test_modules_elsewhere(path: str) -> None:
    with pytest.raises(ConfigError, match="not a folder next to it"):
        module_folders([{"path": path, "type": "s.Pooling"}], "m")


@pytest.mark.parametrize("content", [None, 3, {}, "x", [3], [{}], [{"path": 3, "type": "t"}]])
def test_what_is_no_list_of_modules(content: Any) -> None:
    with pytest.raises(ConfigError, match="is not a list of modules"):
        module_folders(content, "m")


def test_no_code_is_on_the_list() -> None:
    assert not [name for name in KNOWN if name.endswith((".py", ".sh", ".so", ".pkl"))]
    assert not [name for name in KNOWN if set(name) & set("*?[")]
