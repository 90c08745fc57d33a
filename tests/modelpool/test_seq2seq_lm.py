"""Encoder-decoders and their adapters, merged and saved."""

import json
from pathlib import Path

import pytest
import torch
from fixtures_llm import average, mean, tensors, write_lora
from fixtures_texts import WORDS, write_t5
from transformers import AutoTokenizer, T5ForConditionalGeneration

from fusion_bench.modelpool import Seq2SeqLMPool

IDS = torch.arange(len(WORDS))[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base`, `a` and `b`, and `lora`, an adapter of `base`."""
    root = tmp_path_factory.mktemp("t5")
    for seed, name in enumerate(("base", "a", "b")):
        write_t5(root / name, seed)
    modules = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.v",
    ]
    write_lora(root / "lora", tensors(root / "base"), modules)
    file = root / "lora" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"task_type": "SEQ_2_SEQ_LM"}
    file.write_text(json.dumps(config))
    return root


def answers(model: T5ForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits


def test_the_average_is_saved_whole(family: Path, tmp_path: Path) -> None:
    pool = Seq2SeqLMPool({name: str(family / name) for name in ("a", "b")})
    pool.save_model(average(pool), tmp_path / "merged")
    both = [T5ForConditionalGeneration.from_pretrained(family / name) for name in ("a", "b")]
    both[0].load_state_dict(mean(*(own.state_dict() for own in both)))
    saved = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(saved), answers(both[0]))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("cat")["input_ids"][-1] == 2
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]
    torch.testing.assert_close(answers(pool.load_model("a")), answers(_plain(family / "a")))


def test_an_adapter_is_an_expert(family: Path) -> None:
    names = {"_pretrained_": "base", "glue-cola": "lora", "b": "b"}
    pool = Seq2SeqLMPool({name: str(family / own) for name, own in names.items()})
    model = pool.load_model("glue-cola")
    base = _plain(family / "base")
    adapter = tensors(family / "lora")
    expected = base.state_dict()
    for key in {name.split(".lora_")[0] for name in adapter}:
        added = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        expected[f"{key.removeprefix('base_model.model.')}.weight"] += 3 * added
    base.load_state_dict(expected)
    torch.testing.assert_close(answers(model), answers(base))
    merged = pool.build_model(average(pool))
    base.load_state_dict(mean(expected, _plain(family / "b").state_dict()))
    torch.testing.assert_close(answers(merged), answers(base))


def _plain(folder: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(folder)
