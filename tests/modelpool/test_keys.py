"""Checkpoints of other times: old names, and tables that models compute themselves."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import seeded, tensors, write_bert, write_llama, write_lora
from safetensors.torch import save_file
from torch import Tensor

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.method.base import aligned
from fusion_bench.modelpool import HFModelPool
from fusion_bench.modelpool.keys import under_keys_of
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import TensorWeights, Weights, align, in_memory

IDS = torch.arange(12)[None]
MASK = torch.ones(1, 1, 32, 32).tril()
FREQUENCIES = 10_000 ** -(torch.arange(3) / 3)


def llama(folder: Path, seed: int) -> None:
    write_llama(folder, seed=seed, dtype=torch.float32)


def bert(folder: Path, seed: int) -> None:
    write_bert(folder, seed=seed)


def gpt2(folder: Path, seed: int) -> None:
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=12, n_layer=1, n_head=2, n_positions=32, bos_token_id=1
    )
    seeded(lambda: transformers.GPT2LMHeadModel(config), seed).save_pretrained(folder)


def neox(folder: Path, seed: int) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=16,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    seeded(lambda: transformers.GPTNeoXForCausalLM(config), seed).save_pretrained(folder)


def old_norms(held: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        held = {key.replace(new, old): tensor for key, tensor in held.items()}
    return held


def with_extra(**extra: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: held | {key.replace("__", "."): tensor for key, tensor in extra.items()}


#: A family, its class, and what a file of another time holds in place of the usual.
OTHER_TIMES: dict[str, tuple[Any, str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "inv_freq": (
        llama,
        "AutoModelForCausalLM",
        with_extra(
            model__layers__0__self_attn__rotary_emb__inv_freq=FREQUENCIES,
            model__layers__1__self_attn__rotary_emb__inv_freq=FREQUENCIES.clone(),
        ),
    ),
    "gamma": (bert, "AutoModel", old_norms),
    "gamma and position_ids": (
        bert,
        "AutoModel",
        lambda held: old_norms(held) | {"embeddings.position_ids": torch.arange(32)[None]},
    ),
    "masks of gpt2": (
        gpt2,
        "AutoModelForCausalLM",
        with_extra(
            transformer__h__0__attn__bias=MASK.bool(),
            transformer__h__0__attn__masked_bias=torch.tensor(-1e4),
        ),
    ),
    "masks of neox": (
        neox,
        "AutoModelForCausalLM",
        with_extra(
            gpt_neox__layers__0__attention__bias=MASK,
            gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9),
            gpt_neox__layers__0__attention__rotary_emb__inv_freq=FREQUENCIES,
        ),
    ),
}


def family(root: Path, write: Any, model_class: str, other: Any, which: str) -> HFModelPool:
    """Return a pool of ``_pretrained_``, a and b, one of which is of another time."""
    names = {"_pretrained_": "base", "a": "a", "b": "b"}
    for seed, name in enumerate(names.values()):
        write(root / name, seed)
    old = tensors(root / which)
    save_file(other(old), root / which / "model.safetensors", {"format": "pt"})
    return HFModelPool({name: str(root / own) for name, own in names.items()}, model_class)


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("which", ["base", "a"])
@pytest.mark.parametrize("case", OTHER_TIMES)
def test_what_every_loader_accepts_is_merged(case: str, which: str, tmp_path: Path) -> None:
    write, model_class, other = OTHER_TIMES[case]
    pool = family(tmp_path, write, model_class, other, which)
    load = getattr(transformers, model_class).from_pretrained
    a, b = (load(tmp_path / name) for name in "ab")
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert isinstance(merged, Weights)
    pool.save_model(merged, tmp_path / "m")
    back, info = load(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not any("gamma" in key or "beta" in key for key in tensors(tmp_path / "m"))
    expected = b.state_dict()
    a.load_state_dict({k: (v + expected[k]) / 2 for k, v in a.state_dict().items()})
    assert torch.allclose(answers(back), answers(a.eval()), atol=1e-5)
    assert torch.allclose(answers(pool.build_model(merged)), answers(a), atol=1e-5)
    single = pool.load_model("_pretrained_" if which == "base" else which)
    assert torch.allclose(answers(single), answers(load(tmp_path / which).eval()))
    notes = aligned(pool).notes
    assert (notes == ()) == (case == "gamma")
    assert all("compute them when they are loaded" in note for note in notes)


def test_a_classifier_of_old_names_around_an_encoder_with_a_table(tmp_path: Path) -> None:
    write_bert(tmp_path / "c", seed=1, model_class="BertForSequenceClassification")
    bert(tmp_path / "base", 0)
    held = {**tensors(tmp_path / "base"), "embeddings.position_ids": torch.arange(32)[None]}
    save_file(held, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    own = tensors(tmp_path / "c")
    save_file(old_norms(own), tmp_path / "c" / "model.safetensors", {"format": "pt"})
    pool = HFModelPool({"base": tmp_path / "base", "c": tmp_path / "c"})
    merged = in_memory(SimpleAverageAlgorithm(show_pbar=False).run(pool))  # type: ignore[arg-type]
    assert set(merged) == set(held)
    for key in held:
        mean = held[key] if "position_ids" in key else (held[key] + own[f"bert.{key}"]) / 2
        assert torch.allclose(merged[key], mean)


def test_tables_that_all_models_hold_stay_as_they_were(tmp_path: Path) -> None:
    table = torch.arange(32)[None]
    for seed, name in enumerate(("a", "b")):
        bert(tmp_path / name, seed)
        held = {**tensors(tmp_path / name), "embeddings.position_ids": table}
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})
    pool = HFModelPool({name: tmp_path / name for name in "ab"})
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert torch.equal(merged["embeddings.position_ids"], table)  # type: ignore[arg-type]
    assert aligned(pool).notes == ()


def test_tables_of_another_length_or_type_are_the_references() -> None:
    mask = MASK.bool()
    base = TensorWeights({"attn.bias": mask, "masked_bias": torch.tensor(-1e4), "w": torch.ones(2)})
    other = TensorWeights(
        {"attn.bias": mask.byte()[..., :8, :8], "masked_bias": torch.tensor(-1e9).half()}
        | {"w": torch.zeros(2)}
    )
    found = align({"a": other, "b": base}, base)
    assert found.copied == {"attn.bias", "masked_bias"}
    (note,) = found.notes
    assert note.startswith("a: 'attn.bias'")


@pytest.mark.parametrize(
    "key", ["attn.bias", "x.inv_freq.weight", "position_ids_embedding", "conv.gamma", "w"]
)
def test_what_may_be_learnt_is_never_left_out(key: str) -> None:
    base = TensorWeights({"w.x": torch.ones(2)})
    more = TensorWeights({"w.x": torch.ones(2), key: torch.ones(2)})
    with pytest.raises(FusionBenchError, match=f"a: has an extra '{key}'"):
        align({"a": more}, base)
    with pytest.raises(FusionBenchError, match=f"a: lacks '{key}'"):
        align({"a": base}, more)


@pytest.mark.parametrize("reference", ["old", "new"])
def test_two_names_of_normalised_weights_are_one(reference: str) -> None:
    old = {"conv.weight_g": torch.ones(1), "conv.weight_v": torch.ones(2), "w": torch.ones(3)}
    place = "conv.parametrizations.weight.original"
    new = {f"{place}0": torch.zeros(1), f"{place}1": torch.zeros(2), "w": torch.zeros(3)}
    first, second = (old, new) if reference == "old" else (new, old)
    found = under_keys_of(TensorWeights(first), TensorWeights(second))
    assert list(found) == list(first)
    assert all(torch.equal(found[k], t) for k, t in zip(first, second.values(), strict=True))


def test_a_norm_under_both_names_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        bert(tmp_path / name, seed)
    held = tensors(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file({**held, **{k: t + 1 for k, t in old_norms(held).items() if k not in held}}, file)
    pool = HFModelPool({"b": tmp_path / "b", "a": tmp_path / "a"})
    both = r"models\.a: '(\S+)\.LayerNorm\.beta' and '\1\.LayerNorm\.bias' are the same tensor"
    with pytest.raises(FusionBenchError, match=both):
        aligned(pool)


def test_an_adapter_fits_a_base_of_old_names(tmp_path: Path) -> None:
    bert(tmp_path / "base", 0)
    held = tensors(tmp_path / "base")
    save_file(old_norms(held), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    added = write_lora(tmp_path / "x", held, ["encoder.layer.0.attention.self.query"])
    norm = "embeddings.LayerNorm.weight"
    file = tmp_path / "x" / "adapter_model.safetensors"
    own = {f"base_model.model.{norm}": torch.zeros(12)}
    save_file({**tensors(tmp_path / "x"), **own}, file)
    pool = HFModelPool({"_pretrained_": tmp_path / "base", "x": tmp_path / "x"})
    weights = pool.weights("x")
    assert not weights[norm].any()
    for key, value in added.items():
        assert torch.allclose(weights[key].double(), held[key].double() + value, atol=1e-5)


@pytest.mark.cold
def test_usual_names_need_no_transformers(tmp_path: Path) -> None:
    llama(tmp_path / "a", 0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    program = (
        "import sys\n"
        "from fusion_bench.modelpool import CausalLMPool\n"
        "from fusion_bench.method.base import aligned\n"
        "aligned(CausalLMPool({name: sys.argv[1] + '/' + name for name in 'ab'}))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
