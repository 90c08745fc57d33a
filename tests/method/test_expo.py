import pytest
from fixtures_method import merged

from fusion_bench.method import ExPOAlgorithm


def test_by_hand() -> None:
    assert merged(ExPOAlgorithm(0.1), [[2.0]], base=[1.0]).item() == pytest.approx(2.1)


@pytest.mark.parametrize(("factor", "expected"), [(0, 2.5), (-1, 0.3)])
def test_the_ends(factor: float, expected: float) -> None:
    result = merged(ExPOAlgorithm(factor), [[2.5]], base=[0.3])
    assert result.item() == pytest.approx(expected)


def test_several_models_are_averaged_first() -> None:
    assert merged(ExPOAlgorithm(1), [[2.0], [4.0]], base=[1.0]).item() == 5
