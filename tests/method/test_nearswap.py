import pytest
from fixtures_method import merged

from fusion_bench.method import NearSwapAlgorithm
from fusion_bench.problems import FusionBenchError


def test_by_hand() -> None:
    # Changes of at most 0.5 are taken whole, and 0.5 of larger ones.
    result = merged(NearSwapAlgorithm(0.5), [[1.25, 3.0, -1.0, 1.0]], [1.0, 1.0, 1.0, 1.0])
    assert result.tolist() == pytest.approx([1.25, 1.5, 0.5, 1.0])


def test_nothing_of_the_change_is_taken() -> None:
    assert merged(NearSwapAlgorithm(0), [[2.0, 3.0]], [1.0, 1.0]).tolist() == [1, 1]


def test_changes_below_the_least_one_are_shares_of_it() -> None:
    # With t = 5e-7 a change of 1e-7 counts as one of 1e-6: half of it is taken.
    result = merged(NearSwapAlgorithm(5e-7), [[1e-7]], [0.0])
    assert result.tolist() == pytest.approx([5e-8])


def test_a_third_model_is_refused() -> None:
    with pytest.raises(FusionBenchError, match="needs exactly two models"):
        merged(NearSwapAlgorithm(1), [[1.0], [2.0]], [0.0])


def test_a_negative_t_is_refused() -> None:
    with pytest.raises(FusionBenchError, match="less than 0"):
        NearSwapAlgorithm(-1)
