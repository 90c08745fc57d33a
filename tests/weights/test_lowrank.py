"""Truncated products, held against numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import TensorSpec
from fusion_bench.weights.lowrank import Factors, LowRankWeights, Truncation, shortened


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float], rows: int = 7, columns: int = 5) -> Tensor:
    """Return a matrix with these singular values."""
    left, _ = torch.linalg.qr(random(rows, len(values)))
    right, _ = torch.linalg.qr(random(columns, len(values), seed=1))
    return left * torch.tensor(values) @ right.T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_best_product_of_a_rank(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = Truncation(rank=2).factors(matrix)
    assert found.b.shape == (shape[0], 2) and found.a.shape == (2, shape[1])
    best = (u[:, :2] * s[:2]) @ vh[:2]
    assert np.abs(found.product().numpy() - best).max() < 1e-6
    # each factor has the root of the singular values
    for factor in (found.b.T, found.a):
        assert np.allclose(np.linalg.norm(factor.numpy(), axis=1), np.sqrt(s[:2]), atol=1e-6)
    missing = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
    assert found.error(matrix) == pytest.approx(missing, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 4),
        ({"rank": 3}, 3),
        ({"epsilon": 1.01}, 2),
        ({"rank": 1, "epsilon": 0.4}, 1),
        ({"energy": 0.5}, 1),  # 16 of 21.25
        ({"energy": 16 / 21.25 + 1e-4}, 2),
        ({"energy": 0.99}, 4),  # 21 of 21.25 are 0.988
        ({"energy": 1.0}, 4),
        ({"energy": 1.0, "rank": 2}, 2),
        ({"energy": 0.0}, 1),
    ],
)
def test_how_many_are_kept(options: dict[str, float], rank: int) -> None:
    assert Truncation(**options).factors(with_values([4, 2, 1, 0.5])).rank == rank


@pytest.mark.parametrize("shape", [(70, 50), (50, 70)])
@pytest.mark.parametrize("rank", [60, 2])  # of the second the sixth value is a rounding error
def test_few_of_many_singular_values(shape: tuple[int, int], rank: int) -> None:
    matrix = random(shape[0], rank) @ random(rank, shape[1], seed=1)
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = Truncation(rank=6).factors(matrix)
    assert found.rank == min(rank, 6)
    exact = (u[:, : found.rank] * s[: found.rank]) @ vh[: found.rank]
    assert np.abs(found.product().numpy() - exact).max() < 1e-5


def test_a_matrix_of_zeros_has_none() -> None:
    assert Truncation().factors(torch.zeros(4, 3)).rank == 0
    assert Truncation(energy=0.9).factors(torch.zeros(4, 3)).rank == 0


def test_the_rank_without_a_choice_is_32() -> None:
    assert Truncation().factors(random(50, 40)).rank == 32
    assert Truncation(energy=1.0).factors(random(50, 40)).rank == 40


def test_a_randomised_svd_is_near_and_the_same_each_time() -> None:
    matrix = with_values([8, 4, 2, 0.1, 0.05], 60, 40)
    exact = Truncation(rank=3).factors(matrix).product()
    randomised = Truncation(rank=3, power_iterations=2)
    state = torch.random.get_rng_state()
    found = randomised.factors(matrix)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found.a, randomised.factors(matrix).a)
    assert (found.product() - exact).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"energy": 1.5}, "energy"),
        ({"epsilon": -1}, "epsilon"),
        ({"energy": 0.9, "power_iterations": 2}, "power_iterations"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, float], place: str) -> None:
    with pytest.raises(FusionBenchError) as raised:
        Truncation(**options)  # type: ignore[arg-type]
    assert raised.value.problems[0].place == (place,)


def test_a_product_is_shortened_without_being_made() -> None:
    whole = Factors(random(9, 4), random(4, 6, seed=1), scale=-0.5)
    short, error = shortened(whole, Truncation(rank=2))
    exact = np.linalg.svd(whole.product().double().numpy(), compute_uv=False)
    wanted = np.sqrt((exact[2:] ** 2).sum() / (exact**2).sum())
    assert error == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(
        short.product(), Truncation(rank=2).factors(whole.product()).product(), atol=1e-6
    )
    assert torch.allclose(
        shortened(whole, Truncation(rank=9))[0].product(), whole.product(), atol=1e-6
    )


def test_a_small_error_of_shortening_is_told_exactly() -> None:
    left, _ = torch.linalg.qr(random(9, 2).double())
    right, _ = torch.linalg.qr(random(6, 2, seed=1).double())
    whole = Factors(left * torch.tensor([1.0, 1e-5]), right.T)
    _, error = shortened(whole, Truncation(rank=1))
    assert error == pytest.approx(1e-5, rel=1e-3)
    assert shortened(Factors(torch.zeros(9, 2), torch.zeros(2, 6)), Truncation(rank=1))[1] == 0


def test_products_are_read_in_pieces() -> None:
    specs = {
        "conv.weight": TensorSpec((4, 2, 3, 1), torch.float32),
        "conv.bias": TensorSpec((4,), torch.float32),
        "other.weight": TensorSpec((2, 2), torch.float32),
    }
    factors = Factors(random(4, 2).bfloat16(), random(2, 6, seed=1).bfloat16(), 3.0)
    weights = LowRankWeights(specs, {"conv.weight": factors}, {"conv.bias": torch.ones(4)})
    exact = (3 * factors.b.double() @ factors.a.double()).float()
    assert torch.allclose(weights["conv.weight"], exact.view(4, 2, 3, 1), atol=1e-6)
    for start, stop in ((0, 1), (5, 7), (11, 24), (6, 12)):
        piece = weights.read("conv.weight", start, stop)
        assert torch.allclose(piece, exact.view(-1)[start:stop], atol=1e-6)
    assert torch.equal(weights["other.weight"], torch.zeros(2, 2))
    assert torch.equal(weights.read("conv.bias", 1, 3), torch.ones(2))
