import pytest
import torch
from fixtures_method import merged

from fusion_bench.method import PassthroughAlgorithm
from fusion_bench.method.checks import Pool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, Weights


def test_every_bit_stays() -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    pool = Pool({"a": TensorWeights({"w": finite, "n": torch.tensor([2**40 + 1])})})
    copied = PassthroughAlgorithm().fuse(pool)
    assert torch.equal(copied["w"].view(torch.int16), finite.view(torch.int16))
    assert copied["n"].item() == 2**40 + 1


def test_it_is_scaled_and_the_pretrained_model_does_not_matter() -> None:
    assert merged(PassthroughAlgorithm(-0.5), [[1, 2, 3]]).tolist() == [-0.5, -1, -1.5]
    assert merged(PassthroughAlgorithm(2), [[1, 2, 3]], base=[7, 7, 7]).tolist() == [2, 4, 6]


def test_rules_scale_some_entries() -> None:
    pool = Pool({"a": TensorWeights({"q": torch.ones(2), "o": torch.ones(2)})})
    scaled = PassthroughAlgorithm(where=[{"match": "q", "scale": 0.0}]).fuse(pool)
    assert isinstance(scaled, Weights)
    assert (scaled["q"].tolist(), scaled["o"].tolist()) == ([0, 0], [1, 1])


def test_it_converts() -> None:
    third = torch.tensor([1 / 3])
    pool = Pool({"a": TensorWeights({"w": third})}, MergePolicy(dtype="float16"))
    assert torch.equal(PassthroughAlgorithm().fuse(pool)["w"], third.half())


def test_several_models_are_refused() -> None:
    with pytest.raises(FusionBenchError, match=r"takes one model, and here are 2: a, b\. Name one"):
        merged(PassthroughAlgorithm(), [[1], [2]])
