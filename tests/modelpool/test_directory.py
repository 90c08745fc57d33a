"""What goes beside merged weights, and what stays behind."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_clip import write_base
from fixtures_llm import rewrite, tensors, write_bert, write_lora, write_tokenizer
from safetensors.torch import load_file, save_file

from fusion_bench.companions import KNOWN
from fusion_bench.modelpool import CLIPVisionModelPool, HFModelPool
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.programs.output_paths import OutputPaths

OURS = "sentence_transformers.models"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert") / "model"
    write_bert(place)
    return place


@pytest.fixture
def model(bert: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text('{"auths": "SECRET"}')
    return Path(shutil.copytree(bert, tmp_path / "model"))


def save(model: Path, **more: Any) -> set[str]:
    """Save the model by a pool; return the names of what is there, with their folders."""
    pool = HFModelPool({"a": str(model)}, **more)
    target = model.parent / "merged"
    pool.save_model(pool.weights("a"), target)
    return {f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file()}


def write(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("{}")


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "generation_config.json", "vocab.txt", "config.json"),
        *("tokenizer.json", "processor_config.json", "additional_chat_templates/a.jinja"),
        *("modules.json", "config_sentence_transformers.json", "model.safetensors"),
    ],
)
def test_nothing_of_the_users_own_is_copied(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(model.parent / "secret")
    with pytest.raises(FusionBenchError, match="is a link to"):
        save(model)
    assert {path.name for path in model.parent.iterdir()} == {"model", "secret"}


def test_weights_that_are_elsewhere_are_named_themselves(model: Path) -> None:
    place = (model / "model.safetensors").rename(model.parent / "large.safetensors")
    (model / "model.safetensors").symlink_to(place)
    with pytest.raises(FusionBenchError, match=f"or name '{place}' itself"):
        save(model)
    assert HFModelPool({"a": str(place)}).weights("a").files == (place,)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").hardlink_to(place)
    assert "model.safetensors" in save(model)


def test_nor_by_a_processor(model: Path) -> None:
    (model.parent / "words").mkdir()
    (model.parent / "words" / "vocab.txt").symlink_to(model.parent / "secret")
    node = {
        "_target_": "transformers.AutoTokenizer.from_pretrained",
        "pretrained_model_name_or_path": str(model),
        "use_fast": True,
    }
    with pytest.raises(FusionBenchError, match="is a link to"):
        save(model, processor=str(model.parent / "words"))
    (model / "chat_template.jinja").symlink_to(model.parent / "secret")
    other = shutil.copytree(model, model.parent / "other", symlinks=True)
    (other / "chat_template.jinja").unlink()
    with pytest.raises(FusionBenchError, match="is a link to"):
        save(other, processor=node)


def test_nor_by_a_processor_that_is_made_and_saved(tmp_path: Path) -> None:
    """An image processor keeps, and writes, whatever keys its config has."""
    write_base(tmp_path / "clip", weights="safetensors")
    (tmp_path / "secret").write_text('{"auths": "SECRET"}')
    for name in ("preprocessor_config.json", "processor_config.json"):
        place = shutil.copytree(tmp_path / "clip", tmp_path / name[:5])
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(tmp_path / "secret")
        pool = CLIPVisionModelPool({"_pretrained_": str(place), "a": str(tmp_path / "clip")})
        with pytest.raises(FusionBenchError, match="is a link to"):
            pool.save_model(pool.weights("a"), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("target", "more", "fact"),
    [
        ("BertConfig", {}, "a config is not a processor"),
        ("AutoTokenizer", {"tokenizer_file": "{there}/secret"}, "tokenizer_file: .* is refused"),
        ("AutoTokenizer", {"vocab_file": "../secret"}, "vocab_file: .* is refused"),
        ("AutoImageProcessor", {"image_processor_filename": "../secret"}, "filename: .* refused"),
        ("AutoTokenizer", {"pretrained_model_name_or_path": "{there}/secret"}, "is a file"),
    ],
)
def test_nor_by_a_config_that_names_it(
    model: Path, target: str, more: dict[str, str], fact: str
) -> None:
    node = {
        "_target_": f"transformers.{target}.from_pretrained",
        "pretrained_model_name_or_path": str(model),
        "use_fast": True,
        **{key: value.format(there=model.parent) for key, value in more.items()},
    }
    with pytest.raises(FusionBenchError, match=fact):
        save(model, processor=node)


def test_code_and_what_is_not_known_stays_behind_and_is_named(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = save(model)
    write(model, "modeling.py", "vocab.py", "tokenizer.py", "my_tokens.json", "vocab.secret")
    write(model, "optimizer.pt", "README.md", ".gitattributes", "onnx/model.onnx", "vocab.pkl")
    with caplog.at_level(logging.INFO):
        assert save(model) == before
    told = next(text for text in caplog.messages if text.startswith("Not copied from"))
    assert told.endswith(
        "/model': modeling.py, my_tokens.json, onnx/, optimizer.pt, tokenizer.py, vocab.pkl, "
        "vocab.py, vocab.secret."
    )


def test_all_that_is_known_is_kept(model: Path) -> None:
    known = set(KNOWN) - {"adapter_config.json", "modules.json"}
    write(model, *(known - {"config.json"}))
    write(model, "additional_chat_templates/rag.jinja", "additional_chat_templates/run.py")
    (model / "modules.json").write_text("[]")
    copied = {*known, "modules.json", "additional_chat_templates/rag.jinja"}
    assert save(model) == {*copied, "model.safetensors", "README.md"}


def sentence(model: Path, *modules: tuple[str, str]) -> None:
    listed = [("", f"{OURS}.Transformer"), *modules]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(listed)
    ]
    (model / "modules.json").write_text(json.dumps(entries))
    write(model, "sentence_bert_config.json", "config_sentence_transformers.json")


def test_a_sentence_transformer_stays_one(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    sentence(
        model,
        ("1_Pooling", f"{OURS}.Pooling"),
        ("2_Dense", f"{OURS}.Dense"),
        ("3_Normalize", f"{OURS}.Normalize"),
    )
    write(model, "1_Pooling/config.json", "1_Pooling/run.py", "2_Dense/config.json")
    save_file({"linear.weight": torch.ones(2, 2)}, model / "2_Dense" / "model.safetensors")
    saved = save(model)
    assert {name for name in saved if "/" in name or "sentence" in name or "modules" in name} == {
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    }
    assert any("copied, not merged: 2_Dense/model.safetensors" in text for text in caplog.messages)
    places = OutputPaths({}, None, overwrite=True)
    places.put_model(str(model.parent / "merged"))
    places.check_model()  # such a folder may be replaced by the next


def test_pickled_weights_of_a_module_become_safetensors(model: Path) -> None:
    sentence(model, ("2_Dense", f"{OURS}.Dense"))
    write(model, "2_Dense/config.json")
    torch.save({"linear.weight": torch.ones(2, 2)}, model / "2_Dense" / "pytorch_model.bin")
    assert "2_Dense/pytorch_model.bin" not in save(model)
    kept = load_file(model.parent / "merged" / "2_Dense" / "model.safetensors")
    assert torch.equal(kept["linear.weight"], torch.ones(2, 2))


def test_a_module_of_its_own_code_is_not_kept(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence(model, ("1_Pooling", "custom_st.Pooling"))
    write(model, "1_Pooling/config.json", "custom_st.py")
    assert not {name for name in save(model) if "sentence" in name or "modules" in name}
    assert any("custom_st.Pooling" in text for text in caplog.messages)


def test_a_module_elsewhere_is_refused(model: Path) -> None:
    write(model.parent, "secrets/config.json")
    sentence(model, ("../secrets", f"{OURS}.Pooling"))
    with pytest.raises(ConfigError, match=r"'\.\./secrets', which is not a folder next to it"):
        save(model)
    sentence(model, ("1_Pooling", f"{OURS}.Pooling"))
    (model / "1_Pooling").symlink_to("../secrets")
    with pytest.raises(ConfigError, match="is a link to"):
        save(model)


def test_the_tokenizer_beside_an_adapter_is_the_adapters(model: Path) -> None:
    adapter = model.parent / "adapter"
    module = "encoder.layer.0.attention.self.query"
    write_lora(adapter, tensors(model), [module], base_name=str(model))
    write(model, "vocab.txt")
    assert "vocab.txt" in save(adapter)
    write_tokenizer(adapter)
    rewrite(adapter, lambda c: c.update(model_max_length=7), "tokenizer_config.json")
    assert "vocab.txt" not in save(adapter)
    back = transformers.AutoTokenizer.from_pretrained(model.parent / "merged")
    assert back.model_max_length == 7
