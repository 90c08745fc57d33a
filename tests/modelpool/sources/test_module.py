"""A module is a model, and is never changed."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from fixtures_llm import answers, average, by_hand, write_bert
from torch import nn

from fusion_bench.modelpool import HFModelPool


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a` and `b`."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    return root


def module(family: Path, name: str) -> nn.Module:
    return transformers.AutoModel.from_pretrained(family / name).train()


def test_a_module_is_a_model(family: Path, tmp_path: Path) -> None:
    models = HFModelPool({"a": module(family, "a"), "b": str(family / "b")})
    models.save_model(average(models), tmp_path / "m")
    back, info = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(answers(back), answers(by_hand(family, "a", "b")), atol=1e-6)


def test_the_modules_given_are_never_changed(family: Path, tmp_path: Path) -> None:
    a, b = module(family, "a"), module(family, "b")
    before = deepcopy(a.state_dict()), deepcopy(b.state_dict())
    config = a.config.to_dict()
    models = HFModelPool({"a": a, "b": b}, policy={"dtype": "bfloat16"})
    built = models.build_model(average(models))
    models.save_model(built, tmp_path / "m")
    for used in (built, models.load_model("a"), models.build_model(models.weights("b"))):
        for parameter in used.parameters():
            parameter.data.zero_()
        used.to(torch.bfloat16)
    for given, state in zip((a, b), before, strict=True):
        assert given.training
        assert all(torch.equal(v, state[k]) for k, v in given.state_dict().items())
    assert a.config.to_dict() == config
