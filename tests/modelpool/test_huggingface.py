import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import (
    TEXT,
    VOCABULARY,
    answers,
    average,
    by_hand,
    rewrite,
    tensors,
    write_bert,
    write_llama,
)
from torch import nn

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError

CLASSIFIER = "BertForSequenceClassification"
AUTO_CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a`, `b`, the classifiers `c`, `d` and `masked`, with a tied head."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    for seed, name in enumerate("cd", start=2):
        write_bert(root / name, seed=seed, model_class=CLASSIFIER)
    for seed, name in enumerate(("masked", "masked2"), start=4):
        write_bert(root / name, seed=seed, model_class="BertForMaskedLM")
    return root


def pool(family: Path, *names: str, **more: Any) -> HFModelPool:
    return HFModelPool({name: str(family / name) for name in names}, **more)


@pytest.mark.parametrize(
    ("names", "model_class"),
    [(("a", "b"), "AutoModel"), (("c", "d"), f"Auto{CLASSIFIER[4:]}".replace("For", "ModelFor"))],
)
def test_a_built_model_answers_as_one_merged_by_hand(
    family: Path, names: tuple[str, ...], model_class: str
) -> None:
    models = pool(family, *names, model_class=model_class)
    built = models.build_model(average(models))
    assert not built.training
    expected = by_hand(family, *names, model_class=model_class)
    assert torch.allclose(answers(built), answers(expected), atol=1e-6)
    assert type(built) is type(expected)


def test_a_class_by_its_own_name_serves_too(family: Path) -> None:
    models = pool(family, "c", "d", model_class=CLASSIFIER)
    assert type(models.build_model(average(models))).__name__ == CLASSIFIER


def test_nothing_of_a_built_model_is_left_on_the_meta_device(family: Path) -> None:
    built = pool(family, "a").build_model(pool(family, "a").weights("a"))
    buffers = dict(built.named_buffers())
    assert not any(t.is_meta for t in (*built.parameters(), *buffers.values()))
    assert torch.equal(buffers["embeddings.position_ids"], torch.arange(32)[None])


def test_the_rotary_frequencies_of_a_built_model_are_right(tmp_path: Path) -> None:
    write_llama(tmp_path / "a")
    models = HFModelPool({"a": tmp_path / "a"}, "AutoModelForCausalLM")
    built = dict(models.build_model(models.weights("a")).named_buffers())
    expected = dict(models.load_model("a").named_buffers())
    assert built and built.keys() == expected.keys()
    assert all(torch.equal(built[key], expected[key]) for key in built)


def test_tied_weights_stay_tied(family: Path, tmp_path: Path) -> None:
    models = pool(family, "masked", "masked2", model_class="AutoModelForMaskedLM")
    built = models.build_model(average(models))
    words = built.get_input_embeddings().weight
    assert built.get_output_embeddings().weight is words
    expected = by_hand(family, "masked", "masked2", model_class="AutoModelForMaskedLM")
    assert torch.allclose(answers(built), answers(expected), atol=1e-6)
    models.save_model(built, tmp_path / "m")
    assert set(tensors(tmp_path / "m")) == set(tensors(family / "masked"))


def test_an_encoder_inside_a_classifier_is_merged_into_the_encoder(family: Path) -> None:
    models = pool(family, "a", "c")
    a, c = tensors(family / "a"), tensors(family / "c")
    merged = average(models)
    assert set(merged) == set(a)
    for key in a:
        assert torch.allclose(merged[key], (a[key] + c[f"bert.{key}"]) / 2)


def test_an_encoder_is_merged_into_the_classifier_around_it(family: Path) -> None:
    models = pool(family, "c", "a", model_class=AUTO_CLASSIFIER, policy={"on_missing": "skip"})
    a, c = tensors(family / "a"), tensors(family / "c")
    merged = average(models)
    assert set(merged) == set(c)
    for key in a:
        assert torch.allclose(merged[f"bert.{key}"], (a[key] + c[f"bert.{key}"]) / 2)
    assert torch.equal(merged["classifier.weight"], c["classifier.weight"])


def test_the_head_that_an_encoder_lacks_is_named(family: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"on_missing=base(.|\n)*a: lacks 'classifier\."):
        average(pool(family, "c", "a", model_class=AUTO_CLASSIFIER))


def test_a_pool_of_bare_models_sees_classifiers_without_their_heads(
    family: Path, tmp_path: Path
) -> None:
    models = pool(family, "c", "d")
    merged = average(models)
    c, d = tensors(family / "c"), tensors(family / "d")
    assert set(merged) == {k.removeprefix("bert.") for k in c if k.startswith("bert.")}
    assert all(torch.allclose(merged[k], (c[f"bert.{k}"] + d[f"bert.{k}"]) / 2) for k in merged)
    models.save_model(merged, tmp_path / "m")
    back, info = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert "architectures" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert torch.equal(answers(back), answers(models.build_model(merged)))


def test_a_saved_model_is_read_back_by_transformers(family: Path, tmp_path: Path) -> None:
    models = pool(family, "a", "b")
    models.save_model(average(models), tmp_path / "m")
    back, info = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(answers(back), answers(by_hand(family, "a", "b")), atol=1e-6)
    tokenizers = [
        transformers.AutoTokenizer.from_pretrained(p) for p in (family / "a", tmp_path / "m")
    ]
    assert tokenizers[0](TEXT).input_ids == tokenizers[1](TEXT).input_ids


def test_beside_the_weights_are_the_references_files_and_a_card(
    family: Path, tmp_path: Path
) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    for name in ("generation_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / "a" / name).write_text("{}")
    for name in ("sentencepiece.bpe.model", "merges.txt", "vocab.txt"):
        (tmp_path / "a" / name).write_text("words")
    for name in ("modeling.py", "optimizer.pt", "training_args.bin", "pytorch_model.bin"):
        (tmp_path / "a" / name).write_text("")
    models = HFModelPool({"a": tmp_path / "a"})
    models.save_model(models.weights("a"), tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("preprocessor_config.json", "sentencepiece.bpe.model", "merges.txt", "vocab.txt"),
    }
    assert (tmp_path / "m/config.json").read_text() == (family / "a/config.json").read_text()


def test_shards(family: Path, tmp_path: Path) -> None:
    models = pool(family, "a", "b", max_shard_size=4000)
    models.save_model(average(models), tmp_path / "m")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    back, info = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(answers(back), answers(by_hand(family, "a", "b")), atol=1e-6)
    assert set(models.open_saved(tmp_path / "m")) == set(models.weights("a"))


def test_a_dtype_is_in_the_weights_and_in_the_config(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    rewrite(tmp_path / "a", lambda c: c.update(torch_dtype=c.pop("dtype")))
    models = HFModelPool({"a": tmp_path / "a"}, policy={"dtype": "bfloat16"})
    models.save_model(average(models), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert {t.dtype for t in tensors(tmp_path / "m").values()} == {torch.bfloat16}
    assert transformers.AutoModel.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert models.build_model(average(models)).dtype == torch.bfloat16


def test_an_unknown_policy_names_the_nearest(family: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"policy\.on_extr: .*Did you mean 'on_extra'"):
        pool(family, "a", policy={"on_extr": "drop"})
    with pytest.raises(FusionBenchError, match=r"policy\.on_extra.*'dorp'.*Did you mean 'drop'"):
        pool(family, "a", policy={"on_extra": "dorp"})


def test_an_unknown_model_class_names_the_nearest(family: Path) -> None:
    models = pool(family, "a", model_class="AutoModelForCausalML")
    with pytest.raises(FusionBenchError, match="Did you mean 'AutoModelForCausalLM'"):
        models.load_model("a")


def test_a_model_class_that_the_architecture_does_not_have_is_named(family: Path) -> None:
    models = pool(family, "a", model_class="AutoModelForImageClassification")
    for use in (lambda: models.load_model("a"), lambda: models.build_model(models.weights("a"))):
        with pytest.raises(FusionBenchError, match=r"BertConfig.*AutoModelForImageClassification"):
            use()


@pytest.mark.parametrize(
    ("model_type", "fact"), [("brt", "model type 'brt' is unknown"), (None, "no 'model_type'")]
)
def test_an_architecture_that_transformers_does_not_know_is_merged_but_not_built(
    family: Path, tmp_path: Path, model_type: str | None, fact: str
) -> None:
    for name in "ab":
        shutil.copytree(family / name, tmp_path / name)
        rewrite(tmp_path / name, lambda config: config.pop("model_type"))
        if model_type is not None:
            rewrite(tmp_path / name, lambda config: config.update(model_type=model_type))
    models = HFModelPool({name: tmp_path / name for name in "ab"})
    models.save_model(average(models), tmp_path / "m")
    with pytest.raises(FusionBenchError, match=fact):
        models.build_model(average(models))


def test_a_vocabulary_is_that_of_the_reference(family: Path, tmp_path: Path) -> None:
    assert pool(family, "a").vocabulary == VOCABULARY
    assert (
        HFModelPool({"a": transformers.AutoModel.from_pretrained(family / "a")}).vocabulary
        == VOCABULARY
    )
    assert HFModelPool({"a": nn.Linear(2, 2)}).vocabulary is None
    rewrite(
        shutil.copytree(family / "a", tmp_path / "a"),
        lambda c: c.update(text_config={"vocab_size": c.pop("vocab_size")}),
    )
    assert HFModelPool({"a": tmp_path / "a"}).vocabulary == VOCABULARY


def test_a_whole_vision_model_is_saved_with_its_image_processor(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    for name in "ab":
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name)
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path / "a")
    models = pool(tmp_path, "a", "b", model_class="AutoModelForImageClassification")
    models.save_model(average(models), tmp_path / "m")
    back = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    expected = by_hand(tmp_path, "a", "b", model_class="AutoModelForImageClassification")
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(back.eval()(pixels).logits, expected(pixels).logits, atol=1e-6)
    assert (tmp_path / "m" / "preprocessor_config.json").exists()


def test_what_lacks_weights_is_no_whole_model(family: Path) -> None:
    models = pool(family, "a", model_class=f"AutoModel{CLASSIFIER[4:]}")
    with pytest.raises(FusionBenchError, match=r"^models\.a.*not a whole(.|\n)*classif"):
        models.load_model("a")
    with pytest.raises(FusionBenchError, match=r"The merged model is not a whole"):
        models.build_model(models.weights("a"))
