import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from commandline import python
from fixtures_weights import FLOATS, OTHERS, all_bits, open_directory, total, written
from hub import Hub, closed_endpoint, hub_stand_in
from safetensors.torch import save_file
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository, locate
from fusion_bench.weights import (
    TensorWeights,
    Weights,
    in_memory,
    merge,
    open_repository,
    sha256,
    weight_files,
)
from fusion_bench.weights.hub import HubWeights

NAMES = ["one", "sharded"]


def with_header(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + bytes(8)


BROKEN = {
    "empty": b"",
    "short": b"1234",
    "nonsense": b"nonsense" * 99,
    "list": with_header("[1, 2]"),
    "number": with_header('{"a": 1}'),
    "shape": with_header('{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}'),
    "words": with_header('{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'),
    "type": with_header('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'),
    "nothing-said": with_header('{"a": {}}'),
}


def model() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        str(dtype).removeprefix("torch."): torch.rand(2, 3, generator=random).mul(90).to(dtype)
        for dtype in FLOATS + OTHERS
    } | {"scalar": torch.tensor(1.5), "large": torch.rand(200, 200, generator=random)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    owner = root / "models" / "o"
    for name in ("bin", "other", "nothing", "two"):
        (owner / name).mkdir(parents=True)
    for name, size in (("one", "5GB"), ("sharded", 1000)):
        written(TensorWeights(model()), owner / name, max_shard_size=size)
    torch.save(model(), owner / "bin" / "pytorch_model.bin")
    save_file(model(), owner / "other" / "weights.safetensors")
    for name, content in BROKEN.items():
        (owner / name).mkdir()
        (owner / name / "model.safetensors").write_bytes(content)
    (owner / "nothing" / "config.json").write_text("{}")
    for name in "ab":
        save_file({"a": torch.ones(1)}, owner / "two" / f"{name}.safetensors")
    return root


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in(root) as running:
        use(running.endpoint, tmp_path / "cache", monkeypatch)
        yield running


def use(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def opened(name: str) -> Weights:
    return open_repository(locate(f"o/{name}"))


def large_downloads(hub: Hub) -> list[str]:
    return [path for path in hub.downloads() if not path.endswith(".json")]


@pytest.mark.parametrize("name", NAMES)
def test_the_headers_alone_tell_keys_and_specs(name: str, hub: Hub, root: Path) -> None:
    weights, module = opened(name), TensorWeights(model())
    assert isinstance(weights, HubWeights)
    local = open_directory(root / "models" / "o" / name)
    assert list(weights) == list(local) and len(weights) == len(module)
    assert {key: weights.spec(key) for key in module} == {k: module.spec(k) for k in module}
    assert all(weights.tied_to(key) == key for key in weights)
    assert merge({"m": weights}, total, weights).keys() == module.keys()
    assert not large_downloads(hub)
    files = len(list((root / "models" / "o" / name).glob("*.safetensors")))
    assert len(hub.headers()) == files


@pytest.mark.parametrize("name", NAMES)
def test_the_first_read_downloads_and_the_next_run_needs_no_hub(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(name)
    assert all_bits(first) == all_bits(model())
    assert large_downloads(hub)
    assert all(file.is_file() for file in first.files)
    hub.requests.clear()
    hub.ranges.clear()
    assert all_bits(opened(name)) == all_bits(model())
    assert not large_downloads(hub) and not hub.headers()
    repository = locate(f"o/{name}")
    use(closed_endpoint(), tmp_path / "cache", monkeypatch)
    again = open_repository(repository)
    assert isinstance(again, TensorWeights) and all_bits(again) == all_bits(model())
    assert list(again) == list(first)


def test_offline_in_a_new_process(hub: Hub, tmp_path: Path) -> None:
    expected = sha256(opened("sharded"))
    code = """
from fusion_bench.repository import locate
from fusion_bench.weights import open_repository, sha256
print(sha256(open_repository(locate("o/sharded"))))
"""
    environment = hub.environment(tmp_path, offline=True)
    environment["HF_HUB_CACHE"] = str(tmp_path / "cache")
    hub.requests.clear()
    process = python(code, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == expected
    assert not hub.requests


def test_merging_downloads_each_file_once(hub: Hub) -> None:
    base = TensorWeights(model())
    models = {name: opened(name) for name in NAMES}
    remote = in_memory(merge(models, total, base, elementwise=True))
    assert all_bits(remote) == all_bits(in_memory(merge(dict.fromkeys(NAMES, base), total, base)))
    assert len(large_downloads(hub)) == len(set(large_downloads(hub)))


def test_the_state_that_was_located_is_read(hub: Hub, tmp_path: Path) -> None:
    changing = hub.root / "models" / "o" / "changing"
    changing.mkdir()
    save_file({"a": torch.ones(1)}, changing / "model.safetensors")
    repository = locate("o/changing")
    save_file({"a": torch.ones(2)}, changing / "model.safetensors")
    with pytest.raises(FusionBenchError, match="o/changing"):
        open_repository(repository)


def test_pickles_are_downloaded_for_they_have_no_header(hub: Hub) -> None:
    assert all_bits(opened("bin")) == all_bits(model())
    assert len(large_downloads(hub)) == 1


def test_the_only_safetensors_file_may_have_any_name(hub: Hub) -> None:
    assert weight_files(locate("o/other")) == ["weights.safetensors"]
    assert all_bits(opened("other")) == all_bits(model())


@pytest.mark.parametrize("name", ["nothing", "two"])
def test_a_repository_without_weights_is_named(name: str, hub: Hub) -> None:
    with pytest.raises(FusionBenchError, match=f"There are no weights in 'o/{name}'"):
        opened(name)


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_cannot_be_read_is_named(name: str, hub: Hub) -> None:
    with pytest.raises(FusionBenchError, match=f"o/{name}"):
        opened(name)


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_fails_is_named(status: int, hub: Hub) -> None:
    repository = locate("o/one")
    hub.fail("resolve", status)
    with pytest.raises(FusionBenchError, match="o/one"):
        open_repository(repository)


def test_a_download_that_fails_is_named(hub: Hub) -> None:
    weights = opened("one")
    hub.fail("resolve", 404)
    with pytest.raises(FusionBenchError, match="o/one"):
        in_memory(merge({"m": weights}, total))


def test_a_directory_is_opened_as_it_is(root: Path) -> None:
    for name in [*NAMES, "bin", "other"]:
        directory = root / "models" / "o" / name
        weights = open_repository(locate(str(directory)))
        assert all_bits(weights) == all_bits(model())
        assert {file.parent for file in weights.files} == {directory}


def test_the_best_format_is_taken(tmp_path: Path) -> None:
    files = ["pytorch_model.bin", "model.safetensors", "extra.safetensors"]
    assert weight_files(Repository("n", frozenset(files))) == ["model.safetensors"]
    assert weight_files(Repository("n", frozenset(files[:1]))) == ["pytorch_model.bin"]
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = frozenset({"model.safetensors.index.json", "pytorch_model.bin"})
    assert weight_files(Repository("n", names, tmp_path)) == [
        "model.safetensors.index.json",
        "1.safetensors",
        "2.safetensors",
    ]


def test_a_local_index_that_names_a_missing_shard_is_said_so(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(FusionBenchError, match=r"names '2\.safetensors', which is missing"):
        open_repository(locate(str(tmp_path)))
