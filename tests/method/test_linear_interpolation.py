import pytest
from fixtures_method import merged

from fusion_bench.method import LinearInterpolationAlgorithm
from fusion_bench.problems import FusionBenchError

ENDS = [[0.1, 0.7], [0.3, -5.3]]


@pytest.mark.parametrize("t", [0, 1])
def test_the_ends_are_exact(t: int) -> None:
    models = merged(LinearInterpolationAlgorithm(t), ENDS)
    assert models.tolist() == merged(LinearInterpolationAlgorithm(0), [ENDS[t]] * 2).tolist()


def test_a_quarter_of_the_way() -> None:
    assert merged(LinearInterpolationAlgorithm(0.25), [[0.0], [4.0]]).tolist() == [1]


def test_the_pretrained_model_is_the_start() -> None:
    assert merged(LinearInterpolationAlgorithm(0.25), [[4.0]], base=[8.0]).tolist() == [7]


def test_only_two_models_and_a_t_between_them() -> None:
    with pytest.raises(FusionBenchError, match="there are 3: _pretrained_, a, b"):
        merged(LinearInterpolationAlgorithm(), [[0.0], [4.0]], base=[1.0])
    with pytest.raises(FusionBenchError, match="not between 0 and 1"):
        LinearInterpolationAlgorithm(1.5)
