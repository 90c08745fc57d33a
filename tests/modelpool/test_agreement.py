"""Models that were trained to compute unlike are not merged under one config."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_clip import write_base, write_vision_encoder
from fixtures_llm import VOCABULARY, rewrite, write_bert, write_llama
from torch import Tensor

from fusion_bench.method import SimpleAverageAlgorithm, SimpleEnsembleAlgorithm
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool, HFModelPool
from fusion_bench.modelpool.agreement import (
    Difference,
    compare_configs,
    compare_pictures,
    differences,
)
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Weights, in_memory

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}


def found(
    own: dict[str, Any], reference: dict[str, Any], part: str | None = None
) -> dict[str, bool]:
    """Return the keys that differ, and whether they decide much."""
    return {each.key: each.much for each in differences(own, reference, part)}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": 500000.0}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"num_attention_heads": 8, "head_dim": 16}, "num_attention_heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 8}, "head_dim"),
        ({"model_type": "mistral"}, "model_type"),
    ],
)
def test_what_decides_the_computation_is_much(change: dict[str, Any], key: str) -> None:
    assert found({**LLAMA, **change}, LLAMA)[key]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("vit", {"image_size": 32}),
        ("vit", {"patch_size": 8}),
        ("vit", {"num_channels": 1}),
        ("bert", {"is_decoder": True}),
        ("mistral", {"sliding_window": None}),
        ("gpt2", {"n_head": 6}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("t5", {"feed_forward_proj": "gated-gelu"}),
        ("t5", {"relative_attention_num_buckets": 64}),
        ("opt", {"do_layer_norm_before": False}),
        ("falcon", {"alibi": True}),
        ("modernbert", {"local_attention": 64}),
        ("gemma2", {"attn_logit_softcapping": 30.0}),
        ("granite", {"attention_multiplier": 0.5}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("beit", {"use_mean_pooling": False}),
        ("phi", {"partial_rotary_factor": 0.25}),
    ],
)
def test_other_families_too(kind: str, change: dict[str, Any]) -> None:
    config = {"model_type": kind}
    assert any(found({**config, **change}, config).values()), change


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"attention_dropout": 0.1},
        {"initializer_range": 0.01},
        {"max_position_embeddings": 8192},
        {"eos_token_id": [2, 32007]},
        {"an_unknown_key": 3, "model_type": "unheard-of"},
    ],
)
def test_what_matters_little_is_a_note(change: dict[str, Any]) -> None:
    reference = {**LLAMA, "model_type": change.get("model_type", "llama")}
    assert list(found({**reference, **change}, reference).values()) == [False]


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "somewhere", "transformers_version": "4.20.0", "torch_dtype": "float16"},
        {"dtype": "bfloat16", "use_cache": False, "architectures": ["LlamaModel"]},
        {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0}, "problem_type": "x"},
        {"output_attentions": True, "return_dict": False, "finetuning_task": "mnli"},
        {"vocab_size": 32001, "num_hidden_layers": 2, "max_length": 40, "temperature": 0.6},
        {"unsloth_version": "2025.1", "quantization_config": None, "_attn_implementation": "sdpa"},
        {"pretraining_tp": 2, "gradient_checkpointing": True, "tie_word_embeddings": True},
    ],
)
def test_what_changes_nothing_is_left_out(change: dict[str, Any]) -> None:
    assert found({**LLAMA, **change}, LLAMA) == {}


def test_classes_in_another_order_are_not_merged_with_their_heads() -> None:
    reference = {**LLAMA, "id2label": {"0": "no", "1": "yes"}}
    other = {**reference, "id2label": {"0": "yes", "1": "no"}}
    configs = {"a": reference, "b": other}
    (refused,) = compare_configs(configs, heads=True).refused
    assert "b: 'id2label'" in str(refused)
    assert compare_configs(configs) == compare_configs({"a": reference, "b": reference}, heads=True)
    further = {**reference, "id2label": {"0": "cat", "1": "dog"}}  # of another task
    assert not compare_configs({"a": reference, "b": further}, heads=True).refused


def test_a_default_may_be_written_or_not() -> None:
    written = {
        **LLAMA,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    }
    of_5 = {**LLAMA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    for one in (written, of_5, LLAMA):
        for other in (written, of_5, LLAMA):
            assert found(one, other) == {}


def test_a_window_that_is_not_used_is_none() -> None:
    """The files of Qwen2.5-7B and of its instruction-tuned model differ in all of these."""
    base = {
        "model_type": "qwen2",
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_position_embeddings": 131072,
        "eos_token_id": 151643,
        "rope_theta": 1000000.0,
    }
    instruct = {**base, "sliding_window": 32768, "max_position_embeddings": 32768}
    instruct |= {"eos_token_id": 151645, "rope_theta": 1000000}
    assert found(instruct, base) == {"max_position_embeddings": False, "eos_token_id": False}


def test_positions_matter_where_rotary_embeddings_are_stretched_to_them() -> None:
    scaled = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert found({**scaled, "max_position_embeddings": 4096}, scaled)["max_position_embeddings"]


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaConfig", "Qwen2Config", "BertConfig", "ViTConfig", "CLIPConfig", "T5Config"),
        *("GPT2Config", "MistralConfig", "Gemma3Config", "RobertaConfig", "ModernBertConfig"),
    ],
)
def test_a_config_agrees_with_itself_however_it_was_saved(name: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, name)()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    whole = json.loads(config.to_json_string(use_diff=False))
    bare = {"model_type": saved["model_type"]}
    for other in (whole, bare):
        assert found(saved, other) == found(other, saved) == {}


def test_a_part_is_compared_and_the_rest_is_not() -> None:
    whole = {
        "model_type": "clip",
        "vision_config": {"model_type": "clip_vision_model", "hidden_act": "gelu"},
        "text_config": {"model_type": "clip_text_model", "hidden_act": "relu"},
    }
    vision = {"model_type": "clip_vision_model", "hidden_act": "gelu"}
    assert found(whole, vision) == found(vision, whole) == {}
    assert found(whole, {**vision, "hidden_act": "relu"}) == {"hidden_act": True}
    other = {**whole, "text_config": {"model_type": "clip_text_model"}}
    assert found(other, whole) == {"text_config.hidden_act": True}
    assert found(other, whole, part="vision_config") == {}


def test_an_architecture_that_nobody_knows_is_compared_as_it_stands() -> None:
    own = {"model_type": "unheard-of", "rope_theta": 1e4, "act_fn": "relu", "flag": False}
    assert found({**own, "act_fn": "gelu"}, own) == {"act_fn": True}
    # What is not given is the class's default, which is not known.
    assert found({"model_type": "unheard-of", "act_fn": "relu"}, own) == {"rope_theta": False}
    assert found({"hidden_act": "relu"}, {"hidden_act": "gelu"}) == {"hidden_act": True}


@pytest.mark.parametrize(
    "odd",
    [
        {"model_type": "llama", "hidden_size": "x"},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "clip", "vision_config": 4},
        {"model_type": ["llama"]},
        {"model_type": "qwen2", "num_hidden_layers": 10**12},
        {"model_type": "bert", "num_labels": 10**12},
        {"model_type": "llama", "rope_theta": float("nan")},
        {"model_type": {}, "vision_config": {"model_type": {}}},
    ],
)
def test_odd_configs_do_no_harm(odd: dict[str, Any]) -> None:
    assert differences(odd, dict(odd)) == []
    assert len(differences(odd, LLAMA)) >= 1


def test_lines_name_models_keys_and_values() -> None:
    configs = {"base": LLAMA} | {name: {**LLAMA, "hidden_act": "gelu"} for name in "ab"}
    refused = str(compare_configs(configs).refused[0])
    assert refused.endswith('\n  a, b: \'hidden_act\' is "gelu", in base "silu"')
    assert "policy.on_config=warn" in refused
    (note,) = compare_configs(configs, warn=True).notes
    assert note.startswith("a, b: 'hidden_act' is \"gelu\"") and "changes what it computes" in note


def test_a_strangers_text_is_shown_as_json() -> None:
    own = {"model_type": "x", "act\x1b[31m": "\x1b]0;" + "y" * 500}
    (each,) = differences(own, {"model_type": "x", "act\x1b[31m": "z"})
    assert isinstance(each, Difference)
    assert "\x1b" not in each.key + each.own and len(each.own) < 120


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(root / name, seed=seed, dtype=torch.float32)
    return root


@pytest.fixture
def own(family: Path, tmp_path: Path) -> Path:
    shutil.copytree(family, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pool(root: Path, *names: str, **policy: Any) -> CausalLMPool:
    return CausalLMPool({name: str(root / name) for name in names}, policy=policy)


def average(pool: HFModelPool) -> dict[str, Tensor]:
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert isinstance(merged, Weights)
    return in_memory(merged)


def test_a_merge_is_refused_unless_the_policy_says_otherwise(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(own / "b", lambda config: config.update(hidden_act="gelu", rms_norm_eps=1e-3))
    with pytest.raises(FusionBenchError) as error:
        average(pool(own, "a", "b"))
    assert 'b: \'hidden_act\' is "gelu", in a "silu"' in str(error.value)
    models = pool(own, "a", "b", on_config="warn")
    average(models)
    average(models)
    assert [note.partition(" is ")[0] for note in models.notes] == [
        "b: 'hidden_act'",
        "b: 'rms_norm_eps'",
    ]
    assert caplog.messages == models.notes  # once


@pytest.mark.cold
def test_models_that_agree_have_no_notes_and_import_nothing(own: Path) -> None:
    rewrite(own / "b", lambda config: config.update(transformers_version="4.1", use_cache=False))
    code = (
        "import sys; from fusion_bench.method import SimpleAverageAlgorithm as M; "
        "from fusion_bench.modelpool import CausalLMPool; "
        f"pool = CausalLMPool({{n: {str(own)!r} + '/' + n for n in ('base', 'a', 'b')}}); "
        "M().run(pool); print(pool.notes, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_modules_have_configs_too(tmp_path: Path) -> None:
    from transformers import AutoModel

    for name, act in (("a", "gelu"), ("b", "relu")):
        write_bert(tmp_path / name, hidden_act=act)
    modules = {name: AutoModel.from_pretrained(tmp_path / name) for name in "ab"}
    nodes = {
        name: {
            "_target_": "transformers.AutoModel.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / name),
            "attn_implementation": "eager",
        }
        for name in "ab"
    }
    for models in (modules, nodes, {"a": tmp_path / "a", "b": modules["b"]}):
        with pytest.raises(FusionBenchError, match='b: \'hidden_act\' is "relu", in a "gelu"'):
            average(HFModelPool(models))


def test_a_model_is_loaded_with_its_own_config(tmp_path: Path) -> None:
    write_bert(tmp_path / "a")
    write_bert(tmp_path / "b", hidden_act="relu")
    models = HFModelPool({"a": tmp_path / "a", "b": tmp_path / "b"}, policy={"on_config": "warn"})
    assert models.load_model("b").config.hidden_act == "relu"
    assert models.load_model("a").config.hidden_act == "gelu"
    assert models.build_model(average(models)).config.hidden_act == "gelu"


def test_an_encoder_inside_a_classifier_agrees(tmp_path: Path) -> None:
    write_bert(tmp_path / "a")
    write_bert(tmp_path / "b", model_class="BertForSequenceClassification", num_labels=5)
    models = HFModelPool({"a": tmp_path / "a", "b": tmp_path / "b"})
    average(models)
    assert models.notes == []


def test_pictures_that_are_prepared_otherwise_are_a_note(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"image_mean": [0, 0, 0], "size": 224})):
        write_bert(tmp_path / name)
        content = {"image_mean": [0.5, 0.5, 0.5], "size": {"height": 224, "width": 224}, **changes}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(content))
    models = HFModelPool({"a": tmp_path / "a", "b": tmp_path / "b"})
    average(models)
    (note,) = models.notes
    assert note.startswith("b: its pictures are prepared with 'image_mean' [0, 0, 0], those of a")


@pytest.mark.parametrize("odd", [{"height": {}, "width": {}}, [{}], None, {}])
def test_odd_pictures_do_no_harm(odd: Any) -> None:
    processors = {"a": {"size": {"height": 224, "width": 224}}, "b": {"size": odd}}
    assert len(compare_pictures(processors).notes) == 1


def test_encoders_beside_an_old_clip_agree(tmp_path: Path) -> None:
    """As the published ones: a whole CLIP of 2021, encoders of transformers 4, and one of 5."""
    base = write_base(tmp_path / "base")
    tower = {
        key.removeprefix("vision_model."): value
        for key, value in base.items()
        if key.startswith("vision_model.") and value.is_floating_point()
    }
    write_vision_encoder(tmp_path / "a", tower)
    CLIPVisionModelPool({"b": tmp_path / "a"}).load_model("b").save_pretrained(tmp_path / "b")
    models = CLIPVisionModelPool(
        {"_pretrained_": tmp_path / "base", "a": tmp_path / "a", "b": tmp_path / "b"}
    )
    average(models)
    assert models.notes == []


def test_an_ensemble_may_have_models_that_compute_unlike(own: Path) -> None:
    rewrite(own / "b", lambda config: config.update(hidden_act="gelu"))
    models = pool(own, "a", "b")
    SimpleEnsembleAlgorithm().run(models)
    assert models.load_model("b").config.hidden_act == "gelu"
    assert models.notes == []


def test_a_vision_encoder_of_two_whole_models(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    tower |= {"num_hidden_layers": 1, "projection_dim": 4}
    for name, heads, act in (("a", 2, "gelu"), ("b", 2, "relu"), ("c", 4, "gelu")):
        vision = {**tower, "image_size": 8, "patch_size": 4, "num_attention_heads": heads}
        text = {**tower, "vocab_size": VOCABULARY, "hidden_act": act}
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=4)
        CLIPModel(config).save_pretrained(tmp_path / name)
    average(CLIPVisionModelPool({"a": tmp_path / "a", "b": tmp_path / "b"}))
    with pytest.raises(FusionBenchError, match=r"c: 'num_attention_heads' is 4, in a 2"):
        average(CLIPVisionModelPool({"a": tmp_path / "a", "c": tmp_path / "c"}))
