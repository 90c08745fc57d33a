from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged, module
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion_bench.method import TaskSingularVectorMerging
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights

Array = np.ndarray[Any, Any]


def random(models: int, shape: Sequence[int], seed: int = 0) -> tuple[list[Any], Any]:
    """Return models and a base, as nested lists."""
    values = np.random.default_rng(seed).standard_normal((models + 1, *shape)).astype(np.float32)
    return values[1:].tolist(), values[0].tolist()


def polar(matrix: Array) -> Array:
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ vh)


def reference(models: Any, base: Any) -> tuple[Array, Array, float]:
    """Return the merged task vector, its singular values, and how much it magnifies errors."""
    base = np.array(base, np.float64)
    rank = min(base.shape) // len(models)
    us, ss, vs, gaps = [], [], [], []
    for model in models:
        u, s, vh = np.linalg.svd(np.array(model, np.float64) - base, full_matrices=False)
        gaps.append((s[rank - 1] - s[rank]) / s[0] if rank < len(s) else 1.0)
        us.append(u[:, :rank])
        ss.append(s[:rank])
        vs.append(vh[:rank].T)
    left, values, right = np.hstack(us), np.hstack(ss), np.hstack(vs)
    condition = max(float(np.linalg.cond(side)) for side in (left, right))
    condition = max(condition, 1 / max(min(gaps), 1e-9))  # what is cut off may take its place
    return (polar(left) * values) @ polar(right).T, values, condition


@settings(deadline=None, max_examples=examples(60))
@given(
    models=st.integers(1, 4),
    shape=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    seed=st.integers(0, 2**20),
)
def test_against_the_formula(models: int, shape: tuple[int, int], seed: int) -> None:
    tasks, base = random(models, shape, seed)
    expected, values, condition = reference(tasks, base)
    assume(condition < 1e3)
    found = merged(TaskSingularVectorMerging(), tasks, base).double().numpy() - np.array(base)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, condition / 100))
    kept = np.sort(values)[::-1]
    size = len(kept)
    np.testing.assert_allclose(np.linalg.svd(found)[1][:size], kept, rtol=1e-4, atol=1e-5)


def test_orthogonal_tasks_are_added() -> None:
    one, other = np.diag([2.0, 0, 0, 0]), np.diag([0.0, 3, 0, 0])
    result = merged(TaskSingularVectorMerging(), [one.tolist(), other.tolist()], np.zeros((4, 4)))
    np.testing.assert_allclose(result.numpy(), one + other, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (9, 6)])
def test_a_single_model_stays_as_it_is(shape: tuple[int, int]) -> None:
    (model,), base = random(1, shape)
    result = merged(TaskSingularVectorMerging(), [model], base)
    np.testing.assert_allclose(result.numpy(), model, atol=2e-6)


def test_equal_models_are_one_model_with_fewer_directions() -> None:
    model = np.diag([4.0, 3, 2, 1]).tolist()
    result = merged(TaskSingularVectorMerging(), [model, model], np.zeros((4, 4)))
    np.testing.assert_allclose(result.numpy(), np.diag([4, 3, 0, 0]), atol=1e-6)


def test_a_task_that_changes_nothing_does_no_harm() -> None:
    model, base = np.diag([4.0, 3, 2, 1]).tolist(), np.zeros((4, 4)).tolist()
    result = merged(TaskSingularVectorMerging(), [model, base], base)
    np.testing.assert_allclose(result.numpy(), np.diag([4, 3, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (4, 4), (3, 0), (2, 2, 2)])
def test_equal_to_the_base_is_exactly_the_base(shape: tuple[int, ...]) -> None:
    _, base = random(1, shape)
    result = merged(TaskSingularVectorMerging(), [base, base], base)
    assert torch.equal(result, torch.tensor(base, dtype=torch.float32).view(shape))


def test_what_is_no_matrix_gets_the_mean() -> None:
    assert float(merged(TaskSingularVectorMerging(), [3.0, 5.0], 1.0)) == 4
    assert merged(TaskSingularVectorMerging(), [[3.0], [5.0]], [1.0]).tolist() == [4]
    cube = [[[3.0]]], [[[5.0]]], [[[1.0]]]
    assert merged(TaskSingularVectorMerging(), cube[:2], cube[2]).tolist() == [[[4]]]


def test_so_do_matrices_that_are_excluded_or_too_small() -> None:
    models, base = random(3, (2, 7))
    mean = np.mean(models, axis=0)
    for method in (TaskSingularVectorMerging(), TaskSingularVectorMerging(exclude_keys=["w*"])):
        np.testing.assert_allclose(merged(method, models, base).numpy(), mean, atol=1e-6)


def test_alpha_scales_what_is_added() -> None:
    for shape in [(5, 8), (4,)]:
        models, base = random(2, shape)
        plain = merged(TaskSingularVectorMerging(), models, base).numpy() - np.array(base)
        for alpha in (0.5, [0.5, 0.5]):
            result = merged(TaskSingularVectorMerging(alpha), models, base).numpy()
            np.testing.assert_allclose(result - np.array(base), plain / 2, atol=1e-5)
        unscaled = merged(TaskSingularVectorMerging(None), models, base).numpy()
        np.testing.assert_array_equal(unscaled - np.array(base), plain)


def test_a_list_of_alphas_scales_each_task() -> None:
    one, other = np.diag([2.0, 0, 0, 0]), np.diag([0.0, 3, 0, 0])
    method = TaskSingularVectorMerging([10, -1])
    result = merged(method, [one.tolist(), other.tolist()], np.zeros((4, 4)))
    np.testing.assert_allclose(result.numpy(), 10 * one - other, atol=1e-5)
    assert merged(method, [[1.0], [4.0]], [0.0]).tolist() == [3]


def test_single_models_keep_their_main_directions() -> None:
    tasks = {"a": np.diag([4.0, 3, 2, 1]), "b": np.diag([1.0, 2, 3, 4])}
    pool = {"_pretrained_": module(np.zeros((4, 4)).tolist())}
    pool |= {name: module(values.tolist()) for name, values in tasks.items()}
    family: Any = TaskSingularVectorMerging(return_single_task_models=True).run(pool)
    alone: Any = TaskSingularVectorMerging().run(pool)
    assert list(family) == ["merged", "a", "b"]
    assert torch.equal(family["merged"]["weight"], alone["weight"])
    np.testing.assert_allclose(family["a"]["weight"].numpy(), np.diag([4, 3, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(family["b"]["weight"].numpy(), np.diag([0, 0, 3, 4]), atol=1e-6)


class Pool:
    """Weights of one key as a model pool."""

    vocabulary = None
    has_pretrained = True
    model_names = ("a", "b")

    def __init__(self, base: torch.Tensor, on_nonfinite: Any = "error"):
        self.policy = MergePolicy(on_nonfinite=on_nonfinite)
        self._base = base

    def weights(self, name: str) -> TensorWeights:
        change = {"_pretrained_": 0.0, "a": 1.0, "b": torch.nan}[name]
        return TensorWeights({"w": self._base + change})


def test_nan_in_a_model_is_named() -> None:
    lazy: Any = TaskSingularVectorMerging().run(Pool(torch.eye(4)))
    assert lazy["w"].shape == (4, 4)
    with pytest.raises(FusionBenchError, match="b: 'w'"):
        lazy.verify()


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"alpha: 3 values for 2 models \(a, b\)"):
        merged(TaskSingularVectorMerging([1, 2, 3]), [[1.0], [2.0]], [0.0])
