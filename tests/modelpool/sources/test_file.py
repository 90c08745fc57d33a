"""A file of weights is a model, with what lies beside it."""

import json
from pathlib import Path

import pytest
import torch
from fixtures_llm import (
    VOCABULARY,
    answers,
    average,
    by_hand,
    metadata,
    tensors,
    write_bert,
)
from safetensors.torch import save_file

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a` and `b`."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    return root


@pytest.mark.parametrize("name", ["other.safetensors", "step100.bin", "step100.pt"])
def test_a_file_is_a_model(family: Path, tmp_path: Path, name: str) -> None:
    state = tensors(family / "b")
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    models = HFModelPool({"a": str(family / "a"), "b": str(tmp_path / name)})
    built = models.build_model(average(models))
    assert torch.allclose(answers(built), answers(by_hand(family, "a", "b")), atol=1e-6)
    assert torch.equal(answers(models.load_model("b")), answers(by_hand(family, "b")))
    models.save_model(average(models), tmp_path / "m")
    source = json.loads(metadata(tmp_path / "m/model.safetensors")["fusion_bench"])["sources"]["b"]
    assert source["source"] == str(tmp_path / name) and list(source["sha256"]) == [name]


def test_the_config_of_a_file_is_beside_it(family: Path, tmp_path: Path) -> None:
    models = HFModelPool({n: str(family / n / "model.safetensors") for n in "ab"})
    assert models.vocabulary == VOCABULARY
    models.save_model(average(models), tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").exists()
    built = models.build_model(average(models))
    assert torch.allclose(answers(built), answers(by_hand(family, "a", "b")), atol=1e-6)


def test_a_file_alone_is_merged_without_a_config(family: Path, tmp_path: Path) -> None:
    for name in "ab":
        save_file(tensors(family / name), tmp_path / f"{name}.safetensors")
    models = HFModelPool({n: str(tmp_path / f"{n}.safetensors") for n in "ab"})
    models.save_model(average(models), tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"README.md", "model.safetensors"}
    with pytest.raises(FusionBenchError, match=r"no 'config\.json'"):
        models.load_model("a")
