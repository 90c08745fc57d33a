from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench.method import TiesMergingAlgorithm
from fusion_bench.method.checks import Pool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, Renamed, TensorWeights, in_memory

MODELS = [[5, -1, 0.5, 3, -2], [-4, -2, 0.1, 1, 6], [1, -3, 0.2, -7, 0.3]]
BASE = [0.0] * 5


@pytest.mark.parametrize(
    ("keep", "threshold", "func", "expected"),
    [
        ("ge_kth", 40, "sum", [6, -5, 0, -7, 6]),
        ("ge_kth", 40, "mean", [3, -2.5, 0, -7, 6]),
        ("ge_kth", 40, "max", [5, -3, 0, -7, 6]),
        ("exact_topk", 40, "sum", [5, -3, 0, -7, 6]),
        ("exact_topk", 0.4, "mean", [5, -3, 0, -7, 6]),
        ("ge_kth", 60, "sum", [6, -6, 0, -7, 6.3]),
        ("ge_kth", 0.6, "mean", [3, -2, 0, -7, 3.15]),
        ("exact_topk", 60, "sum", [6, -5, 0, -7, 6]),
        ("exact_topk", 60, "mean", [3, -2.5, 0, -7, 6]),
    ],
)
def test_by_hand(keep: Any, threshold: float, func: Any, expected: list[float]) -> None:
    method = TiesMergingAlgorithm(threshold=threshold, merge_func=func, keep=keep)
    assert merged(method, MODELS, BASE).tolist() == pytest.approx(expected)
    per_tensor = TiesMergingAlgorithm(
        threshold=threshold, merge_func=func, keep=keep, scope="tensor"
    )
    assert merged(per_tensor, MODELS, BASE).tolist() == pytest.approx(expected)


def test_the_zero_sign_is_the_majority_s() -> None:
    models = [[1.0, -2, -3], [-1.0, -2, 3]]
    majority = TiesMergingAlgorithm(threshold=100)
    assert merged(majority, models, [0.0] * 3).tolist() == [-1, -2, -3]
    positive = TiesMergingAlgorithm(threshold=100, zero_sign="positive")
    assert merged(positive, models, [0.0] * 3).tolist() == [1, -2, 3]


def test_scaling_factor() -> None:
    method = TiesMergingAlgorithm(scaling_factor=0.5, threshold=1)
    assert merged(method, [[2.0, 4]], [1.0, 0]).tolist() == [1.5, 2]


def reference(
    models: Sequence[Sequence[float]], share: float, func: str, keep: str
) -> np.ndarray[Any, Any]:
    """Return the merged task vector, straight from the paper, in float64."""
    tau = np.array(models, np.float64)
    count = tau.shape[1] * round(share * 100) // 100
    trimmed = np.zeros_like(tau)
    for row, out in zip(tau, trimmed, strict=True):
        if keep == "exact_topk":
            kept = np.argsort(-np.abs(row), kind="stable")[:count]
        else:
            limit = np.sort(np.abs(row))[::-1][min(count, len(row) - 1)]
            kept = np.flatnonzero(np.abs(row) >= limit)
        out[kept] = row[kept]
    signs = np.sign(trimmed.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agree = (np.sign(trimmed) == signs) & (trimmed != 0)
    merged_sum = (trimmed * agree).sum(axis=0)
    if func == "mean":
        return np.asarray(merged_sum / np.maximum(agree.sum(axis=0), 1))
    if func == "max":
        return np.asarray(signs * np.abs(trimmed * agree).max(axis=0))
    return np.asarray(merged_sum)


@settings(deadline=None, max_examples=examples(60))
@given(
    # Quarters add up without rounding, and are often equal.
    models=st.integers(2, 5).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=size, max_size=size),
            min_size=1,
            max_size=4,
        )
    ),
    percent=st.integers(2, 100),
    func=st.sampled_from(["sum", "mean", "max"]),
    keep=st.sampled_from(["exact_topk", "ge_kth"]),
)
def test_against_the_formula(models: list[list[float]], percent: int, func: Any, keep: Any) -> None:
    base = [0.0] * len(models[0])
    for scope in ("model", "tensor"):
        method = TiesMergingAlgorithm(1, percent, (), func, scope, keep)  # type: ignore[arg-type]
        found = merged(method, models, base)
        expected = reference(models, percent / 100, func, keep)
        torch.testing.assert_close(found.double().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"merge_func.*Did you mean 'sum'"):
        TiesMergingAlgorithm(merge_func="summ")  # type: ignore[arg-type]


def test_pieces_that_need_the_majority_come_when_all_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the result is read, contested elements have the sign of most of the others."""
    looks: list[object] = []
    survey = Inputs.survey
    monkeypatch.setattr(Inputs, "survey", lambda *given: (looks.append(given), survey(*given)))
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(2**18 + 5, generator=generator) - 0.1
    other = change.clone()
    other[::1000] *= -1  # contested
    states = {"_pretrained_": torch.zeros_like(change), "a": change, "b": other}
    pool = Pool({name: TensorWeights({"w": value}) for name, value in states.items()})
    expected = change.clone()
    expected[::1000] = torch.where(change < 0, change, other)[::1000]
    read: Any = [TiesMergingAlgorithm(threshold=100).fuse(pool) for _ in range(3)]
    torch.testing.assert_close(in_memory(read[0])["w"], expected)
    torch.testing.assert_close(in_memory(Renamed(read[1], {"v": "w"}))["v"], expected)
    assert not looks
    torch.testing.assert_close(read[2]["w"], expected)
    assert len(looks) == 1  # nothing was counted, for a whole entry was read at once
