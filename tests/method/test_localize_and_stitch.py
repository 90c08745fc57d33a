from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench.method import LocalizeAndStitch, SimpleAverageAlgorithm
from fusion_bench.problems import FusionBenchError


def test_by_hand() -> None:
    models = [[3.0, 1, 0, 0], [1.0, 0, 0, 4]]
    assert merged(LocalizeAndStitch(0.5), models, [0.0] * 4).tolist() == [2, 1, 0, 4]
    assert merged(LocalizeAndStitch(0.5), models, [0.5] * 4).tolist() == [2, 1, 0.5, 4]


def test_the_largest_are_sought_in_the_whole_model() -> None:
    def net(*values: float) -> nn.Module:
        model = nn.Linear(2, 1)
        model.load_state_dict(
            {"weight": torch.tensor([values[:2]]), "bias": torch.tensor(values[2:])}
        )
        return model

    pool = {"_pretrained_": net(0, 0, 0), "a": net(1, 2, 3), "b": net(9, 8, 1)}
    result = LocalizeAndStitch(0.67).run(pool)
    assert result["weight"].tolist() == [[9, 5]] and result["bias"].tolist() == [3]


@settings(deadline=None, max_examples=examples(60))
@given(
    taus=st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=size, max_size=size),
            min_size=1,
            max_size=4,
        )
    ),
    percent=st.integers(0, 100),
)
def test_against_the_formula(taus: list[list[float]], percent: int) -> None:
    tau = np.array(taus, np.float64)
    masks = np.zeros_like(tau)
    for row, mask in zip(tau, masks, strict=True):
        kept = np.argsort(-np.abs(row), kind="stable")[: len(row) * percent // 100]
        mask[kept[row[kept] != 0]] = 1
    expected = (masks / np.maximum(masks.sum(0), 1) * tau).sum(0)
    found: Any = merged(LocalizeAndStitch(percent / 100), taus, [0.0] * tau.shape[1])
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-12)


def test_everything_kept_is_the_simple_average() -> None:
    base, *models = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).tolist()
    ours, average = (
        merged(method, models, base) for method in (LocalizeAndStitch(1), SimpleAverageAlgorithm())
    )
    torch.testing.assert_close(ours, average)


def test_what_did_not_change_takes_no_share() -> None:
    assert merged(LocalizeAndStitch(1), [[2.0, 0], [4.0, 6]], [0.0, 0]).tolist() == [3, 6]
    base = [0.1, 0.2]
    assert torch.equal(merged(LocalizeAndStitch(), [base, base], base), torch.tensor(base))


def test_one_model_and_a_number_alone() -> None:
    assert merged(LocalizeAndStitch(0.5), [[1.0, -3]], [0.0, 0]).tolist() == [0, -3]
    assert merged(LocalizeAndStitch(1), [3.0], 1.0).item() == 3


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"density: 10 is not a number from 0 to 1"):
        LocalizeAndStitch(10)
