from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub import Hub, Repository, hub_stand_in

from fusion_bench import zoo
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import locate


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = tmp_path / "models" / "owner" / "name"
    (model / "inner").mkdir(parents=True)
    for file in ("config.json", "vocab.txt", "inner/more.json"):
        (model / file).write_text("{}")
    with hub_stand_in(tmp_path) as running:
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m" / "inner").mkdir(parents=True)
    (tmp_path / "m" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    found = locate("m")
    assert found.files == {"config.json"} and found.commit is None
    assert found.fetch("config.json") == found.directory == tmp_path / "m"
    assert found.has("config.json") and not found.has("config.json", "vocab.txt")


def test_a_directory_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m@1").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/m@1").directory == tmp_path / "m@1"


def test_a_model_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "model_path", lambda name: tmp_path)
    assert locate("zoo:clip-tiny").directory == tmp_path


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FusionBenchError, match=r"file' is not a directory"):
        locate(str(tmp_path / "file"))


def test_a_directory_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusionBenchError, match=r"owner/name@v1.*is a local directory"):
        locate("owner/name@v1")


def test_of_a_repository_only_the_list_of_its_files_is_asked_for(hub: Hub) -> None:
    found = locate("owner/name")
    assert found.files == {"config.json", "vocab.txt"}
    assert found.commit == Repository(hub.root / "models" / "owner" / "name").commit
    client = "/api/agent-harnesses"  # the client asks for it once in each process
    asked = [path for _, path in hub.requests if path not in ("/", client)]
    assert asked and all(path.startswith("/api/models") for path in asked)
    assert not found.has("config.json")


def test_a_hub_that_fails(hub: Hub) -> None:
    hub.fail("/api/models", 503)
    with pytest.raises(FusionBenchError, match=r"owner/name.*503"):
        locate("owner/name")


def test_only_what_is_asked_for_is_downloaded(hub: Hub) -> None:
    found = locate("owner/name")
    place = found.fetch("config.json")
    assert [path.name for path in place.iterdir()] == ["config.json"]
    assert found.has("config.json") and not found.has("config.json", "vocab.txt")


def test_what_is_here_already_costs_no_request(hub: Hub) -> None:
    found = locate("owner/name")
    found.fetch("config.json")
    asked = len([r for r in hub.requests if r[1] != "/"])
    found.fetch("config.json")
    assert len([r for r in hub.requests if r[1] != "/"]) == asked


def test_all_files_are_of_the_state_that_was_found(hub: Hub) -> None:
    found = locate("owner/name")
    (hub.root / "models" / "owner" / "name" / "vocab.txt").write_text("changed")
    with pytest.raises(FusionBenchError, match="owner/name"):
        found.fetch("vocab.txt")  # the stand-in forgets old states; the Hub keeps them


def test_what_a_repository_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    for name in ("owner/name", str(tmp_path)):
        with pytest.raises(FusionBenchError, match=r"no 'a\.bin' in '.*name|no 'a\.bin'"):
            locate(name).fetch("a.bin")


def test_files_in_folders_are_found_when_they_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    for name in ("owner/name", str(tmp_path / "models" / "owner" / "name")):
        found = locate(name)
        assert "inner" in found.folders and found.inside("inner") == {"inner/more.json"}
        assert found.inside("outer") == frozenset()
        assert (found.fetch("inner/more.json") / "inner" / "more.json").read_text() == "{}"
        assert found.has("inner/more.json") and not found.has("inner/less.json")
        with pytest.raises(FusionBenchError, match=r"no 'inner/less\.json'"):
            found.fetch("inner/less.json")


def test_a_file_that_is_too_large_is_not_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = locate("owner/name")
    monkeypatch.setattr("fusion_bench.companions._LARGEST", 1)
    with pytest.raises(FusionBenchError, match=r"'owner/name/vocab\.txt' has 0 MiB; no more"):
        found.fetch("vocab.txt")
    assert not hub.downloads()


def test_what_lies_in_the_hubs_cache_is_read_by_its_links(hub: Hub, tmp_path: Path) -> None:
    place = locate("owner/name").fetch("config.json")
    assert (place / "config.json").is_symlink()
    assert locate(str(place)).fetch("config.json") == place
    (place / "vocab.txt").symlink_to(tmp_path / "models" / "owner" / "name" / "vocab.txt")
    with pytest.raises(FusionBenchError, match="is a link to"):
        locate(str(place)).fetch("config.json")


def test_a_folder_of_links_may_be_named_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").touch()
    (tmp_path / "named").symlink_to("real")
    assert locate(str(tmp_path / "named")).fetch("config.json") == tmp_path / "named"
