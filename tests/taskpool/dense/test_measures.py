"""Counts and errors of pixels, by hand and beside plain NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.results import SampleScores
from fusion_bench.results.metrics import (
    ABSOLUTE_RELATIVE_ERROR,
    MEAN_ANGLE,
    MEAN_IOU,
    PIXEL_ACCURACY,
    RMSE,
    WITHIN_11_25,
    Metric,
)
from fusion_bench.taskpool.dense.measures import angles, errors, overlaps, resized


def logits(classes: list[list[int]], count: int) -> Tensor:
    """Return logits whose greatest is that of each pixel's class."""
    return torch.nn.functional.one_hot(torch.tensor(classes), count).movedim(-1, 0).float()


def value(metric: Metric, rows: list[Tensor]) -> float:
    statistics = torch.stack(rows).double().numpy()
    return SampleScores(np.arange(len(rows)), {metric.name: statistics}).value(metric)


def test_overlaps_by_hand() -> None:
    predicted = logits([[0, 1, 1], [2, 2, 0]], 4)
    target = torch.tensor([[0, 1, 2], [2, 255, 1]])
    found, pixels = overlaps(predicted, target, 255)
    # Of 5 pixels that count 3 are right; class 3 is nowhere.
    assert found.tolist() == [1, 1, 1, 0, 2, 3, 2, 0]
    assert pixels.tolist() == [3, 5]
    assert found.dtype == pixels.dtype == torch.int64
    assert value(MEAN_IOU, [found]) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert value(PIXEL_ACCURACY, [pixels]) == 3 / 5


def test_without_an_ignored_class_all_pixels_count() -> None:
    found, pixels = overlaps(logits([[0, 1]], 2), torch.tensor([[0, 0]]), None)
    assert found.tolist() == [1, 0, 2, 1]
    assert pixels.tolist() == [1, 2]


def test_a_sample_without_an_answer_says_nothing() -> None:
    found, pixels = overlaps(logits([[0, 1]], 2), torch.tensor([[255, 255]]), 255)
    assert found.tolist() == [0, 0, 0, 0]
    assert pixels.tolist() == [0, 0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 4))
def test_mean_iou_is_that_of_one_large_confusion_matrix(seed: int, classes: int, n: int) -> None:
    random = np.random.default_rng(seed)
    targets = random.choice([*range(classes - 1), 255], size=(n, 5, 7))  # the last one is absent
    outputs = random.normal(size=(n, classes, 5, 7))
    found = [
        overlaps(torch.from_numpy(one), torch.from_numpy(two), 255)
        for one, two in zip(outputs, targets, strict=True)
    ]
    matrix = np.zeros((classes, classes))
    for true, said in zip(targets.ravel(), outputs.argmax(axis=1).ravel(), strict=True):
        if true != 255:
            matrix[true, said] += 1
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    there = union > 0
    if there.any():
        expected = (np.diag(matrix)[there] / union[there]).mean()
        assert value(MEAN_IOU, [own for own, _ in found]) == pytest.approx(expected, abs=1e-12)
        right = np.trace(matrix) / matrix.sum()
        assert value(PIXEL_ACCURACY, [own for _, own in found]) == pytest.approx(right, abs=1e-12)


def test_errors_by_hand() -> None:
    target = torch.tensor([[2.0, 4.0], [0.0, float("nan")]], dtype=torch.float64)
    squared, relative = errors(torch.tensor([[1.0, 6.0], [100.0, 100.0]]), target)
    assert squared.tolist() == [1 + 4, 2]
    assert relative.tolist() == [1 / 2 + 2 / 4, 2]
    assert value(RMSE, [squared]) == np.sqrt(2.5)
    assert value(ABSOLUTE_RELATIVE_ERROR, [relative]) == 0.5


@pytest.mark.parametrize("unknown", [0.0, -1.0, float("inf"), float("nan")])
def test_where_nothing_is_known_no_error_counts(unknown: float) -> None:
    target = torch.full((2, 3), unknown, dtype=torch.float64)
    squared, relative = errors(torch.ones(2, 3), target)
    assert squared.tolist() == relative.tolist() == [0, 0]


@given(st.integers(0, 2**32 - 1))
def test_errors_are_those_of_numpy(seed: int) -> None:
    random = np.random.default_rng(seed)
    found = random.normal(2, 1, size=(3, 6, 5)).astype(np.float32)
    target = np.where(random.random((3, 6, 5)) < 0.3, 0, random.uniform(0.1, 9, size=(3, 6, 5)))
    rows = [
        errors(torch.from_numpy(one), torch.from_numpy(two))
        for one, two in zip(found, target, strict=True)
    ]
    known = target > 0
    off = found.astype(np.float64)[known] - target[known]
    assert value(RMSE, [own for own, _ in rows]) == pytest.approx(np.sqrt((off**2).mean()))
    relative = (np.abs(off) / target[known]).mean()
    assert value(ABSOLUTE_RELATIVE_ERROR, [own for _, own in rows]) == pytest.approx(relative)


def test_a_sum_of_many_pixels_loses_nothing() -> None:
    target = torch.full((1000, 1000), 10.0, dtype=torch.float64)
    found = target.float() + 2.0**-10
    squared, _ = errors(found, target)
    assert squared[0].item() == 1_000_000 * 2.0**-20  # in float32 it would not be


def test_angles_by_hand() -> None:
    right, up, down = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0)
    target = torch.tensor([right, up, up, right, (0, 0, 0)], dtype=torch.float64).T[:, None]
    found = torch.tensor([(5.0, 0, 0), (1, 1, 0), down, (0, 0, 0), right]).T[:, None]
    sums, near = angles(found, target)
    assert sums.tolist() == pytest.approx([0 + 45 + 180 + 90, 4])
    assert near.tolist() == [1, 4]
    assert value(MEAN_ANGLE, [sums]) == pytest.approx(315 / 4)
    assert value(WITHIN_11_25, [near]) == 0.25


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 11.24, 11.26, 90.0, 179.999999])
def test_angles_are_exact(degrees: float) -> None:
    turn = np.deg2rad(degrees)
    target = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).view(3, 1, 1)
    found = torch.tensor([np.cos(turn), np.sin(turn), 0.0]).view(3, 1, 1) * 7
    sums, near = angles(found, target)
    assert sums[0].item() == pytest.approx(degrees, rel=1e-6, abs=1e-12)
    assert near[0].item() == (degrees < 11.25)


@given(st.integers(0, 2**32 - 1))
def test_angles_are_those_of_the_arc_cosine(seed: int) -> None:
    random = np.random.default_rng(seed)
    found, target = random.normal(size=(2, 3, 4, 5))
    lengths = np.linalg.norm(found, axis=0) * np.linalg.norm(target, axis=0)
    expected = np.degrees(np.arccos(np.clip((found * target).sum(axis=0) / lengths, -1, 1)))
    sums, near = angles(torch.from_numpy(found), torch.from_numpy(target))
    assert sums.tolist() == pytest.approx([expected.sum(), 20])
    assert near[0] == (expected < 11.25).sum()


def test_a_value_that_is_none_shows() -> None:
    found = torch.full((3, 1, 1), float("nan"))
    assert angles(found, torch.ones(3, 1, 1, dtype=torch.float64))[0].isnan().any()
    squared, _ = errors(found[0], torch.ones(1, 1, dtype=torch.float64))
    assert squared[0].isnan()


def test_predictions_are_resized_to_their_targets() -> None:
    found = torch.tensor([[[0.0, 1.0]]])
    assert resized(found, torch.zeros(1, 2)) is found
    assert resized(found, torch.zeros(1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    assert resized(found, torch.zeros(3, 1, 4)).shape == (1, 1, 4)
