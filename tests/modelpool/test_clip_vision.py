import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.problems import FusionBenchError


@pytest.fixture
def pool(family: Path) -> CLIPVisionModelPool:
    models = family / "models"
    return CLIPVisionModelPool(
        {"_pretrained_": str(models / "base"), "a": str(models / "a"), "b": str(models / "b")}
    )


def altered(family: Path, place: Path, change) -> str:
    """Copy model `a` to ``place`` with its tensors changed in place by ``change``."""
    shutil.copytree(family / "models" / "a", place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return str(place)


def test_special_names_are_not_fused(pool: CLIPVisionModelPool) -> None:
    assert pool.model_names == ["a", "b"]
    assert pool.has_pretrained


def test_prefixed_files_and_full_clip_models_have_the_same_keys(pool: CLIPVisionModelPool) -> None:
    keys = list(pool.weights("_pretrained_"))
    assert keys == list(pool.weights("a"))
    assert "embeddings.class_embedding" in keys
    assert not any("position_ids" in key or "text_model" in key for key in keys)


def test_the_files_values_are_read(pool: CLIPVisionModelPool, family: Path) -> None:
    written = load_file(family / "models" / "a" / "model.safetensors")
    weights = pool.weights("a")
    assert {f"vision_model.{key}" for key in weights} == set(written)
    assert all(torch.equal(weights[key], written[f"vision_model.{key}"]) for key in weights)


def test_nodes_and_modules_are_models_too(family: Path) -> None:
    node = {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": str(family / "models" / "a"),
    }
    module = CLIPVisionModel.from_pretrained(family / "models" / "b")
    pool = CLIPVisionModelPool({"a": node, "b": module})
    assert isinstance(pool.load_model("a"), CLIPVisionModel)
    assert pool.load_model("b") is not module
    assert not pool.has_pretrained


def test_a_saved_model_reads_back_the_same(pool: CLIPVisionModelPool, tmp_path: Path) -> None:
    model = pool.build_model({k: v * 2 for k, v in pool.weights("a").items()})
    pool.save_model(model, tmp_path / "merged")
    back, info = CLIPVisionModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())
    # transformers 4 reads only files with the prefix
    assert all(
        k.startswith("vision_model.") for k in load_file(tmp_path / "merged/model.safetensors")
    )
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModel"]
    assert CLIPImageProcessorPil.from_pretrained(tmp_path / "merged").crop_size["height"] == 32


def test_building_does_not_change_the_checkpoint(pool: CLIPVisionModelPool, family: Path) -> None:
    before = (family / "models" / "base" / "model.safetensors").read_bytes()
    model = pool.build_model(dict(pool.weights("a")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (family / "models" / "base" / "model.safetensors").read_bytes() == before


def test_an_empty_pool_is_refused() -> None:
    for models in ({}, {"_pretrained_": "somewhere"}):
        with pytest.raises(FusionBenchError, match="the pool is empty"):
            CLIPVisionModelPool(models)


def test_an_unknown_name_names_the_nearest(pool: CLIPVisionModelPool) -> None:
    with pytest.raises(FusionBenchError, match="Did you mean '_pretrained_'"):
        pool.load_model("_pretrained")


def test_a_directory_that_does_not_exist_names_the_nearest(family: Path) -> None:
    pool = CLIPVisionModelPool({"a": str(family / "models" / "bse")})
    with pytest.raises(FusionBenchError, match=r"bse.*Did you mean.*base"):
        pool.load_model("a")


def test_missing_weights_are_named(family: Path, tmp_path: Path) -> None:
    path = altered(family, tmp_path / "x", lambda t: t.pop("vision_model.post_layernorm.weight"))
    with pytest.raises(FusionBenchError, match=r"^models\.x.*\n.*post_layernorm\.weight"):
        CLIPVisionModelPool({"x": path}).load_model("x")


def test_other_shapes_are_named(family: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_model.post_layernorm.weight"] = torch.zeros(3)

    path = altered(family, tmp_path / "x", shrink)
    with pytest.raises(FusionBenchError, match=r"post_layernorm\.weight' is \[3\]"):
        CLIPVisionModelPool({"x": path}).load_model("x")


def test_a_module_is_saved_without_changing_it(family: Path, tmp_path: Path) -> None:
    module = CLIPVisionModel.from_pretrained(family / "models" / "a")
    before = module.config.to_dict()
    pool = CLIPVisionModelPool({"a": module}, policy={"dtype": "bfloat16"})
    pool.save_model(pool.weights("a"), tmp_path / "m")
    assert module.config.to_dict() == before
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_files_are_models_too(family: Path, tmp_path: Path) -> None:
    places = {name: str(family / "models" / name / "model.safetensors") for name in ("base", "a")}
    pool = CLIPVisionModelPool({"_pretrained_": places["base"], "a": places["a"]})
    pool.save_model(pool.weights("a"), tmp_path / "m")
    expected = CLIPVisionModel.from_pretrained(family / "models" / "a").state_dict()
    for model in (pool.load_model("a"), CLIPVisionModel.from_pretrained(tmp_path / "m")):
        state = model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert (tmp_path / "m" / "preprocessor_config.json").exists()
