import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.ahead import OneAhead
from fusion_bench.weights import TensorWeights, Weights


class Watched(TensorWeights):
    """Weights that note that they are read."""

    def __init__(self, name: str, read: list[str]):
        super().__init__({"w": torch.tensor([float(len(name))])})
        self._name, self._read = name, read
        self.done = threading.Event()

    def read(self, key: str, start: int, stop: int) -> Tensor:
        self._read.append(self._name)
        self.done.set()
        return super().read(key, start, stop)


@pytest.fixture
def read() -> Iterator[list[str]]:
    yield []


def test_the_next_is_computed_while_the_present_one_is_used(read: list[str]) -> None:
    merged = {name: Watched(name, read) for name in ("a", "bb", "ccc", "dddd")}
    with OneAhead(merged) as ready:
        assert list(ready) == list(merged) and len(ready) == 4
        assert read == []
        for number, (name, model) in enumerate(ready.items(), start=1):
            assert isinstance(model, Weights) and model is not merged[name]
            assert model["w"].item() == len(name)
            if number < 4:
                assert list(merged.values())[number].done.wait(10)
            assert read == list(merged)[: number + 1]
    assert threading.active_count() == 1 or "fuse" not in str(threading.enumerate())


def test_one_that_is_asked_for_out_of_turn_is_computed_then(read: list[str]) -> None:
    merged = {name: Watched(name, read) for name in ("a", "bb", "ccc")}
    with OneAhead(merged) as ready:
        model = ready["ccc"]
        assert isinstance(model, Weights) and model["w"].item() == 3
    assert read == ["ccc"]


def test_modules_stay_what_they_are() -> None:
    module = nn.Linear(1, 1)
    with OneAhead({"a": module}) as ready:
        assert ready["a"] is module


def test_what_fails_fails_in_its_turn(read: list[str]) -> None:
    class Damaged(Watched):
        def verify(self) -> None:
            raise FusionBenchError("damaged.")

    merged = {"a": Watched("a", read), "b": Damaged("b", read), "c": Watched("c", read)}
    seen = []
    with pytest.raises(FusionBenchError, match="damaged"), OneAhead(merged) as ready:
        for name in ready:
            _ = ready[name]
            seen.append(name)
    assert seen == ["a"]


def test_threads_of_the_evaluation_stay(read: list[str]) -> None:
    before = torch.get_num_threads()
    with OneAhead({name: Watched(name, read) for name in "ab"}) as ready:
        torch.set_num_threads(1)
        try:
            for _ in ready.values():
                assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)
