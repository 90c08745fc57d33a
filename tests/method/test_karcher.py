import math

import pytest
import torch
from fixtures_method import merged

from fusion_bench.method import KarcherMeanAlgorithm
from fusion_bench.problems import FusionBenchError


def test_by_hand() -> None:
    result = merged(KarcherMeanAlgorithm(), [[1.0, 0.0], [0.0, 3.0]])
    assert result.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])


def test_on_a_circle_it_is_the_mean_angle() -> None:
    models = [[math.cos(angle), math.sin(angle)] for angle in (0.1, 0.2, 0.9)]
    result = merged(KarcherMeanAlgorithm(), models)
    assert result.tolist() == pytest.approx([math.cos(0.4), math.sin(0.4)], abs=1e-5)


def test_the_order_of_the_models_is_of_no_account() -> None:
    models = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).tolist()
    one, other = (merged(KarcherMeanAlgorithm(), m) for m in (models, models[::-1]))
    torch.testing.assert_close(one, other)


def test_a_tensor_of_zeros_counts_in_the_length_alone() -> None:
    result = merged(KarcherMeanAlgorithm(), [[0.0, 0.0], [4.0, 0.0]])
    assert result.tolist() == pytest.approx([2, 0])
    assert merged(KarcherMeanAlgorithm(), [[0.0, 0.0]] * 2).tolist() == [0, 0]


def test_steps_may_go_on_to_the_end() -> None:
    exact = merged(KarcherMeanAlgorithm(max_iter=50, tol=0), [[1.0, 0.0], [0.0, 3.0]])
    assert exact.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])
    assert merged(KarcherMeanAlgorithm(tol=0), [[1.0, 2.0]] * 2).tolist() == pytest.approx([1, 2])
    with pytest.raises(FusionBenchError, match=r"tol"):
        KarcherMeanAlgorithm(tol=-1)
