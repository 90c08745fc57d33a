"""A model's identity is what decides what it computes."""

import shutil
from pathlib import Path
from typing import Any

import torch
from fixtures_llm import rewrite, tensors, write_bert
from safetensors.torch import save_file

from fusion_bench.modelpool import HFModelPool
from fusion_bench.weights import Model, TensorWeights


def identity(folder: Path, **options: Any) -> str:
    return HFModelPool({"a": folder}, **options).model("a").identity


def test_it_changes_with_a_weight_and_a_config_value_and_not_with_a_path(tmp_path: Path) -> None:
    write_bert(tmp_path / "a")
    before = identity(tmp_path / "a")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert identity(copy) == before == identity(copy / "model.safetensors")
    rewrite(copy, lambda config: config.update(_name_or_path="elsewhere", transformers_version="1"))
    assert identity(copy) == before
    rewrite(copy, lambda config: config.update(hidden_act="relu"))
    changed = identity(copy)
    held = tensors(copy)
    held["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(held, copy / "model.safetensors", {"format": "pt"})
    assert len({before, changed, identity(copy), identity(copy, model_class="BertModel")}) == 4


def test_weights_without_a_config_have_one_too() -> None:
    def model(value: float, kind: str = "Linear") -> Model:
        return Model(TensorWeights({"a": torch.tensor([value])}), None, kind)

    assert model(1.0).identity == model(1.0).identity
    assert len({model(1.0).identity, model(2.0).identity, model(1.0, "Other").identity}) == 3
