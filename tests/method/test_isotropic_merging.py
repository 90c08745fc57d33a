from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.problems import FusionBenchError

Array = np.ndarray[Any, Any]
SHAPES = st.tuples(st.integers(3, 12), st.integers(3, 12))
BOTH = [ISO_C_Merge, ISO_CTS_Merge]


def random(models: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Any, Any]:
    values = np.random.default_rng(seed).standard_normal((models + 1, *shape)).astype(np.float32)
    return values[1:].tolist(), values[0].tolist()


def change(method: Any, models: Any, base: Any) -> Array:
    return np.asarray(merged(method, models, base).double().numpy() - np.array(base, np.float64))


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    return np.linalg.svd(matrix, full_matrices=False)


@settings(deadline=None, max_examples=examples(40))
@given(models=st.integers(1, 4), shape=SHAPES, seed=st.integers(0, 2**20))
def test_iso_c_against_the_formula(models: int, shape: tuple[int, int], seed: int) -> None:
    tasks, base = random(models, shape, seed)
    total = (np.array(tasks, np.float64) - np.array(base, np.float64)).sum(0)
    u, s, vh = svd(total)
    found = change(ISO_C_Merge(), tasks, base)
    np.testing.assert_allclose(found, u @ vh * s.mean(), atol=1e-5 * max(1, s[0] / s[-1] / 10))
    np.testing.assert_allclose(svd(found)[1], s.mean(), rtol=1e-5)


def test_iso_c_by_hand() -> None:
    result = merged(ISO_C_Merge(), [[[3.0, 0], [0, 1]]], [[0.0, 0], [0, 0]])
    np.testing.assert_allclose(result.numpy(), 2 * np.eye(2), atol=1e-6)


def test_iso_c_depends_on_the_sum_alone() -> None:
    (one, other), base = random(2, (4, 6))
    both = (np.array(one) + np.array(other) - np.array(base)).tolist()
    for models in ([other, one], [both, base]):
        found = change(ISO_C_Merge(), models, base)
        np.testing.assert_allclose(found, change(ISO_C_Merge(), [one, other], base), atol=1e-5)


def test_directions_without_change_count_unless_they_are_left_out() -> None:
    model, base = np.diag([3.0, 1, 0, 0]), np.zeros((4, 4))
    found = change(ISO_C_Merge(), [model.tolist()], base)
    np.testing.assert_allclose(found[:2, :2], np.eye(2), atol=1e-6)
    np.testing.assert_allclose(svd(found)[1], np.ones(4), atol=1e-6)
    found = change(ISO_C_Merge(rank_tol=1e-5), [model.tolist()], base)
    np.testing.assert_allclose(found, np.diag([2, 2, 0, 0]), atol=1e-6)
    found = change(ISO_C_Merge(rank_tol=0.5), [model.tolist()], base)
    np.testing.assert_allclose(found, np.diag([3, 0, 0, 0]), atol=1e-6)


def test_weak_directions_are_accurate() -> None:
    u, _, vh = svd(np.random.default_rng(0).standard_normal((40, 60)))
    total = (u * np.logspace(0, -8, 40)) @ vh
    model = torch.tensor(total)
    method = ISO_C_Merge()
    found = method.merge_tensor("w", [model], torch.zeros_like(model))
    np.testing.assert_allclose(found, u @ vh * np.logspace(0, -8, 40).mean(), atol=1e-8)


def polar(matrix: Array) -> Array:
    u, _, vh = svd(matrix)
    return np.asarray(u @ vh)


def iso_cts(models: Any, base: Any, fraction: float) -> tuple[Array, float, float]:
    """Return the merged task vector, its singular value, and how much it magnifies errors."""
    tasks = np.array(models, np.float64) - np.array(base, np.float64)
    rank = min(tasks[0].shape)
    own = round((rank - int(rank * fraction + 1e-9)) / len(tasks))
    own = min(own, rank // len(tasks))
    common = rank - own * len(tasks)
    u, s, vh = svd(tasks.sum(0))
    u, s, vh = u[:, :common], s[:common], vh[:common]
    us, ss, vs = [], [], []
    for task in tasks:
        left, values, right = svd(task - u @ u.T @ task)
        us.append(left[:, :own])
        ss.append(values[:own])
        vs.append(right[:own])
    left, right = np.hstack([*us, u]), np.vstack([*vs, vh])
    value = float(np.concatenate([*ss, s]).mean())
    condition = max(float(np.linalg.cond(side)) for side in (left, right))
    return value * polar(left) @ polar(right), value, condition


@settings(deadline=None, max_examples=examples(60))
@given(
    models=st.integers(1, 4),
    shape=SHAPES,
    fraction=st.sampled_from([0, 0.3, 0.5, 0.8, 1]),
    seed=st.integers(0, 2**20),
)
def test_iso_cts_against_the_formula(
    models: int, shape: tuple[int, int], fraction: float, seed: int
) -> None:
    tasks, base = random(models, shape, seed)
    expected, value, condition = iso_cts(tasks, base, fraction)
    assume(condition < 1e3)
    found = change(ISO_CTS_Merge(common_space_fraction=fraction), tasks, base)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, condition / 10))
    np.testing.assert_allclose(svd(found)[1], value, rtol=1e-4)


def test_iso_cts_with_common_directions_alone_is_iso_c() -> None:
    models, base = random(3, (8, 5))
    method = ISO_CTS_Merge(common_space_fraction=1)
    np.testing.assert_array_equal(change(method, models, base), change(ISO_C_Merge(), models, base))


def test_more_models_than_directions() -> None:
    models, base = random(5, (3, 4))
    method = ISO_CTS_Merge(common_space_fraction=0)
    np.testing.assert_array_equal(change(method, models, base), change(ISO_C_Merge(), models, base))


def test_a_task_inside_the_common_directions_has_none_of_its_own() -> None:
    one, other = np.diag([4.0, 0, 0, 0]), np.diag([0.0, 2, 0, 0])
    method = ISO_CTS_Merge(common_space_fraction=0.5)
    found = change(method, [one.tolist(), other.tolist()], np.zeros((4, 4)))
    np.testing.assert_allclose(found, np.diag([1.5, 1.5, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("shape", [(), (3,), (4, 4), (3, 0), (2, 2, 2)])
def test_equal_to_the_base_is_exactly_the_base(method: Any, shape: tuple[int, ...]) -> None:
    _, base = random(1, shape)
    result = merged(method(), [base, base], base)
    assert torch.equal(result, torch.tensor(base, dtype=torch.float32).view(shape))


@pytest.mark.parametrize("method", BOTH)
def test_opposite_and_absent_changes_are_no_nan(method: Any) -> None:
    model = np.diag([4.0, 3, 2, 1])
    base = np.zeros((4, 4)).tolist()
    for other in ((-model).tolist(), base):
        assert np.isfinite(change(method(), [model.tolist(), other], base)).all()


@pytest.mark.parametrize("method", BOTH)
def test_the_rest_gets_the_mean(method: Any) -> None:
    assert float(merged(method(), [3.0, 5.0], 1.0)) == 4
    assert merged(method(2), [[3.0], [5.0]], [1.0]).tolist() == [7]
    models, base = random(2, (3, 4))
    found = merged(method(exclude_keys=["weight"]), models, base).numpy()
    np.testing.assert_allclose(found, np.mean(models, axis=0), atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
def test_scaling_factor(method: Any) -> None:
    models, base = random(2, (4, 3))
    np.testing.assert_allclose(
        change(method(0.5), models, base), change(method(), models, base) / 2, atol=1e-6
    )


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"common_space_fraction: 2 is not"):
        ISO_CTS_Merge(common_space_fraction=2)
    with pytest.raises(FusionBenchError, match=r"rank_tol: -1 is not"):
        ISO_C_Merge(rank_tol=-1)
