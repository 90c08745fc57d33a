import numpy as np
import pytest
import torch
from fixtures_method import merged
from numpy.typing import NDArray

from fusion_bench.method import ArceeFusionAlgorithm, arcee_fusion
from fusion_bench.problems import FusionBenchError


def reference(other: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
        e = np.exp(x - x.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))

    p, q = softmax(other), softmax(base)
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    low, median, high = np.percentile(importance, [25, 50, 75])
    return np.where(importance >= median + 1.5 * (high - low), other, base)


@pytest.mark.parametrize("shape", [(6, 9), (40,), (3, 4, 5)])
def test_as_the_definition_says(shape: tuple[int, ...]) -> None:
    draws = np.random.default_rng(0)
    base = draws.normal(size=shape).astype(np.float32)
    other = (base + draws.standard_t(1.5, shape)).astype(np.float32)
    expected = reference(other.astype(np.float64), base.astype(np.float64))
    result = merged(ArceeFusionAlgorithm(), [other], base)
    assert result.numpy() == pytest.approx(expected, abs=1e-6)
    assert 0 < (expected != base).mean() < 1


def test_by_hand() -> None:
    # The importances are 0, 0 and some c: the quartiles are 0, 0 and c / 2, and the limit 0.75 c.
    result = merged(ArceeFusionAlgorithm(), [[0.0, 0.0, 3.0]], [0.0, 0.0, 0.0])
    assert result.tolist() == [0, 0, 3]


def test_the_limit_of_a_large_tensor_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(1)
    base, other = draws.normal(size=(2, 50, 50)).astype(np.float32)
    whole = merged(ArceeFusionAlgorithm(), [other], base)
    monkeypatch.setattr(arcee_fusion, "_SAMPLE", 1000)
    sampled = merged(ArceeFusionAlgorithm(), [other], base)
    assert 0 < torch.count_nonzero(whole != sampled) < 100


def test_a_third_model_is_refused() -> None:
    with pytest.raises(FusionBenchError, match="needs exactly two models"):
        merged(ArceeFusionAlgorithm(), [[1.0], [2.0]], [0.0])
