"""Building the dense family from a small pretrained model: whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from fusion_bench.patch_head import PatchHead
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.sources import resolve, unbuilt
from fusion_bench.taskpool.datasets import describe
from fusion_bench.trust import find
from fusion_bench.zoo import Recipe, dense
from fusion_bench.zoo.dense import DenseRecipe, build

SMALL = DenseRecipe(counts=(2, 1, 1), probe_steps=2, finetune_steps=2, batch=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a whole CLIP, small and untrained."""
    directory = tmp_path_factory.mktemp("base")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text | heads, vision_config=vision | heads | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "model_path", lambda name, recipe: base)
    return tmp_path


def test_each_model_is_an_encoder_with_a_head_and_a_processor(cache: Path, base: Path) -> None:
    pretrained = CLIPVisionModel.from_pretrained(base).state_dict()
    for task, channels in {"segmentation": 9, "depth": 1, "normals": 3}.items():
        path = dense.model_path(f"clip-tiny-dense_{task}", SMALL)
        assert path.is_relative_to(cache)
        tuned, loading = CLIPVisionModel.from_pretrained(path, output_loading_info=True)
        assert not any(loading.values())
        state = tuned.state_dict()
        assert any(not torch.equal(own, pretrained[key]) for key, own in state.items())
        sizes = {"hidden_size": 16, "channels": channels, "scale": 8}
        assert PatchHead.read(path).config == sizes
        assert CLIPImageProcessorPil.from_pretrained(path).size["shortest_edge"] == 32


def test_the_dataset_is_what_was_drawn(cache: Path) -> None:
    found, made = dense.load_dataset("test", SMALL), build.make("test", 1)
    assert found.features == dense.columns()
    assert isinstance(found.features["segmentation"], Image)
    arrays = found.with_format("numpy")
    for name in ("image", "segmentation"):
        drawn = {"image": made.images, "segmentation": made.segmentation}[name]
        assert np.array_equal(np.stack([np.asarray(own) for own in found[name]]), drawn)
    assert np.array_equal(arrays["depth"][:], made.depth)
    assert np.array_equal(arrays["normals"][:], made.normals)


def test_two_builds_are_the_same(base: Path, tmp_path: Path) -> None:
    random = torch.get_rng_state()
    for name in ("one", "other"):
        build.build(tmp_path / name, base, SMALL)
    assert torch.equal(torch.get_rng_state(), random)
    files = sorted((tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        other = tmp_path / "other" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes()


def test_a_failed_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "train", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build.ensure(SMALL)
    assert [path for path in (cache / "zoo").iterdir() if path.is_dir()] == []
    assert dense.model_path("clip-tiny-dense_depth", SMALL).is_dir()


def test_the_place_depends_on_recipe_and_base() -> None:
    assert dense.place(SMALL) == dense.place(replace(SMALL))
    others = [dense.place(), dense.place(replace(SMALL, base=Recipe(seed=1)))]
    assert dense.place(SMALL) not in others
    assert dense.place().name.startswith("dense-")


def test_a_name_leads_to_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda root, *args: (root / "models").mkdir(parents=True))
    name = "zoo:clip-tiny-dense_depth"
    assert unbuilt(name) == dense.place()
    assert resolve(name) == str(dense.place() / "models" / "clip-tiny-dense_depth")
    assert unbuilt(name) is None


def test_unknown_names_are_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "ensure", lambda recipe: pytest.fail("built"))
    for find_model in (resolve, unbuilt):
        with pytest.raises(FusionBenchError, match="'clip-tiny-dense_depth'"):
            find_model("zoo:clip-tiny-dense_dept")
    node = {"_target_": "fusion_bench.zoo.dense.load_dataset", "split": "tset"}
    for call in (lambda: dense.load_dataset("tset"), lambda: describe(node)):
        with pytest.raises(FusionBenchError, match="no split 'tset'"):
            call()


def test_a_dry_run_knows_its_columns() -> None:
    found = describe({"_target_": "fusion_bench.zoo.dense.load_dataset"})
    assert found is not None and found.features == dense.columns()


def test_other_functions_of_the_zoo_are_not_called() -> None:
    with pytest.raises(ConfigError):
        find("fusion_bench.zoo.dense.model_path")
