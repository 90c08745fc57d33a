"""What a config node makes is a model."""

from pathlib import Path

import pytest
import torch
from fixtures_llm import answers, average, by_hand, write_bert

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a` and `b`."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    return root


def test_a_node_is_a_model(family: Path) -> None:
    node = {
        "_target_": "transformers.AutoModel.from_pretrained",
        "pretrained_model_name_or_path": str(family / "a"),
        "attn_implementation": "eager",
    }
    models = HFModelPool({"a": node, "b": str(family / "b")})
    expected = answers(by_hand(family, "a", "b"))
    assert torch.allclose(answers(models.build_model(average(models))), expected, atol=1e-6)
    assert torch.allclose(answers(models.load_model("a")), answers(by_hand(family, "a")), atol=1e-6)


def test_a_node_that_says_no_more_than_a_name_is_that_name(family: Path) -> None:
    node = {
        "_target_": "transformers.AutoModel.from_pretrained",
        "pretrained_model_name_or_path": str(family / "a"),
    }
    assert HFModelPool({"a": node}).weights("a").files == (family / "a" / "model.safetensors",)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(FusionBenchError, match=r"^models\.x.*int"):
        HFModelPool({"x": 3}).load_model("x")
