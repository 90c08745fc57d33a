import pytest
import torch
from fixtures_method import merged

from fusion_bench.method import MultiSlerpAlgorithm
from fusion_bench.problems import FusionBenchError


def test_equal_models_give_themselves() -> None:
    model = [0.3, -2.0, 5.0]
    assert merged(MultiSlerpAlgorithm(), [model] * 3).tolist() == pytest.approx(model)


def test_an_orthogonal_pair_meets_in_the_middle() -> None:
    half = 2**-0.5
    result = merged(MultiSlerpAlgorithm(), [[1.0, 0.0], [0.0, 1.0]])
    assert result.tolist() == pytest.approx([half, half])


def test_the_length_is_the_weighted_mean_of_the_lengths() -> None:
    result = merged(MultiSlerpAlgorithm([3, 1]), [[1.0, 0.0], [0.0, 5.0]])
    assert float(result.norm()) == pytest.approx(2)


def test_with_a_pretrained_model_the_task_vectors_are_merged() -> None:
    models = [[1.0, 0.0], [0.0, 1.0]]
    shifted = [[2.0, -1.0], [1.0, 0.0]]
    plain = merged(MultiSlerpAlgorithm(), models)
    assert merged(MultiSlerpAlgorithm(), shifted, [1.0, -1.0]).tolist() == pytest.approx(
        (plain + torch.tensor([1.0, -1.0])).tolist()
    )


def test_no_change_at_all_is_no_nan() -> None:
    assert merged(MultiSlerpAlgorithm(), [[1.0, 2.0]] * 2, [1.0, 2.0]).tolist() == [1, 2]


def test_opposite_directions() -> None:
    assert merged(MultiSlerpAlgorithm(), [[2.0], [-1.0]]).tolist() == [0.5]
    with pytest.raises(FusionBenchError, match="cancel out in 'weight'"):
        merged(MultiSlerpAlgorithm([1, 1, 2]), [[2.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    assert merged(MultiSlerpAlgorithm([1, 1, 2]), [[2.0], [2.0], [-1.0]]).tolist() == [0.5]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FusionBenchError, match="1 value for 2 models"):
        merged(MultiSlerpAlgorithm([1]), [[2.0], [-1.0]])
    with pytest.raises(FusionBenchError, match="sum to zero"):
        merged(MultiSlerpAlgorithm([1, -1]), [[2.0], [-1.0]])
