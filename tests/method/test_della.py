from typing import Any

import numpy as np
import pytest
import torch
from fixtures_method import merged

from fusion_bench.method import DellaMerging, TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.problems import FusionBenchError

ROW = [1.0, -5, 3, -2, 4]
ZERO = [0.0] * 5
MODELS = [[5, -1, 0.5, 3, -2], [-4, -2, 0.1, 1, 6], [1, -3, 0.2, -7, 0.3]]


def draws(seeds: int, model: Any, **options: Any) -> torch.Tensor:
    """Return what is made of one model with so many seeds."""
    base = torch.zeros_like(torch.tensor(model)).tolist()
    return torch.stack(
        [merged(DellaMerging(seed=seed, **options), [model], base) for seed in range(seeds)]
    ).double()


@pytest.mark.parametrize(("window", "epsilon"), [("half", 0.2), ("full", 0.4)])
@pytest.mark.parametrize("merge", ["elect", "linear"])
def test_by_hand(window: Any, epsilon: float, merge: Any) -> None:
    keep = np.array([0.3, 0.7, 0.5, 0.4, 0.6])  # by rank of the magnitude 0.3, 0.4 … 0.7
    options = {"density": 0.5, "epsilon": epsilon, "window": window, "merge": merge}
    of_rows = draws(20, [ROW] * 104, **options).reshape(-1, 5)
    found = torch.cat([draws(20, ROW, **options), of_rows]).numpy()
    kept = found != 0
    np.testing.assert_allclose(found, kept * (np.array(ROW) / keep), rtol=1e-6)
    np.testing.assert_allclose(kept.mean(0), keep, atol=4 * 0.5 / 2100**0.5)
    # On average the task vector stays what it was.
    np.testing.assert_allclose(found.mean(0), ROW, atol=4 * 5 * (1 / 0.3) ** 0.5 / 2100**0.5)


def test_without_a_window_all_are_kept_alike() -> None:
    found = draws(50, [ROW] * 10, density=0.5, epsilon=0)
    assert set(found.flatten().tolist()) == {0.0, *(2 * x for x in ROW)}
    assert (found != 0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2500**0.5)


def test_each_row_has_ranks_of_its_own() -> None:
    model = [[1.0, 2, 3], [100.0, 200, 300]]
    found = draws(60, model, density=0.5, epsilon=0.4)
    values = torch.tensor(model) / torch.tensor([0.3, 0.5, 0.7])
    assert torch.allclose(found, (found != 0) * values.double())
    kernels = [[[[1.0, 2]], [[3.0, 4]]], [[[5.0, 6]], [[7.0, 8]]]]  # each output's is a row
    expected = torch.tensor(kernels) / torch.tensor([0.2, 0.4, 0.6, 0.8]).view(2, 1, 2)
    found = draws(50, kernels, density=0.5, epsilon=0.6)
    assert torch.allclose(found, (found != 0) * expected.double())


@pytest.mark.parametrize("model", [3.0, [3.0], [[3.0], [4.0]]])
def test_an_element_alone_has_the_average_probability(model: Any) -> None:
    found = draws(40, model, density=0.5, epsilon=0.4)
    assert set(found.unique().tolist()) == {0.0, *(2 * torch.tensor(model).flatten()).tolist()}


def test_ways_to_rescale() -> None:
    for seed in range(20):
        options: Any = {"density": 0.6, "epsilon": 0.2, "seed": seed}
        none = merged(DellaMerging(rescale="none", **options), [ROW], ZERO)
        l1 = merged(DellaMerging(rescale="l1", **options), [ROW], ZERO)
        assert all(x in (0, y) for x, y in zip(none.tolist(), ROW, strict=True))
        assert torch.allclose(l1, none * (15 / none.abs().sum() if none.any() else 0))


@pytest.mark.parametrize("func", ["mean", "sum", "max"])
def test_nothing_dropped_is_ties_without_trimming(func: Any) -> None:
    ours = DellaMerging(0.7, density=1, epsilon=0, merge_func=func)
    ties = TiesMergingAlgorithm(0.7, threshold=1, merge_func=func)
    assert torch.equal(merged(ours, MODELS, ZERO), merged(ties, MODELS, ZERO))
    contested = [[1.0, -2, -3], [-1.0, -2, 3]]
    ours = DellaMerging(density=1, epsilon=0, merge_func=func)
    expected = {"mean": [-1, -2, -3], "sum": [-1, -4, -3], "max": [-1, -2, -3]}[func]
    assert merged(ours, contested, [0.0] * 3).tolist() == expected


def test_nothing_dropped_is_task_arithmetic_where_it_is_linear() -> None:
    base = [0.3] * 5
    ours = DellaMerging(0.6, density=1, epsilon=0, merge="linear", merge_func="sum")
    assert torch.equal(
        merged(ours, MODELS, base), merged(TaskArithmeticAlgorithm(0.6), MODELS, base)
    )
    mean = DellaMerging(0.6, density=1, epsilon=0, merge="linear")
    torch.testing.assert_close(
        merged(mean, MODELS, base), merged(TaskArithmeticAlgorithm(0.2), MODELS, base)
    )


def test_models_are_thinned_out_apart() -> None:
    both = dict.fromkeys("ab", ROW)
    options: Any = {"density": 0.5, "epsilon": 0, "merge": "linear", "rescale": "none"}
    found = [
        merged(DellaMerging(seed=seed, **options), both, ZERO).abs().tolist() for seed in range(9)
    ]
    halves = [x == abs(y) / 2 for row in found for x, y in zip(row, ROW, strict=True)]
    assert any(halves) and not all(halves)


def test_nothing_changed() -> None:
    base = [0.1, 0.2, 0.3]
    for rescale in ("inverse_keep", "l1", "none"):
        same = merged(DellaMerging(rescale=rescale), [base] * 2, base)  # type: ignore[arg-type]
        assert torch.equal(same, torch.tensor(base))


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"epsilon.* 0\.63 to 1\.07"):
        DellaMerging(density=0.85, epsilon=0.44)
    with pytest.raises(FusionBenchError, match=r"epsilon.* 0 to 0\.2"):
        DellaMerging(density=0.1, epsilon=0.1, window="half")
    with pytest.raises(FusionBenchError, match=r"density: 3 is not"):
        DellaMerging(density=3)
    with pytest.raises(FusionBenchError, match="only for merge=elect"):
        DellaMerging(merge="linear", merge_func="max")
    wrong: dict[str, Any]
    for wrong in ({"window": "ful"}, {"rescale": "l2"}, {"merge": "elekt"}, {"merge_func": "su"}):
        with pytest.raises(FusionBenchError, match=f"{next(iter(wrong))}: .* is unknown"):
            DellaMerging(**wrong)
