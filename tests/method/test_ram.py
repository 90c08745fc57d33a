import pytest
from fixtures_method import merged

from fusion_bench.method import RAMAlgorithm, RAMPlusAlgorithm
from fusion_bench.problems import FusionBenchError

MODELS = [[1.0, 2.0, 0.0, 1e-6, 4.0], [0.0, 4.0, 0.0, 3.0, 0.0], [0.0, 6.0, 0.0, 0.0, 0.0]]
BASE = [0.0] * 5


def test_by_hand() -> None:
    result = merged(RAMAlgorithm(), MODELS, BASE)
    assert result.tolist() == pytest.approx([1, 4, 0, 3, 4])


def test_more_changes_are_none_with_a_larger_epsilon() -> None:
    result = merged(RAMAlgorithm(epsilon=2), MODELS, BASE)
    assert result.tolist() == pytest.approx([0, 5, 0, 3, 4])


def test_own_changes_grow_with_the_shared_part() -> None:
    # a: 1 shared, 2 of its own; b: 1 and 1; c: 1 and none.
    result = merged(RAMPlusAlgorithm(r=0.5, alpha=0.8), MODELS, BASE)
    a, b = 1 + 0.5 * 0.5, 1 + 0.5 * 0.8
    assert result.tolist() == pytest.approx([a, 4, 0, 3 * b, 4 * a])


@pytest.mark.parametrize("method", [RAMAlgorithm, RAMPlusAlgorithm])
def test_a_negative_epsilon_is_refused(method: type[RAMAlgorithm]) -> None:
    with pytest.raises(FusionBenchError, match="less than 0"):
        method(epsilon=-1)
