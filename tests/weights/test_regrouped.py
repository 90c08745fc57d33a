"""Weights in another layout are read from the ranges that they consist of."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusion_bench.weights import (
    Arrangement,
    Regrouped,
    Run,
    TensorSpec,
    TensorWeights,
    Weights,
    in_memory,
    rearranged,
    stream,
)


class Counting(TensorWeights):
    """Weights that remember what was read of them."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors, (Path("a.safetensors"),))
        self.asked: list[tuple[str, int, int]] = []

    def __getitem__(self, key: str) -> Tensor:
        raise AssertionError(f"'{key}' was read as a whole")

    def read(self, key: str, start: int, stop: int) -> Tensor:
        self.asked.append((key, start, stop))
        return super().read(key, start, stop)


def experts(count: int = 3) -> dict[str, Tensor]:
    numbers = torch.arange(count * 2 * 8.0).view(count, 2, 2, 4)
    return {f"{e}.{n}": numbers[e, i] for e in range(count) for i, n in enumerate("gu")}


def fused(count: int = 3) -> Arrangement:
    """Return [count, 4, 4]: of each expert the gate's rows, then the up projection's."""
    runs = (Run(f"{expert}.{name}", 0, 8) for expert in range(count) for name in "gu")
    return Arrangement.of((count, 4, 4), runs)


def test_ranges_are_joined_and_cut() -> None:
    entry = Arrangement.of((10,), [Run("a", 0, 2), Run("a", 2, 5), Run("b", 7, 10), Run("a", 0, 2)])
    assert entry.runs == (Run("a", 0, 5), Run("b", 7, 10), Run("a", 0, 2))
    assert list(entry.cut(0, 10)) == list(entry.runs)
    assert list(entry.cut(4, 9)) == [Run("a", 4, 5), Run("b", 7, 10), Run("a", 0, 1)]
    assert list(entry.cut(6, 7)) == [Run("b", 8, 9)]
    assert list(entry.cut(3, 3)) == []


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_an_entry_is_read_piece_by_piece(size: int) -> None:
    stored = Counting(experts())
    weights = Regrouped(stored, {"x": fused()})
    assert weights.spec("x") == TensorSpec((3, 4, 4), torch.float32)
    pieces: dict[int, Tensor] = {}
    stream(weights, lambda key, start, values: pieces.setdefault(start, values.clone()), size)
    assert torch.equal(torch.cat([pieces[start] for start in sorted(pieces)]), torch.arange(48.0))
    assert max(stop - start for _, start, stop in stored.asked) <= min(size, 8)
    assert sum(stop - start for _, start, stop in stored.asked) == 48


def test_and_back_again() -> None:
    stored = experts()
    together = in_memory(Regrouped(TensorWeights(stored), {"x": fused()}))
    weights = TensorWeights(together)
    specs = {key: TensorSpec((2, 4), torch.float32) for key in stored}
    entries = rearranged({"x": fused()}, {"x": Arrangement.whole("x", (3, 4, 4))}, specs)
    assert list(entries) == list(stored) and all(len(e.runs) == 1 for e in entries.values())
    apart = in_memory(Regrouped(weights, entries))
    assert all(torch.equal(apart[key], stored[key]) for key in stored)


def test_what_is_not_known_in_full_is_left_out() -> None:
    specs = {"0.g": TensorSpec((2, 4), torch.float32), "0.u": TensorSpec((3, 4), torch.float32)}
    own = {"x": Arrangement.whole("x", (1, 4, 4)), "y": Arrangement.whole("y", (1,))}
    assert list(rearranged({"x": fused(1)}, own, specs)) == ["0.g"]
    assert rearranged({"x": fused(1)}, {"x": Arrangement.whole("x", (4, 4))}, specs) == {}
    assert rearranged({"x": fused(1)}, {}, specs) == {}


def test_what_is_asked_about_an_entry() -> None:
    stored = Counting(experts())
    halves = {"x": fused(), "h": Arrangement((8,), (Run("0.g", 4, 8), Run("2.u", 0, 4)))}
    weights: Weights = Regrouped(stored, halves)
    assert weights.files == (Path("a.safetensors"),) and weights.in_pieces
    assert weights.bytes_to_read("x") == 48 * 4 and weights.bytes_to_read("h") == 8 * 4
    origins = weights.origins("h")
    assert [(each.weights, each.key) for each in origins] == [(stored, "0.g"), (stored, "2.u")]
    assert "0.g" not in weights and list(weights) == ["x", "h"]


def test_entries_of_the_same_elements_are_tied() -> None:
    one = torch.ones(2, 2)
    stored = TensorWeights({"a": one, "b": one, "c": torch.ones(2, 2)})
    names = {f"new {key}": Arrangement.whole(key, (2, 2)) for key in "abc"}
    weights = Regrouped(stored, names)
    assert [weights.tied_to(key) for key in weights] == ["new a", "new a", "new c"]
    assert weights["new a"] is one


def test_the_widest_type_of_the_parts() -> None:
    stored = TensorWeights({"a": torch.ones(2).bfloat16(), "b": torch.full((2,), 1 / 3)})
    weights = Regrouped(stored, {"x": Arrangement((4,), (Run("a", 0, 2), Run("b", 0, 2)))})
    assert weights.spec("x").dtype == torch.float32
    assert torch.equal(weights["x"], torch.tensor([1, 1, 1 / 3, 1 / 3]))


def test_errors_found_while_reading_are_passed_on() -> None:
    class Broken(TensorWeights):
        def verify(self) -> None:
            raise RuntimeError("broken")

        def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
            raise NotImplementedError

    weights = Regrouped(Broken(experts()), {"x": fused()})
    with pytest.raises(RuntimeError, match="broken"):
        in_memory(weights)
