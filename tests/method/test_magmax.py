from fixtures_method import merged

from fusion_bench.method import MagMaxAlgorithm


def test_by_hand() -> None:
    result = merged(MagMaxAlgorithm(1), [[1.0, -2.0], [-1.0, 1.5]], base=[0.0, 0.0])
    assert result.tolist() == [-1, -2]  # of equal magnitudes the later one counts


def test_the_change_is_scaled() -> None:
    assert merged(MagMaxAlgorithm(0.5), [[3.0], [2.0]], base=[1.0]).tolist() == [2]
