from dataclasses import dataclass

from fusion_bench.arguments import arguments_of, keeps_arguments
from fusion_bench.method import TensorwiseAlgorithm


class Kept:
    @keeps_arguments
    def __init__(self, first: object, *, second: object = None):
        self.changed = (first, second)


class Inherits(Kept):
    pass


class Wider(Kept):
    @keeps_arguments
    def __init__(self, third: int):
        super().__init__("first")


class Silent(Kept):
    def __init__(self, fourth: int):
        super().__init__(fourth)


@dataclass
class Data:
    number: int = 1


class Beside(Data):
    def __init__(self, other: int):
        super().__init__(other)


def test_arguments_as_they_were_given() -> None:
    values = [1, {"a": (2,)}]
    made = Kept(values, second="x")
    values.append(3)
    assert arguments_of(made) == {"first": [1, {"a": [2]}], "second": "x"}
    assert arguments_of(Kept(first=1)) == {"first": 1}
    assert arguments_of(Inherits(1)) == {"first": 1}


def test_of_a_subclass_its_own() -> None:
    assert arguments_of(Wider(3)) == {"third": 3}
    assert arguments_of(Silent(4)) is None  # those of its base would not make it again


def test_a_dataclass_has_them_as_fields() -> None:
    assert arguments_of(Data(2)) == {"number": 2}
    assert arguments_of(Beside(2)) is None


def test_of_others() -> None:
    class Plain:
        pass

    class Own(TensorwiseAlgorithm):
        def __init__(self, factor: float):
            super().__init__(show_pbar=False)

    assert arguments_of(Plain()) == {}
    assert arguments_of(Own(0.5)) is None
