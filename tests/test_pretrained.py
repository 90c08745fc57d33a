"""Nothing of a repository runs, and nobody is asked whether it may."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from fixtures_llm import rewrite, write_llama, write_tokenizer

from fusion_bench import trust
from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.pretrained import from_pretrained, quantisation
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.sources import load

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = "strange"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Answers:
    """A standard input that says yes to everything, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def readline(self, *_: int) -> str:
        self.asked += 1
        return "y\n"

    read = readline

    def fileno(self) -> int:
        raise OSError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama") / "model"
    write_llama(place)
    return place


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


@pytest.fixture
def strange(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the model code of its own, without which nobody can build it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    (model / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    rewrite(model, lambda c: c.update(model_type="strange", auto_map=names))
    return model


def node(place: Path, target: str, **more: Any) -> dict[str, Any]:
    return {
        "_target_": f"transformers.{target}.from_pretrained",
        "pretrained_model_name_or_path": str(place),
        **more,
    }


def test_code_of_a_repository_is_not_run_and_nobody_is_asked(
    strange: Path, yes: Answers, tmp_path: Path
) -> None:
    pool = CausalLMPool({"a": str(strange)})
    tries: list[Callable[[], Any]] = [
        lambda: pool.load_model("a"),
        lambda: pool.build_model(pool.weights("a")),
        lambda: load("model", node(strange, "AutoModelForCausalLM"), "key"),
        lambda: load("model", node(strange, "AutoConfig"), "key"),
    ]
    for attempt in tries:
        with pytest.raises(FusionBenchError, match=r"auto_map.*--trust-remote-code") as refused:
            attempt()
        assert refused.value.exit_code == 2
    assert not (tmp_path / "ran").exists() and yes.asked == 0


@pytest.mark.parametrize(
    ("file", "target", "names"),
    [
        ("tokenizer_config.json", "AutoTokenizer", {"AutoTokenizer": [None, "code.Tokenizer"]}),
        ("tokenizer_config.json", "AutoProcessor", {"AutoProcessor": "code.Tokenizer"}),
        (
            "preprocessor_config.json",
            "AutoImageProcessor",
            {"AutoImageProcessor": "code.Processor"},
        ),
        ("processor_config.json", "AutoProcessor", {"AutoProcessor": "code.Processor"}),
        ("config.json", "AutoTokenizer", {"AutoConfig": "code.Config"}),
    ],
)
def test_nor_is_that_of_tokenizers_and_processors(
    model: Path, tmp_path: Path, yes: Answers, file: str, target: str, names: dict[str, Any]
) -> None:
    (model / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    path = model / file
    content = json.loads(path.read_text()) if path.exists() else {}
    kinds = {"tokenizer_class": "Strange", "processor_class": "Strange", "model_type": "strange"}
    path.write_text(json.dumps(content | kinds | {"auto_map": names}))
    with suppress(FusionBenchError):  # or it does without
        load("processor", node(model, target, use_fast=True), "modelpool.processor")
    assert not (tmp_path / "ran").exists() and yes.asked == 0


def test_a_model_that_transformers_knows_needs_none_of_its_code(
    model: Path, tmp_path: Path, yes: Answers
) -> None:
    (model / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    rewrite(model, lambda c: c.update(auto_map=names))
    loaded = CausalLMPool({"a": str(model)}).load_model("a")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert not (tmp_path / "ran").exists() and yes.asked == 0


def test_code_is_run_where_the_user_says_so(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trust.TRUST_REMOTE_CODE, "1")
    pool = CausalLMPool({"a": str(strange)})
    for built in (pool.load_model("a"), pool.build_model(pool.weights("a"))):
        assert type(built).__name__ == "Model"
    assert (tmp_path / "ran").exists()


def test_a_config_cannot_say_so(strange: Path) -> None:
    said = node(strange, "AutoModelForCausalLM", trust_remote_code=True)
    with pytest.raises(ConfigError, match="would run code from the repository"):
        load("model", said, "key")
    for nothing in (None, False):
        with pytest.raises(ConfigError, match="auto_map"):
            load("model", {**said, "trust_remote_code": nothing}, "key")


KERNELS = [
    ("attn_implementation", "kernels-community/flash-attn2"),
    ("_attn_implementation", "evil/kernel"),
    ("attn_implementation", {"": "evil/kernel"}),
    ("attn_implementation", {"text_config": {"": "evil/kernel"}}),
    ("attn_implementation", "paged|evil/kernel"),
    ("_attn_implementation_internal", "evil/kernel"),
    ("experts_implementation", "evil/kernel:layer"),
    ("text_config", {"_attn_implementation": "evil/kernel@main"}),
]


@pytest.mark.parametrize(("key", "value"), KERNELS)
def test_no_kernel_is_fetched(model: Path, key: str, value: Any) -> None:
    rewrite(model, lambda c: c.update({key: value}))
    pool = CausalLMPool({"a": str(model)})
    tries: list[Callable[[], Any]] = [
        lambda: pool.load_model("a"),
        lambda: pool.build_model(pool.weights("a")),
        lambda: load("model", node(model, "AutoModelForCausalLM"), "key"),
    ]
    for attempt in tries:
        with pytest.raises(
            ConfigError, match=r"config\.json': .*implementation.* names .*downloaded"
        ):
            attempt()


@pytest.mark.parametrize("target", ["AutoConfig", "LlamaConfig"])
def test_nor_by_way_of_a_node_inside_of_another(
    model: Path, llama: Path, target: str, yes: Answers
) -> None:
    rewrite(model, lambda c: c.update(attn_implementation="evil/kernel"))
    inside = node(llama, "LlamaForCausalLM", config=node(model, target))
    with pytest.raises(ConfigError, match="names 'evil/kernel'"):
        load("model", inside, "key")


def test_nor_is_code_run_by_a_node_inside_of_another(
    strange: Path, llama: Path, tmp_path: Path, yes: Answers
) -> None:
    inside = node(llama, "LlamaForCausalLM", config=node(strange, "AutoConfig"))
    with pytest.raises(ConfigError, match="auto_map"):
        load("model", inside, "key")
    with pytest.raises(ValueError, match="custom code"):
        instantiate(inside, "key")
    assert not (tmp_path / "ran").exists() and yes.asked == 0


def test_a_config_of_another_folder_is_refused(model: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: .* is refused"):
        load("model", node(llama, "LlamaForCausalLM", config=str(model)), "key")


def test_another_kernel_may_be_chosen(model: Path) -> None:
    rewrite(model, lambda c: c.update(attn_implementation="evil/kernel"))
    chosen = node(model, "AutoModelForCausalLM", attn_implementation="sdpa")
    assert load("model", chosen, "key").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_what_is_built_in_may_be_named(model: Path, name: str) -> None:
    rewrite(model, lambda c: c.update(attn_implementation=name))
    assert CausalLMPool({"a": str(model)}).load_model("a").config._attn_implementation == name


def test_flash_attention_that_is_not_here_would_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trust.fetches_code("flash_attention_2")  # transformers says what is missing
    monkeypatch.setattr(trust, "find_spec", lambda name: name == "kernels" or None)
    assert trust.fetches_code("flash_attention_2")
    assert not trust.fetches_code("sdpa")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "configuration_files", ["config.4.0.0.json"]),
        ("config.json", "configuration_files", ["../config.4.0.0.json"]),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
    ],
)
def test_no_other_files_are_read_in_place_of_those_that_were_looked_at(
    model: Path, file: str, key: str, value: Any
) -> None:
    rewrite(model, lambda c: c.update({key: value}), file)
    with pytest.raises(ConfigError, match=f"{file}': {key} names other files"):
        from_pretrained(transformers.AutoTokenizer, model, model=False)


def test_weights_of_another_name_are_the_folders_own(model: Path) -> None:
    rewrite(model, lambda c: c.update(transformers_weights="../other.safetensors"))
    shutil.copyfile(model / "model.safetensors", model.parent / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors' is "):
        CausalLMPool({"a": str(model)}).load_model("a")


@pytest.mark.parametrize("target", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_a_quantised_model_is_refused_in_a_node_too(model: Path, target: str) -> None:
    rewrite(model, lambda c: c.update(quantization_config={"quant_method": "fbgemm_fp8"}))
    with pytest.raises(ConfigError, match=r"is quantised \(fbgemm_fp8\)"):
        load("model", node(model, target), "key")
    assert load("processor", node(model, "AutoTokenizer", use_fast=True), "key")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "x"}}}}, "x"),
        ({"quantization_config": "gptq"}, "with an unnamed method"),
        ({"compression_config": {"format": "pack"}}, "with an unnamed method"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "by MLX"),
        ({"quantization": "none"}, None),
    ],
)
def test_the_method_by_which_a_config_says_it_is_quantised(
    config: dict[str, Any], method: str | None
) -> None:
    assert quantisation(config) == method


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("name", ["os.system", "../code", "builtins.exec", "", 3])
def test_a_class_is_looked_for_in_transformers_alone(
    model: Path, file: str, name: Any, yes: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr("os.system", called.append)
    keys = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
    path = model / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | dict.fromkeys(keys, name)))
    for target in ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor"):
        try:
            made = load("processor", node(model, target, use_fast=True), "key")
        except FusionBenchError as error:
            assert error.exit_code == 2
        else:
            assert type(made).__module__.startswith("transformers.")
    assert yes.asked == 0 and not called


def test_a_folder_of_words_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words")
    assert load("processor", node(tmp_path / "words", "AutoTokenizer", use_fast=True), "key")


def test_a_module_needs_none_of_this(model: Path) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(model)
    pool = HFModelPool({"a": module}, "AutoModelForCausalLM")
    assert pool.build_model(pool.weights("a"))
