from typing import Any

import numpy as np
import pytest
import torch
from fixtures_method import merged
from torch import Tensor, nn

from fusion_bench.method import WUDIMerging
from fusion_bench.problems import FusionBenchError


def pool(vectors: list[Tensor], base: Tensor) -> dict[str, nn.Module]:
    modules = {"_pretrained_": nn.Module()}
    modules["_pretrained_"].weight = nn.Parameter(base)
    for number, vector in enumerate(vectors):
        modules[f"m{number}"] = nn.Module()
        modules[f"m{number}"].weight = nn.Parameter(base + vector)
    return modules


def changes(count: int, *shape: int, scale: float = 1e-3, rank: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for _ in range(count):
        left = torch.randn(shape[0], rank or shape[1], generator=generator, dtype=torch.float64)
        right = torch.eye(shape[1], dtype=torch.float64)
        if rank is not None:
            right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
        vectors.append(left @ right * scale)
    return vectors


def run(method: WUDIMerging, models: dict[str, nn.Module]) -> Any:
    return method.run(models)


def fit(method: WUDIMerging, vectors: list[Tensor]) -> Tensor:
    base = torch.zeros_like(vectors[0])
    result: Tensor = run(method, pool(vectors, base))["weight"].detach()
    return result


def loss(tau: Tensor, vectors: list[Tensor], power: int = 2) -> Tensor:
    parts = [((tau - v) @ v.T).square().sum() / v.norm() ** power for v in vectors if v.any()]
    return torch.stack(parts).sum()


@pytest.mark.parametrize(("divisor", "expected"), [("squared", 3), ("norm", 20 / 6)])
def test_in_closed_form_by_hand(divisor: Any, expected: float) -> None:
    method = WUDIMerging(solver="lstsq", divisor=divisor)
    assert merged(method, [[[3.0]], [[5.0]]], [[1.0]]).item() == pytest.approx(1 + expected)


def test_a_step_moves_each_element_by_the_learning_rate() -> None:
    one_step = fit(WUDIMerging(iter_num=1), [torch.ones(1, 1).double(), 2 * torch.ones(1, 1)])
    assert one_step.item() == pytest.approx(3 - 1e-5, abs=1e-11)
    assert fit(WUDIMerging(iter_num=0), changes(1, 2, 3)).equal(changes(1, 2, 3)[0])


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_the_sum_stays_where_tasks_read_other_inputs(solver: Any) -> None:
    models = [[[1.0, 2, 0, 0], [3, 4, 0, 0]], [[0.0, 0, 5, 6], [0, 0, 7, 8]]]
    result = merged(WUDIMerging(solver=solver), models, [[0.0] * 4] * 2)
    torch.testing.assert_close(result, torch.tensor(models).sum(0))


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_one_model_stays_itself(solver: Any) -> None:
    model = torch.randn(3, 5)
    assert merged(WUDIMerging(solver=solver), [model.tolist()], [[0.0] * 5] * 3).equal(model)


@pytest.mark.parametrize(("divisor", "power"), [("squared", 2), ("norm", 1)])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (7, 2)])
def test_it_is_adam_on_the_loss(divisor: Any, power: int, shape: tuple[int, int]) -> None:
    vectors = [vector * (1 + n) for n, vector in enumerate(changes(3, *shape))]
    tau = torch.stack(vectors).sum(0).requires_grad_()
    optimizer = torch.optim.Adam([tau], lr=1e-5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(tau, vectors, power).backward()
        optimizer.step()
    found = fit(WUDIMerging(iter_num=60, divisor=divisor), vectors)
    torch.testing.assert_close(found, tau.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divisor", ["squared", "norm"])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_the_closed_form_is_the_pseudo_inverse_s(divisor: Any, rank: int | None) -> None:
    vectors = changes(2, 4, 6, rank=rank)
    tau = [vector.numpy() for vector in vectors]
    weights = [np.linalg.norm(t) ** (-2 if divisor == "squared" else -1) for t in tau]
    grams = [t.T @ t * weight for t, weight in zip(tau, weights, strict=True)]
    pulls = sum(t @ gram for t, gram in zip(tau, grams, strict=True))
    expected = pulls @ np.linalg.pinv(sum(grams), rcond=1e-12)
    found = fit(WUDIMerging(solver="lstsq", divisor=divisor), vectors)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-10)


def test_the_loss_falls_towards_the_closed_form_s() -> None:
    vectors = changes(3, 6, 5)
    steps = [loss(fit(WUDIMerging(iter_num=n), vectors), vectors) for n in (0, 1, 20, 100, 400)]
    assert steps == sorted(steps, reverse=True)
    best = loss(fit(WUDIMerging(solver="lstsq"), vectors), vectors)
    assert best < steps[-1] < steps[0] / 2


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_a_model_that_changed_nothing_changes_nothing(solver: Any) -> None:
    vectors = changes(2, 4, 3)
    method = WUDIMerging(solver=solver)
    with_zero = fit(method, [vectors[0], torch.zeros(4, 3).double(), vectors[1]])
    assert with_zero.equal(fit(method, vectors))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4), (4, 0), (2, 2, 2)])
@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_no_change_at_all_gives_the_pretrained_model(shape: tuple[int, ...], solver: Any) -> None:
    base = torch.randn(shape)
    zeros = [torch.zeros(shape)] * 2
    result = run(WUDIMerging(solver=solver), pool(zeros, base))["weight"]
    assert result.equal(base)


def test_the_rest_is_averaged_or_stays() -> None:
    for base in (1.0, [1.0, 2.0], [[[[1.0]]]]):
        start = torch.tensor(base)
        models = [(start + n).tolist() for n in (1, 4)]
        assert merged(WUDIMerging(), models, base).equal(start + 2.5)
        assert merged(WUDIMerging(rest="base"), models, base).equal(start)


def test_excluded_matrices_belong_to_the_rest() -> None:
    models = [[[2.0]], [[4.0]]]
    assert merged(WUDIMerging(exclude_keys=["w*"]), models, [[0.0]]).tolist() == [[3]]
    assert merged(WUDIMerging(exclude_keys=["x"]), models, [[0.0]]).item() > 5


def test_it_works_without_gradients_and_beside_counters() -> None:
    modules = pool(changes(2, 2, 2), torch.zeros(2, 2).double())
    expected = run(WUDIMerging(), modules)["weight"]
    for module in modules.values():
        module.register_buffer("count", torch.tensor(7))
    with torch.no_grad():
        result = run(WUDIMerging(), modules)
    assert result["weight"].equal(expected) and result["count"].equal(torch.tensor(7))


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_nan_is_named(solver: Any) -> None:
    models = [[[1.0, 2]], [[float("nan"), 1]]]
    with pytest.raises(FusionBenchError, match="b: 'weight'"):
        merged(WUDIMerging(solver=solver), models, [[0.0, 0]])


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"solver.*Did you mean 'adam'"):
        WUDIMerging(solver="adm")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"divisor"):
        WUDIMerging(divisor="square")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"rest"):
        WUDIMerging(rest="sum")  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"iter_num"):
        WUDIMerging(iter_num=-1)
