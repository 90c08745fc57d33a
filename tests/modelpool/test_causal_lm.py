from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import VOCABULARY, write_llama, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Weights, in_memory

IDS = torch.arange(VOCABULARY)[None]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
LARGER = VOCABULARY + 3


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base`, `a`, `b`, and `wide` with a larger vocabulary, in float32."""
    root = tmp_path_factory.mktemp("llama")
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(root / name, seed=seed, dtype=torch.float32)
    write_llama(root / "wide", seed=3, dtype=torch.float32, vocabulary=LARGER)
    return root


def average(pool: CausalLMPool) -> dict[str, Tensor]:
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert isinstance(merged, Weights)
    return in_memory(merged)


def pool(family: Path, *names: str, **policy: Any) -> CausalLMPool:
    return CausalLMPool({name: str(family / name) for name in names}, policy=policy)


def test_the_pools_vocabulary_is_the_references(family: Path) -> None:
    assert pool(family, "a", "wide").vocabulary == VOCABULARY
    assert pool(family, "wide", "a").vocabulary == LARGER


def test_another_vocabulary_is_named_with_both_shapes_and_the_mend(family: Path) -> None:
    with pytest.raises(FusionBenchError) as error:
        average(pool(family, "a", "wide"))
    message = str(error.value)
    for table in TABLES:
        fact = f"wide: '{table}' is [{LARGER}, 12], in a [{VOCABULARY}, 12]: another vocabulary"
        assert fact in message
    assert "policy.on_vocabulary=common" in message
    assert "mlp" not in message


@pytest.mark.parametrize("names", [("a", "wide"), ("wide", "a"), ("wide", "a", "b")])
def test_the_common_rows_are_merged_and_the_rest_is_the_references(
    family: Path, names: tuple[str, ...]
) -> None:
    models = pool(family, *names, on_vocabulary="common")
    merged = average(models)
    stored = [models.weights(name) for name in names]
    for key in TABLES:
        rows = [weights[key][:VOCABULARY] for weights in stored]
        assert torch.allclose(merged[key][:VOCABULARY], sum(rows) / len(rows), atol=1e-6)
        assert torch.equal(merged[key][VOCABULARY:], stored[0][key][VOCABULARY:])
    assert models.build_model(merged)(IDS).logits.shape[-1] == models.vocabulary


def test_each_model_is_loaded_with_its_own_vocabulary(family: Path) -> None:
    models = pool(family, "a", "wide", on_vocabulary="common")
    assert models.load_model("wide").config.vocab_size == LARGER


@pytest.mark.parametrize("tied", [True, False])
def test_a_built_model_answers_as_one_merged_by_hand(tmp_path: Path, tied: bool) -> None:
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed, tied=tied, dtype=torch.float32)
    models = pool(tmp_path, "a", "b")
    built = models.build_model(average(models))
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    state = b.state_dict()
    a.load_state_dict({k: (v.double() + state[k].double()) / 2 for k, v in a.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(built(IDS).logits, a(IDS).logits, atol=1e-5)


def test_a_tied_head_that_is_stored_all_the_same_is_an_extra_entry(tmp_path: Path) -> None:
    write_llama(tmp_path / "tied", tied=True)
    write_llama(tmp_path / "untied")
    with pytest.raises(FusionBenchError, match=r"untied: has an extra 'lm_head\.weight'"):
        average(pool(tmp_path, "tied", "untied"))
    average(pool(tmp_path, "tied", "untied", on_extra="drop"))


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("with_pretrained", [True, False])
def test_two_adapters_are_averaged(family: Path, tmp_path: Path, with_pretrained: bool) -> None:
    base = CausalLMPool({"base": family / "base"}).weights("base")
    added = []
    for seed, name in enumerate("xy"):
        declared = "/gone" if with_pretrained else str(family / "base")
        folder = tmp_path / name
        added.append(write_lora(folder, dict(base), MODULES[seed:], base_name=declared, seed=seed))
    models: dict[str, Any] = {name: tmp_path / name for name in "xy"}
    if with_pretrained:  # the place of the training is gone, so that the config must confirm it
        models = {n: {"path": place, "base": "_pretrained_"} for n, place in models.items()}
        models["_pretrained_"] = family / "base"
    merged = average(CausalLMPool(models))
    assert set(merged) == set(base)
    for key in base:
        total = sum(part[key] for part in added if key in part)
        expected = base[key].double() + total / 2
        assert torch.allclose(merged[key].double(), expected, atol=1e-5)


def test_an_adapter_is_loaded_and_saved_as_a_whole_model(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES, base_name=str(family / "base"))
    models = CausalLMPool({"x": tmp_path / "x"})
    expected = AutoModelForCausalLM.from_pretrained(family / "base")
    with torch.no_grad():
        for key, value in added.items():
            expected.state_dict()[key] += value
        models.save_model(models.weights("x"), tmp_path / "m")
        for model in (
            models.load_model("x"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        ):
            assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-4)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not any(name.startswith("adapter") for name in names)


def test_an_adapter_is_merged_with_whole_models(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    a = pool(family, "a").weights("a")
    models = {"_pretrained_": family / "base", "a": family / "a", "x": tmp_path / "x"}
    merged = average(CausalLMPool(models))
    key = f"{MODULES[0]}.weight"
    expected = (a[key].double() + base[key].double() + added[key]) / 2
    assert torch.allclose(merged[key].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["module", "file"])
def test_an_adapters_base_may_be_a_module_or_a_file(
    family: Path, tmp_path: Path, kind: str
) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    source: Any = family / "base" / "model.safetensors"
    if kind == "module":
        source = AutoModelForCausalLM.from_pretrained(family / "base")
    models = CausalLMPool({"_pretrained_": source, "x": tmp_path / "x"})
    weights = in_memory(models.weights("x"))
    for key, value in added.items():
        assert torch.allclose(weights[key].double(), base[key].double() + value, atol=1e-5)
    models.save_model(models.weights("x"), tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_an_adapter_without_a_base_says_how_to_name_one(family: Path, tmp_path: Path) -> None:
    base = dict(pool(family, "base").weights("base"))
    write_lora(tmp_path / "x", base, MODULES, base_name=str(family / "bsae"))
    write_lora(tmp_path / "y", base, MODULES, base_name=None)
    with pytest.raises(FusionBenchError, match=r"models\.x.*bsae.*Did you mean.*'_pretrained_'"):
        CausalLMPool({"x": tmp_path / "x"}).weights("x")
    with pytest.raises(FusionBenchError, match=r"models\.y.*names no base.*'_pretrained_'"):
        CausalLMPool({"y": tmp_path / "y"}).weights("y")


def test_an_adapter_of_another_base_is_refused(family: Path, tmp_path: Path) -> None:
    other = {"model.layers.7.self_attn.q_proj.weight": torch.zeros(12, 12)}
    write_lora(tmp_path / "x", other, ["model.layers.7.self_attn.q_proj"])
    with pytest.raises(FusionBenchError, match=r"do not have under this name(.|\n)*layers\.7"):
        CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"}).weights("x")


def test_an_adapter_without_weights_is_refused(family: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "x", {}, [])
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    with pytest.raises(FusionBenchError, match=r"models\.x.*adapter_model\.safetensors"):
        CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"}).weights("x")


def test_an_adapters_own_copy_of_a_layer_is_what_it_changes(family: Path, tmp_path: Path) -> None:
    base = dict(pool(family, "base").weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    file = tmp_path / "x" / "adapter_model.safetensors"
    copy = torch.ones_like(base[f"{MODULES[0]}.weight"])
    name = f"base_model.model.{MODULES[0]}.base_layer.weight"
    save_file({**load_file(file), name: copy}, file)
    models = CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"})
    key = f"{MODULES[0]}.weight"
    assert torch.allclose(models.weights("x")[key].double(), copy.double() + added[key])


def test_the_tokenizer_may_be_another_models(family: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    models = CausalLMPool({"a": family / "a"}, tokenizer=str(tmp_path / "t"))
    models.save_model(models.weights("a"), tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "m" / "tokenizer_config.json").exists()


def test_a_tokenizer_source_without_one_is_refused(family: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    models = CausalLMPool({"a": str(family / "a")}, tokenizer=str(tmp_path / "bare"))
    with pytest.raises(FusionBenchError, match="neither a tokenizer nor a processor"):
        models.save_model(models.weights("a"), tmp_path / "m")
    assert not (tmp_path / "m").exists()
