import threading
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.weights import lapack
from fusion_bench.weights.lapack import eigenvectors


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    size = len(values)
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    basis = torch.linalg.qr(draw).Q
    made = (basis * values) @ basis.T
    return (made + made.T) / 2


def check(matrix: Tensor, count: int | None) -> None:
    values, vectors = eigenvectors(matrix.clone(), count)
    expected = np.linalg.eigvalsh(matrix.numpy())
    kept = len(matrix) if count is None else min(count, len(matrix))
    norm = float(matrix.norm()) or 1.0
    assert values.shape == (kept,) and vectors.shape == (len(matrix), kept)
    np.testing.assert_allclose(values.numpy(), expected[::-1][:kept], atol=1e-14 * norm)
    left = matrix @ vectors - vectors * values
    assert not kept or float(left.abs().max()) <= 1e-13 * norm
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(kept, dtype=torch.float64), atol=1e-11, rtol=0
    )


@settings(deadline=None, max_examples=examples(40))
@given(size=st.integers(1, 30), seed=st.integers(0, 2**20), count=st.none() | st.integers(0, 32))
def test_the_largest_of_any_matrix(size: int, seed: int, count: int | None) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    check(symmetric(values, seed), count)


@pytest.mark.parametrize("count", [None, 1, 7, 20, 60])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(80),
        torch.ones(80),
        torch.cat([torch.ones(40), torch.zeros(40)]),
        torch.logspace(0, -16, 80),
        torch.cat([torch.full((5,), 3.0), 1 + 1e-12 * torch.arange(70.0), torch.zeros(5)]),
    ],
    ids=["zeros", "ones", "half the rank", "ill-conditioned", "clusters"],
)
def test_equal_and_tiny_eigenvalues(values: Tensor, count: int | None) -> None:
    check(symmetric(values.double()), count)


def test_without_lapack_s_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "_dsyevr", lambda: None)
    check(symmetric(torch.arange(9.0).double()), 4)


def test_other_threads_go_on() -> None:
    matrix = symmetric(torch.arange(400.0).double())
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.0005):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    solve = lapack._dsyevr()
    assert solve is not None
    marks: list[int] = []

    def watched(*arguments: Any) -> None:
        before = len(ticks)
        solve(*arguments)
        marks.append(len(ticks) - before)

    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lapack, "_dsyevr", lambda: watched)
        for _ in range(20):
            eigenvectors(matrix.clone())
    done.set()
    thread.join()
    assert sum(marks) > 0
