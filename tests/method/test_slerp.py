import math

import pytest
import torch
from fixtures_method import merged

from fusion_bench.method import SlerpMergeAlgorithm
from fusion_bench.problems import FusionBenchError

A, B = [1.0, 0.0], [0.0, 2.0]


def test_by_hand() -> None:
    quarter = merged(SlerpMergeAlgorithm(0.25), [A, B])
    assert quarter.tolist() == pytest.approx([0.923880, 0.765367], abs=1e-6)
    assert merged(SlerpMergeAlgorithm(), [A, B]).tolist() == pytest.approx([0.707107, 1.414214])


def test_equal_norms_are_kept() -> None:
    for t in (0.1, 0.5, 0.8):
        assert float(merged(SlerpMergeAlgorithm(t), [[3.0, 0, 4], [0, 5.0, 0]]).norm()) == (
            pytest.approx(5)
        )


def test_nearly_parallel_tensors_are_interpolated_linearly() -> None:
    assert merged(SlerpMergeAlgorithm(), [[1.0, 2.0], [3.0, 6.0]]).tolist() == [2, 4]
    assert merged(SlerpMergeAlgorithm(), [[1.0, 2.0], [-1.0, -2.0]]).tolist() == [0, 0]


def test_a_tensor_of_zeros_has_no_direction() -> None:
    result = merged(SlerpMergeAlgorithm(0.25), [[0.0, 0.0], [1.0, 0.0]])
    assert result.tolist() == pytest.approx([math.sin(math.pi / 8), 0])


def test_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator, dtype=torch.float64).float().double()
    angle = torch.arccos(a @ b / a.norm() / b.norm())
    expected = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    result = merged(SlerpMergeAlgorithm(0.3), [a.tolist(), b.tolist()])
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("t", "angle"), [(-0.5, -math.pi / 4), (1.5, 3 * math.pi / 4)])
def test_the_arc_goes_on_beyond_its_ends(t: float, angle: float) -> None:
    found = merged(SlerpMergeAlgorithm(t), [[1.0, 0.0], [0.0, 1.0]])
    assert found.tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    assert merged(SlerpMergeAlgorithm(3), [[1.0, 2.0], [3.0, 6.0]]).tolist() == [7, 14]


@pytest.mark.parametrize("t", [math.nan, math.inf, True, "0.5"])
def test_t_is_a_number(t: float) -> None:
    with pytest.raises(FusionBenchError, match="is not a number"):
        SlerpMergeAlgorithm(t)


def test_only_two_models() -> None:
    with pytest.raises(FusionBenchError, match="there are 1: a"):
        merged(SlerpMergeAlgorithm(), [A])
