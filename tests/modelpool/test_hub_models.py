"""Models that lie on a stand-in of the Hub."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fixtures_llm import metadata, rewrite, tensors, write_llama, write_lora
from hub import Hub, Repository, closed_endpoint, hub_stand_in
from huggingface_hub import ModelCard

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import FusionBenchError

NAMES = {"_pretrained_": "org/base", "a": "org/a", "b": "org/b"}
FUSE = SimpleAverageAlgorithm(show_pbar=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("base", "a")):
        write_llama(root / "models" / "org" / name, seed=seed)
    write_llama(root / "models" / "org" / "b", seed=2, shard_size=4000)
    write_llama(root / "models" / "org" / "wide", seed=3, vocabulary=40)
    return root


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in(root) as running:
        use(running.endpoint, tmp_path, monkeypatch)
        yield running


def use(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def weights_files(paths: list[str]) -> list[str]:
    return [path for path in paths if path.endswith(".safetensors")]


def commit(root: Path, name: str) -> str:
    return Repository(root / "models" / name).commit


def test_one_request_a_file_tells_keys_and_shapes(hub: Hub, root: Path) -> None:
    pool = CausalLMPool({"a": "org/a"})
    weights = pool.weights("a")
    written = tensors(root / "models" / "org" / "a")
    assert {k: weights.spec(k).shape for k in weights} == {k: v.shape for k, v in written.items()}
    path = f"/org/a/resolve/{commit(root, 'org/a')}/model.safetensors"
    assert weights_files(hub.headers()) == [path]
    assert weights_files(hub.downloads()) == []


def test_models_that_do_not_fit_are_refused_before_they_are_downloaded(hub: Hub) -> None:
    pool = CausalLMPool({"a": "org/a", "b": "org/b", "wide": "org/wide"})
    with pytest.raises(FusionBenchError, match=r"wide: 'model\.embed_tokens\.weight'"):
        FUSE.run(pool)
    assert weights_files(hub.headers()) and weights_files(hub.downloads()) == []


def test_hub_models_are_merged_and_each_file_is_downloaded_once(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    pool = CausalLMPool(NAMES)
    pool.save_model(TaskArithmeticAlgorithm(0.5, show_pbar=False).run(pool), tmp_path / "m")
    got = tensors(tmp_path / "m")
    base, a, b = (tensors(root / "models" / name) for name in NAMES.values())
    for key in base:
        exact = a[key].double() + b[key].double() - 2 * base[key].double()
        exact = base[key].double() + 0.5 * exact
        assert torch.equal(got[key], exact.bfloat16())
    downloads = weights_files(hub.downloads())
    assert len(downloads) == len(set(downloads)) > 3
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_a_commit_may_be_named(hub: Hub, root: Path) -> None:
    sha = commit(root, "org/a")
    pool = CausalLMPool({"a": f"org/a@{sha}"})
    key = "model.norm.weight"
    assert torch.equal(pool.weights("a")[key], tensors(root / "models" / "org" / "a")[key])
    assert pool.load_model("a")


def test_a_commit_that_does_not_exist_is_named(hub: Hub) -> None:
    with pytest.raises(FusionBenchError, match="org/a"):
        CausalLMPool({"a": f"org/a@{'0' * 40}"}).weights("a")


@pytest.mark.parametrize("pinned", [False, True])
def test_offline_the_cache_serves(
    hub: Hub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    names = {k: f"{v}@{commit(root, v)}" if pinned else v for k, v in NAMES.items()}
    pool = CausalLMPool(names)
    pool.save_model(FUSE.run(pool), tmp_path / "online")
    use(closed_endpoint(), tmp_path, monkeypatch)
    pool = CausalLMPool(names)
    pool.save_model(FUSE.run(pool), tmp_path / "offline")
    online, offline = tensors(tmp_path / "online"), tensors(tmp_path / "offline")
    assert online.keys() == offline.keys()
    assert all(torch.equal(online[key], offline[key]) for key in online)
    assert (tmp_path / "offline" / "tokenizer.json").exists()


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(closed_endpoint(), tmp_path, monkeypatch)
    with pytest.raises(FusionBenchError, match=r"org/a.*cannot be reached"):
        CausalLMPool({"a": "org/a"}).weights("a")


def test_the_card_lists_the_bases_and_their_commits(hub: Hub, root: Path, tmp_path: Path) -> None:
    local = root / "models" / "org" / "b"
    pinned = f"org/a@{commit(root, 'org/a')}"
    pool = CausalLMPool({"_pretrained_": "org/base", "a": pinned, "b": str(local)})
    pool.save_model(FUSE.run(pool), tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == ["org/base", "org/a"]
    assert card.data.base_model_relation == "merge"
    assert card.data.library_name == "transformers" and "merge" in card.data.tags
    for name in ("org/base", "org/a"):
        assert commit(root, name) in card.text
    assert str(local) in card.text


def test_the_header_has_each_sources_commit_and_the_hashes_of_its_files(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    pool = CausalLMPool(NAMES)
    pool.save_model(FUSE.run(pool), tmp_path / "m")
    sources = json.loads(metadata(tmp_path / "m" / "model.safetensors")["fusion_bench"])["sources"]
    for key, name in NAMES.items():
        files = (root / "models" / name).glob("*.safetensors")
        assert sources[key] == {
            "source": name,
            "commit": commit(root, name),
            "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        }


def test_an_adapters_base_may_be_on_the_hub(hub: Hub, root: Path, tmp_path: Path) -> None:
    base = tensors(root / "models" / "org" / "base")
    module = "model.layers.0.self_attn.q_proj"
    added = write_lora(tmp_path / "x", base, [module], base_name="org/base")
    key = f"{module}.weight"
    got = CausalLMPool({"x": tmp_path / "x"}).weights("x")[key]
    assert torch.equal(got, (base[key].double() + added[key]).bfloat16())


def test_a_quantised_model_is_refused_before_it_is_downloaded(hub: Hub, root: Path) -> None:
    write_llama(root / "models" / "org" / "q")
    section = {"quant_method": "gptq"}
    rewrite(root / "models" / "org" / "q", lambda c: c.update(quantization_config=section))
    with pytest.raises(FusionBenchError, match=r"org/q' is quantised \(gptq\)"):
        CausalLMPool({"q": "org/q"}).weights("q")
    assert weights_files([path for _, path in hub.requests]) == []


def test_an_adapter_may_be_on_the_hub_itself(hub: Hub, root: Path, tmp_path: Path) -> None:
    base = tensors(root / "models" / "org" / "base")
    module = "model.layers.0.self_attn.q_proj"
    folder = root / "models" / "org" / "lora"
    added = write_lora(folder, base, [module], base_name="org/base")
    pool = CausalLMPool({"x": "org/lora"})
    pool.save_model(pool.weights("x"), tmp_path / "m")
    key = f"{module}.weight"
    got = tensors(tmp_path / "m")[key]
    assert torch.equal(got, (base[key].double() + added[key]).bfloat16())
    recipe = json.loads(metadata(tmp_path / "m" / "model.safetensors")["fusion_bench"])
    assert recipe["sources"]["x"]["commit"] == commit(root, "org/lora")
    files = {"adapter_model.safetensors", "model.safetensors"}
    assert set(recipe["sources"]["x"]["sha256"]) == files


def test_what_lies_in_folders_of_a_repository_comes_along(
    hub: Hub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = root / "models" / "org" / "sentence"
    write_llama(place, seed=4)
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (place / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling/config.json", "additional_chat_templates/rag.jinja", "onnx/model.onnx"):
        (place / name).parent.mkdir()
        (place / name).write_text("{}")
    for endpoint in (hub.endpoint, closed_endpoint()):  # and once more from the cache alone
        use(endpoint, tmp_path, monkeypatch)
        pool = CausalLMPool({"a": "org/sentence"})
        pool.save_model(pool.weights("a"), tmp_path / "m")
        folders = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").glob("*/*")}
        assert folders == {"1_Pooling/config.json", "additional_chat_templates/rag.jinja"}
    assert not [path for path in hub.downloads() if "onnx" in path]


@pytest.mark.parametrize("as_node", [False, True])
def test_a_kernel_that_a_repository_names_is_not_fetched(
    hub: Hub, root: Path, as_node: bool
) -> None:
    place = root / "models" / "org" / "kernel"
    write_llama(place, seed=5)
    rewrite(place, lambda c: c.update(attn_implementation="evil/kernel"))
    node = {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "org/kernel",
        "dtype": "float32",
    }
    with pytest.raises(FusionBenchError, match=r"names 'evil/kernel'.*This is refused"):
        CausalLMPool({"a": node if as_node else "org/kernel"}).load_model("a")
    chosen = CausalLMPool({"a": node | {"attn_implementation": "sdpa"}}).load_model("a")
    assert chosen.config._attn_implementation == "sdpa"
    assert not [path for _, path in hub.requests if "evil" in path]


def test_tokenizers_on_the_hub_are_compared_before_weights_are_downloaded(
    hub: Hub, root: Path
) -> None:
    other = root / "models" / "org" / "other"
    write_llama(other, seed=4)
    vocabulary = {"cat": 6, "dog": 5}
    rewrite(other, lambda content: content["model"]["vocab"].update(vocabulary), "tokenizer.json")
    pool = CausalLMPool({"a": "org/a", "other": "org/other"})
    plan = pool.plan(built=False)
    whole = sum(path.stat().st_size for path in other.glob("tokenizer*.json"))
    weights = (other / "model.safetensors").stat().st_size
    assert (plan.downloads()["org/other"] or 0) >= whole + weights
    with pytest.raises(FusionBenchError, match="other: 2 token ids mean other strings than in a"):
        pool.compare()
    asked = {path.rpartition("/")[2] for path in hub.downloads()}
    assert asked == {"config.json", "tokenizer.json", "tokenizer_config.json"}
