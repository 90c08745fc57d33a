"""A folder is a model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_llm import answers, rewrite, tensors, write_bert
from torch import nn

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a` and `b`."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    return root


def test_weights_are_the_files_and_no_module_is_built(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(nn.Module, "__init__")
    weights = HFModelPool({name: family / name for name in "ab"}).weights("b")
    written = tensors(family / "b")
    assert set(weights) == set(written)
    assert all(torch.equal(weights[key], written[key]) for key in written)
    assert weights.files == (family / "b" / "model.safetensors",)


def test_a_checkpoint_is_loaded_in_eval_mode(family: Path) -> None:
    model = HFModelPool({name: family / name for name in "ab"}).load_model("b")
    expected = transformers.AutoModel.from_pretrained(family / "b").eval()
    assert not model.training and torch.equal(answers(model), answers(expected))


@pytest.mark.parametrize("section", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}])
def test_quantised_checkpoints_are_refused(
    family: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    shutil.copytree(family / "a", tmp_path / "q")
    rewrite(tmp_path / "q", lambda config: config.update(quantization_config=section))
    with pytest.raises(FusionBenchError, match=r"^models\.q.*quantised"):
        HFModelPool({"q": tmp_path / "q"}).weights("q")


def test_an_empty_quantisation_is_none(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    rewrite(tmp_path / "a", lambda config: config.update(quantization_config=None))
    assert HFModelPool({"a": tmp_path / "a"}).weights("a")
