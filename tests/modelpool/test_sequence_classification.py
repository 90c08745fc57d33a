"""Classifiers are merged without their heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import average, seeded, tensors
from fixtures_texts import WORDS, write_classifier, write_tokenizer

from fusion_bench.modelpool import SequenceClassificationModelPool


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `a` and `b`, and `lm`, the same model with the head of a language model."""
    root = tmp_path_factory.mktemp("classifiers")
    for kind in ("bert", "roberta", "gpt2"):
        for seed, name in enumerate(("a", "b")):
            write_classifier(root / kind / name, kind, seed)
        config: Any = transformers.AutoConfig.from_pretrained(root / kind / "a")
        config.architectures = None
        name = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}.get(kind)
        made = getattr(transformers, name or "GPT2LMHeadModel")
        seeded(lambda made=made, config=config: made(config), 7).save_pretrained(root / kind / "lm")
        write_tokenizer(root / kind / "lm", kind)
    return root


def pool(family: Path, kind: str, *names: str, **policy: Any) -> SequenceClassificationModelPool:
    folders = {name.replace("lm", "_pretrained_"): str(family / kind / name) for name in names}
    return SequenceClassificationModelPool(folders, policy=policy)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_heads_are_left_out(family: Path, kind: str, tmp_path: Path) -> None:
    own = pool(family, kind, "a", "b")
    merged = average(own)
    own.save_model(merged, tmp_path / "merged")
    both = [transformers.AutoModel.from_pretrained(family / kind / name) for name in ("a", "b")]
    states = [model.state_dict() for model in both]
    saved = tensors(tmp_path / "merged")
    assert not [key for key in saved if "classifier" in key or "score" in key]
    built = own.build_model(merged).state_dict()
    for key, value in built.items():
        torch.testing.assert_close(value, (states[0][key] + states[1][key]) / 2)
    again = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    ids = torch.arange(4, len(WORDS))[None]
    with torch.no_grad():
        found = own.build_model(merged)(input_ids=ids).last_hidden_state
        torch.testing.assert_close(again(input_ids=ids).last_hidden_state, found)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_pretrained_model_may_be_a_language_model(family: Path, kind: str) -> None:
    """Where it has no pooler and the experts have one, the policy says what becomes of that."""
    own = pool(family, kind, "lm", "a", "b", on_extra="drop")
    model = own.build_model(average(own))
    assert type(model) is type(transformers.AutoModel.from_pretrained(family / kind / "a"))


def test_nodes_of_base_models_are_taken(family: Path) -> None:
    target = "transformers.GPT2Model.from_pretrained"
    nodes = {
        name: {"_target_": target, "pretrained_model_name_or_path": str(family / "gpt2" / name)}
        for name in ("a", "b")
    }
    named = average(pool(family, "gpt2", "a", "b"))
    made = average(SequenceClassificationModelPool(nodes))
    assert {key: made[key].tolist() for key in made} == {k: named[k].tolist() for k in named}
