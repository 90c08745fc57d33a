"""The real clients read what the fixtures wrote, through the stand-in of the Hub."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import python
from fixtures_clip import BASE, TASKS, write_base, write_hub
from hub import Hub, hub_stand_in
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

BASE_AS_SAFETENSORS = f"{BASE}-safetensors"

READ_EVERYTHING = """
import json, sys
import torch
from datasets import ClassLabel, Image, load_dataset
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

read = {"models": {}, "datasets": {}}
for name in sys.argv[2:]:
    expected = load_file(f"{sys.argv[1]}/{name.replace('/', '--')}.safetensors")
    model, loading = CLIPVisionModel.from_pretrained(name, output_loading_info=True)
    state = model.state_dict()
    read["models"][name] = {
        "keys": state.keys() == expected.keys(),
        "equal": all(torch.equal(state[key], expected[key]) for key in expected),
        "missing": sorted(loading["missing_keys"]),
        "mismatched": sorted(loading["mismatched_keys"]),
    }
base = sys.argv[2]
clip, loading = CLIPModel.from_pretrained(base, output_loading_info=True)
read["missing in the full model"] = sorted(loading["missing_keys"])
read["unexpected in the full model"] = sorted(loading["unexpected_keys"])
processor = CLIPProcessor.from_pretrained(base)
for name in ("tanganke/sun397", "tanganke/stanford_cars"):
    data = load_dataset(name, split="test")
    images = data[:]["image"]
    read["datasets"][name] = {
        "rows": len(data),
        "types": [type(feature) is kind for feature, kind in
                  zip(data.features.values(), (Image, ClassLabel))],
        "classes": data.features["label"].num_classes,
        "modes": sorted({image.mode for image in images}),
        "sizes": len({image.size for image in images}),
    }
texts = processor.tokenizer(["a photo of a abbey.", "class"], return_tensors="pt", padding=True)
read["text shape"] = list(clip.get_text_features(**texts).pooler_output.shape)
pixels = processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
read["pixels shape"] = list(pixels["pixel_values"].shape)
print(json.dumps(read))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the repositories under `root` hold, and a folder of the same in plain files."""
    root, expected = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("expected")
    written = write_hub(root)
    write_base(root / "models" / BASE_AS_SAFETENSORS, weights="safetensors")
    written[BASE_AS_SAFETENSORS] = written[BASE]
    for name, parameters in written.items():
        save_file(parameters, expected / f"{name.replace('/', '--')}.safetensors")
    return {"root": root, "expected": expected, "names": list(written)}


@pytest.fixture
def hub(models: dict[str, Any]) -> Iterator[Hub]:
    with hub_stand_in(models["root"]) as running:
        yield running


def read_everything(models: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Let a fresh process read all of it, and return what it saw."""
    process = python(READ_EVERYTHING, str(models["expected"]), *models["names"], env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_clients_read_all_repositories_online_and_then_offline(
    models: dict[str, Any], hub: Hub, tmp_path: Path
) -> None:
    online = read_everything(models, hub.environment(tmp_path))

    as_written = {"keys": True, "equal": True, "missing": [], "mismatched": []}
    assert online["models"] == dict.fromkeys(models["names"], as_written)
    assert online["missing in the full model"] == []
    assert online["unexpected in the full model"] == []
    for name, num_classes in TASKS.values():
        data = online["datasets"][f"tanganke/{name}"]
        assert data["rows"] == 36
        assert data["types"] == [True, True]
        assert data["classes"] == num_classes
        assert data["modes"] == ["L", "RGB"]
        assert data["sizes"] > 5
    assert online["text shape"] == [2, 16]
    assert online["pixels shape"] == [36, 3, 32, 32]
    paths = [path for _, path in hub.requests]
    assert any(path.endswith("/pytorch_model.bin") for path in paths)
    assert any(path.endswith("/test-00000-of-00001.parquet") for path in paths)

    hub.requests.clear()
    assert read_everything(models, hub.environment(tmp_path, offline=True)) == online
    assert not hub.requests


def test_writing_twice_gives_the_same_repositories(models: dict[str, Any], tmp_path: Path) -> None:
    write_hub(tmp_path)
    for file in tmp_path.rglob("*.*"):
        twin = models["root"] / file.relative_to(tmp_path)
        assert file.read_bytes() == twin.read_bytes(), file.name


def test_listings(models: dict[str, Any], hub: Hub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint)
    info = api.dataset_info("tanganke/sun397")
    assert api.dataset_info("tanganke/sun397", revision=info.sha).sha == info.sha
    data = ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert info.siblings is not None
    assert [file.rfilename for file in info.siblings] == ["README.md", *data]

    def tree(**kwargs: Any) -> list[str]:
        return [
            e.path for e in api.list_repo_tree("tanganke/sun397", repo_type="dataset", **kwargs)
        ]

    assert tree() == ["README.md", "data"]
    assert tree(recursive=True) == ["README.md", "data", *data]
    assert tree(path_in_repo="data", expand=True) == data
    found = api.get_paths_info("tanganke/sun397", ["data", data[0], "no"], repo_type="dataset")
    assert [entry.path for entry in found] == ["data", data[0]]

    folder = api.snapshot_download(BASE, cache_dir=tmp_path)
    original = models["root"] / "models" / BASE
    for file in original.iterdir():
        assert (Path(folder) / file.name).read_bytes() == file.read_bytes()


def test_ranges(models: dict[str, Any], hub: Hub) -> None:
    url = f"{hub.endpoint}/{BASE}/resolve/main/config.json"
    content = (models["root"] / "models" / BASE / "config.json").read_bytes()
    for header, part in (("bytes=3-9", slice(3, 10)), ("bytes=5-", slice(5, None))):
        request = urllib.request.Request(url, headers={"Range": header})
        with urllib.request.urlopen(request) as response:
            assert response.status == 206
            assert response.read() == content[part]


def test_what_is_not_there_and_what_is_refused(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tanganke/no-such-model")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(BASE, revision="no-such-branch")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(BASE, "no-such-file", cache_dir=tmp_path)

    hub.fail(f"models/{BASE}", 403, "GatedRepo")
    with pytest.raises(GatedRepoError):
        api.model_info(BASE)
    hub.fail("/datasets/", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.dataset_info("tanganke/sun397")
    hub.failures.clear()
    assert api.model_info(BASE).id == BASE
