import pytest
from fixtures_method import merged

from fusion_bench.method import SCEAlgorithm
from fusion_bench.problems import FusionBenchError

ZERO = [0.0, 0.0, 0.0]


def test_by_hand() -> None:
    # The weights are 5/18 and 13/18, the energies' shares.
    result = merged(SCEAlgorithm(), [[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]], ZERO)
    assert result.tolist() == pytest.approx([44 / 18, 2, 0])


def test_only_what_varies_most_is_kept() -> None:
    # The variances are 1, 4 and 0: half of the two that vary is one.
    result = merged(SCEAlgorithm(0.5), [[1.0, -2.0, 5.0], [3.0, 2.0, 5.0]], ZERO)
    assert result.tolist() == [0, 2, 0]


def test_tiny_changes_are_weighed_as_large_ones() -> None:
    models = [[1e-6, -2e-6, 0.0], [3e-6, 2e-6, 0.0]]
    result = merged(SCEAlgorithm(), models, ZERO)
    assert result.tolist() == pytest.approx([44e-6 / 18, 2e-6, 0])


def test_no_change_at_all_is_no_nan() -> None:
    assert merged(SCEAlgorithm(), [[1.0, 2.0]] * 2, [1.0, 2.0]).tolist() == [1, 2]


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(FusionBenchError, match="not a number from 0 to 1"):
        SCEAlgorithm(2)
