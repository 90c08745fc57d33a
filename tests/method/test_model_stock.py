import math

import pytest
from fixtures_method import merged

from fusion_bench.method import ModelStock
from fusion_bench.problems import FusionBenchError

ZERO = [0.0, 0.0]


def at(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def test_two_models_by_hand() -> None:
    assert merged(ModelStock(), at(0, 60), ZERO).tolist() == pytest.approx([0.5, 0.288675])


def test_three_models_by_hand() -> None:
    models = [[1.0, 1, 0], [1.0, 0, 1], [0.0, 1, 1]]  # cosines of one half
    mean = [2 / 3] * 3
    result = merged(ModelStock(), models, [0.0] * 3)
    assert result.tolist() == pytest.approx([0.75 * x for x in mean])


def test_identical_models_give_that_model_however_small_the_change() -> None:
    model = [1e-5, -2e-5]
    assert merged(ModelStock(), [model, model], ZERO).tolist() == pytest.approx(model)


def test_orthogonal_models_give_the_pretrained_one() -> None:
    result = merged(ModelStock(), [[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0])
    assert result.tolist() == [1, 1]


def test_no_change_at_all_is_no_nan() -> None:
    assert merged(ModelStock(), [[1.0, 2.0]] * 2, [1.0, 2.0]).tolist() == [1, 2]


def test_cosines_or_angles_are_averaged() -> None:
    models = at(0, 20, 90)
    cosines = [math.cos(math.radians(d)) for d in (20, 90, 70)]
    for average, cos in (
        ("cosine", sum(cosines) / 3),
        ("angle", math.cos(math.radians(60))),
    ):
        share = 3 * cos / (2 * cos + 1)
        expected = [share * sum(m[i] for m in models) / 3 for i in range(2)]
        assert merged(ModelStock(average=average), models, ZERO).tolist() == pytest.approx(expected)


def test_the_share_can_be_clamped() -> None:
    models = at(0, 170)
    assert float(merged(ModelStock(), models, ZERO).norm()) > 1
    assert merged(ModelStock(clamp=True), models, ZERO).tolist() == ZERO


def test_ignored_keys_are_averaged() -> None:
    assert merged(ModelStock(["weight"]), [[2.0], [4.0]], [0.0]).tolist() == [3]


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match="Did you mean 'angle'"):
        ModelStock(average="angel")
    with pytest.raises(FusionBenchError, match="at least two"):
        merged(ModelStock(), [[1.0]], [0.0])


def test_a_share_beyond_the_models_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    merged(ModelStock(), at(0, 170), ZERO)
    assert caplog.text.count("clamp=true") == 1
    caplog.clear()
    merged(ModelStock(), at(0, 60), ZERO)
    merged(ModelStock(clamp=True), at(0, 170), ZERO)
    assert not caplog.text


def test_a_single_number_is_averaged_plainly() -> None:
    assert merged(ModelStock(), [[1.0], [-1.5]], [0.0]).tolist() == [-0.25]
    assert merged(ModelStock(average="angle"), [[1.0], [-1.0], [2.0]], [0.0]).tolist() == [
        pytest.approx(2 / 3)
    ]
