from typing import Any

import pytest
from fixtures_method import merged

from fusion_bench.method import WeightedAverageAlgorithm
from fusion_bench.problems import FusionBenchError


def test_weights_are_divided_by_their_sum() -> None:
    assert merged(WeightedAverageAlgorithm([1, 3]), [[0.0], [4.0]]).tolist() == [3]


def test_without_normalize_they_stand_as_they_are() -> None:
    assert merged(WeightedAverageAlgorithm([1, 1], normalize=False), [[0.0], [4.0]]).tolist() == [4]
    assert merged(WeightedAverageAlgorithm([2, -1], normalize=False), [[3.0], [4.0]]).item() == 2


def test_one_hot_weights_give_that_model() -> None:
    models = [[0.1, 0.7], [0.3, -5.3]]
    assert merged(WeightedAverageAlgorithm([0, 2]), models).tolist() == pytest.approx(models[1])


def test_weights_may_differ_by_key() -> None:
    method = WeightedAverageAlgorithm([1, 1], layer_weights={"w*": [0, 1], "*": [1, 0]})
    assert merged(method, [[0.0], [4.0]]).tolist() == [4]


def test_other_numbers_of_weights_are_refused() -> None:
    with pytest.raises(FusionBenchError, match=r"weights: 3 values for 2 models \(a, b\)"):
        merged(WeightedAverageAlgorithm([1, 1, 1]), [[0.0], [4.0]])
    with pytest.raises(FusionBenchError, match=r"layer_weights\.x: 1 value for 2 models"):
        merged(WeightedAverageAlgorithm([1, 1], layer_weights={"x": [1]}), [[0.0], [4.0]])


def test_weights_that_add_up_to_zero_are_refused() -> None:
    with pytest.raises(FusionBenchError, match="normalize=false"):
        merged(WeightedAverageAlgorithm([1, -1]), [[0.0], [4.0]])


def test_one_number_is_the_plain_average() -> None:
    assert merged(WeightedAverageAlgorithm(), [[0.0], [4.0]]).tolist() == [2]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    for pattern, near in (("x*", r"The nearest: weight\."), ("W*", r"Did you mean 'w\*'\?")):
        method = WeightedAverageAlgorithm(layer_weights={pattern: [1, 2]})
        message = rf"^layer_weights\.{pattern[0]}\*: '{pattern[0]}\*' matches no entry\. {near}"
        with pytest.raises(FusionBenchError, match=message):
            merged(method, [[0.0], [4.0]])


@pytest.mark.parametrize(
    ("layer_weights", "rule", "message"),
    [
        ({"w*": [1, 2]}, {"weights": [1, 1]}, r"^where\[1\]\.weights: 'layer_weights' decides"),
        (None, {"layer_weights": {"w*": [1, 2]}}, r"^where\[1\]\.layer_weights: .* 'match' and"),
    ],
)
def test_patterns_and_rules_do_not_mix(layer_weights: Any, rule: Any, message: str) -> None:
    where = [{"normalize": False}, rule]
    method = WeightedAverageAlgorithm(layer_weights=layer_weights, where=where)
    with pytest.raises(FusionBenchError, match=message):
        merged(method, [[0.0], [4.0]])
