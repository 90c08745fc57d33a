from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.weights.matrices import (
    column_space,
    flattened,
    gram,
    inverse_root,
    is_matrix,
    orthogonal_product,
    side_by_side,
    svd,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values: list[float], shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a matrix with these singular values, in float64."""
    left = torch.linalg.qr(random((shape[0], len(values)), seed, torch.float64))[0]
    right = torch.linalg.qr(random((shape[1], len(values)), seed + 1, torch.float64))[0]
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def polar(matrix: Tensor) -> np.ndarray[Any, Any]:
    u, _, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return np.asarray(u @ vh)


def test_what_is_a_matrix() -> None:
    assert is_matrix("a.weight", (3, 2)) and is_matrix("a.weight", (1, 1), ["b*"])
    for shape in [(), (3,), (0, 3), (3, 0), (2, 2, 2)]:
        assert not is_matrix("a.weight", shape)
    assert not is_matrix("a.weight", (3, 2), ["*.weight"])


@settings(deadline=None, max_examples=examples(60))
@given(shape=SHAPES, seed=st.integers(0, 2**20), count=st.integers(0, 10))
def test_the_largest_singular_triplets(shape: tuple[int, int], seed: int, count: int) -> None:
    matrix = random(shape, seed)
    u, s, vh = svd(matrix, count)
    kept = min(count, *shape)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert u.shape == (shape[0], kept) and vh.shape == (kept, shape[1])
    np.testing.assert_allclose(s.numpy(), values[:kept], rtol=1e-5)
    best = (left[:, :kept] * values[:kept]) @ right[:kept]
    np.testing.assert_allclose(((u * s) @ vh).numpy(), best, atol=1e-7)
    for products in (u.T @ u, vh @ vh.T):
        np.testing.assert_allclose(products.numpy(), np.eye(kept), atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
@pytest.mark.parametrize("smallest", [1e-3, 2e-5, 8e-6, 2e-6])
def test_small_singular_values_have_accurate_vectors(
    shape: tuple[int, int], smallest: float
) -> None:
    matrix = with_values([1, 0.5, 0.1, 0.01, 3 * smallest, smallest], shape)
    u, s, vh = svd(matrix)
    np.testing.assert_allclose((u @ vh).numpy(), polar(matrix), atol=1e-6)
    assert float(s[-1]) == pytest.approx(smallest, rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 5), (5, 9), (9, 5)])
def test_what_is_left_of_zero_is_left_out(shape: tuple[int, int]) -> None:
    matrix = with_values([2, 1, 1e-7], shape).float()
    u, s, vh = svd(matrix)
    assert s.tolist() == pytest.approx([2, 1]) and u.shape[1] == len(vh) == 2
    assert svd(matrix, tol=0.6)[1].tolist() == pytest.approx([2])
    assert svd(matrix, scale=1.5e6)[1].tolist() == pytest.approx([2])
    u, s, vh = svd(matrix, tol=0)
    assert u.shape[1] == len(s) == len(vh) == 5
    torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(vh @ vh.T, torch.eye(5, dtype=torch.float64))


def test_zero_and_what_is_no_number_have_no_directions() -> None:
    for value in (0.0, float("nan"), float("inf")):
        u, s, vh = svd(torch.full((3, 4), value))
        assert u.shape == (3, 0) and s.shape == (0,) and vh.shape == (0, 4)
    assert column_space([torch.zeros(3, 4)] * 2, (3, 8), 1e-5).shape == (3, 0)
    assert column_space([torch.full((3, 4), torch.nan)] * 2, (3, 8), 1e-5).shape == (3, 0)


def test_a_gram_matrix_of_many_columns() -> None:
    matrix = random((3, 9000), 0)
    torch.testing.assert_close(gram(matrix), matrix.double() @ matrix.double().T)


def test_gram_matrices_of_many_rows_add_up() -> None:
    one, other = random((600, 7), 0), random((600, 5), 1, torch.float64)
    found = gram(other, gram(one))
    torch.testing.assert_close(found, found.T)
    together = torch.cat([one.double(), other], 1)
    torch.testing.assert_close(found, together @ together.T)


#: Singular values: well spread, ill-conditioned, of lower rank, all equal, in clusters, one alone.
SPECTRA = {
    "spread": torch.linspace(1, 0.05, 24),
    "ill-conditioned": torch.logspace(0, -12, 24),
    "just resolved": torch.logspace(0, -4.9, 24),
    "not resolved": torch.logspace(0, -5.5, 24),
    "half the rank": torch.cat([torch.linspace(2, 1, 12), torch.zeros(12)]),
    "equal": torch.full((24,), 0.3),
    "clusters": torch.cat([torch.full((8,), c) + 1e-9 * torch.arange(8.0) for c in (5, 1, 1e-3)]),
    "one": torch.tensor([2.0]),
}


@pytest.mark.parametrize("shape", [(24, 24), (24, 90), (90, 24)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_lapack_s_svd_in_float64(spectrum: str, shape: tuple[int, int]) -> None:
    matrix = with_values(SPECTRA[spectrum].tolist(), shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > 1e-6 * values[0]).sum())
    u, s, vh = svd(matrix)
    assert len(s) == kept
    torch.testing.assert_close(s, values[:kept], rtol=1e-5, atol=0)
    both = [(u * s) @ vh, u @ vh, u @ u.T, vh.T @ vh]
    left, right = left[:, :kept], right[:kept]
    expected = [(left * values[:kept]) @ right, left @ right, left @ left.T, right.T @ right]
    for found, exact in zip(both, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    for found, name in ((u.T @ u, "left"), (vh @ vh.T, "right")):
        torch.testing.assert_close(
            found, torch.eye(kept).double(), rtol=0, atol=1e-5, msg=f"{name} vectors"
        )
    torch.testing.assert_close(
        flattened(matrix, 1e-6), values[:kept].mean() * left @ right, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40)])
@pytest.mark.parametrize("count", [1, 5, 10])
def test_few_of_many_are_those_of_all(shape: tuple[int, int], count: int) -> None:
    matrix = with_values(torch.logspace(0, -7, 40).tolist(), shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = svd(matrix, count)
    torch.testing.assert_close(s, values[:count], rtol=1e-9, atol=0)
    expected = left[:, :count] @ right[:count]
    torch.testing.assert_close(u @ vh, expected, rtol=0, atol=1e-9)


def test_svds_side_by_side() -> None:
    parts = [svd(with_values(values, (5, 4))) for values in ([2.0, 1.0], [3.0])]
    u, s, vh = side_by_side(iter(parts), (5, 4), 4)
    assert s.tolist() == pytest.approx([2, 1, 3, 0])
    assert u.shape == (5, 4) and vh.shape == (4, 4) and not u[:, 3].any() and not vh[3].any()
    torch.testing.assert_close((u * s) @ vh, sum((a * b) @ c for a, b, c in parts))


@settings(deadline=None, max_examples=examples(40))
@given(shape=SHAPES, models=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_the_column_space_holds_all_matrices(
    shape: tuple[int, int], models: int, seed: int
) -> None:
    matrices = [random(shape, seed + i) for i in range(models)]
    together = torch.cat(matrices, 1)
    u = column_space(iter(matrices), tuple(together.shape), 1e-5)
    assert u.shape == (shape[0], min(together.shape))
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64))
    torch.testing.assert_close(u @ (u.T @ together.double()), together.double())


@pytest.mark.parametrize("columns", [2, 9])
def test_the_column_space_of_few_directions(columns: int) -> None:
    matrices = [with_values([1, 1e-9], (6, columns), seed) for seed in (0, 5)]
    assert column_space(iter(matrices), (6, 2 * columns), 1e-5).shape == (6, 2)


def test_the_inverse_root_makes_columns_orthonormal() -> None:
    matrix = random((7, 4), 0, torch.float64)
    made = matrix @ inverse_root(gram(matrix.T))
    np.testing.assert_allclose(made.numpy(), polar(matrix), atol=1e-9)


def test_equal_columns_share_a_direction() -> None:
    matrix = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    made = matrix @ inverse_root(gram(matrix.T))
    assert made[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0])
    assert not made[1:].any()


@settings(deadline=None, max_examples=examples(40))
@given(shape=SHAPES, seed=st.integers(0, 2**20))
def test_the_product_of_two_polar_factors(shape: tuple[int, int], seed: int) -> None:
    count = min(shape)
    left = random((shape[0], count), seed, torch.float64)
    right = random((count, shape[1]), seed + 1, torch.float64)
    s = torch.arange(1, count + 1, dtype=torch.float64)
    assume(max(float(torch.linalg.cond(side)) for side in (left, right)) < 1e3)
    expected = (polar(left) * s.numpy()) @ polar(right)
    found = orthogonal_product(left, s, right).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_where_the_matrix_is() -> None:
    u, s, vh = svd(random((5, 3), 0).cuda())
    assert u.is_cuda and s.is_cuda and vh.is_cuda
