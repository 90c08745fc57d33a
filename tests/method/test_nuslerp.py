import math
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion_bench.method import NuSlerpAlgorithm, SlerpMergeAlgorithm
from fusion_bench.problems import FusionBenchError

A, B = [1.0, 0.0], [0.0, 2.0]
Array = np.ndarray[Any, Any]


def test_by_hand() -> None:
    quarter = merged(NuSlerpAlgorithm([3, 1]), [A, B])
    assert quarter.tolist() == pytest.approx([0.923880, 0.765367], abs=1e-6)
    assert merged(NuSlerpAlgorithm(), [A, B]).tolist() == pytest.approx([0.707107, 1.414214])


@pytest.mark.parametrize("t", [0, 0.1, 0.5, 0.9, 1])
def test_it_is_slerp_where_the_directions_differ(t: float) -> None:
    models = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).tolist()
    ours, slerp = (
        merged(m, models) for m in (NuSlerpAlgorithm([1 - t, t]), SlerpMergeAlgorithm(t))
    )
    torch.testing.assert_close(ours, slerp, rtol=1e-6, atol=1e-6)


def test_with_a_base_the_changes_go_along_the_arc() -> None:
    models = [[11.0, 20.0], [10.0, 22.0]]
    result = merged(NuSlerpAlgorithm([3, 1]), models, [10.0, 20.0])
    assert result.tolist() == pytest.approx([10.923880, 20.765367])


def test_equal_weights_take_every_model_alike() -> None:
    third = merged(NuSlerpAlgorithm(), [[1.0, 0], [0.0, 1], [math.sqrt(0.5)] * 2], [0.0, 0])
    assert third.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    # Half of the way to the second, then a third of the way to the last.
    result = merged(NuSlerpAlgorithm(), [[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]])
    sines = math.sin(math.pi / 3), math.sin(math.pi / 6)
    assert result.tolist() == pytest.approx([sines[0] * math.sqrt(0.5)] * 2 + [sines[1]])


def reference(a: Array, b: Array, t: float) -> Array:
    """Return the point on the arc between two vectors."""
    norms = np.linalg.norm(a), np.linalg.norm(b)
    cos = 0.0 if min(norms) == 0 else float(a / norms[0] @ (b / norms[1]))
    angle = math.acos(max(-1.0, min(1.0, cos)))
    if math.sin(angle) < 1e-8:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@settings(deadline=None, max_examples=examples(60))
@given(
    # None are opposite: the plane of their arc would be left to rounding.
    models=arrays(np.float32, (2, 3, 4), elements=st.integers(0, 8).map(float)),
    t=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_against_the_formula(models: Array, t: float) -> None:
    a, b = models.astype(np.float64)
    expected = {
        None: reference(a.ravel(), b.ravel(), t).reshape(3, 4),
        -1: np.stack([reference(x, y, t) for x, y in zip(a, b, strict=True)]),
        0: np.stack([reference(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T,
    }
    for axis, want in expected.items():
        found = merged(NuSlerpAlgorithm([1 - t, t], axis), [a.tolist(), b.tolist()])
        np.testing.assert_allclose(found.double().numpy(), want, rtol=1e-5, atol=1e-5)


def test_parallel_opposite_and_zero_tensors() -> None:
    assert merged(NuSlerpAlgorithm(), [[1.0, 2.0], [3.0, 6.0]]).tolist() == pytest.approx([2, 4])
    assert merged(NuSlerpAlgorithm(), [A, [-1.0, 0.0]]).tolist() == [0, 0]
    half = merged(NuSlerpAlgorithm(), [A, [0.0, 0.0]])
    assert half.tolist() == pytest.approx([math.sin(math.pi / 4), 0])
    for axis in (None, 0, -1):
        same = merged(NuSlerpAlgorithm(axis=axis), [[0.1, 0.7]] * 3, [0.1, 0.7])
        assert torch.equal(same, torch.tensor([0.1, 0.7]))


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_a_number_alone_is_a_vector(axis: int | None) -> None:
    assert merged(NuSlerpAlgorithm([1, 3], axis), [2.0, 4.0]).item() == pytest.approx(3.5)
    assert merged(NuSlerpAlgorithm([1, 3], axis), [2.0, 4.0], 1.0).item() == pytest.approx(3.5)


def test_weights_that_cancel_out_go_half_of_the_way() -> None:
    assert merged(NuSlerpAlgorithm([1, -1]), [[2.0], [4.0]]).tolist() == pytest.approx([3])


def test_a_single_model_stays() -> None:
    assert merged(NuSlerpAlgorithm(), [[2.0, 5]], [1.0, 1]).tolist() == [2, 5]


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"axis: 1 is not null"):
        NuSlerpAlgorithm(axis=1)
    with pytest.raises(FusionBenchError, match=r"weights: 3 values for 2 models \(a, b\)"):
        merged(NuSlerpAlgorithm([1, 2, 3]), [A, B])
