import threading
from collections.abc import Iterator

import pytest
import torch
from fixtures_weights import all_bits, total, weights
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.progress import step
from fusion_bench.weights import Cost, TensorWeights, in_memory, into_module, merge, stream
from fusion_bench.weights.stream import bytes_to_read


def consumed(source: TensorWeights, piece: int) -> list[tuple[str, int, list[float]]]:
    seen: list[tuple[str, int, list[float]]] = []
    stream(source, lambda key, start, values: seen.append((key, start, values.tolist())), piece)
    return sorted(seen)


def test_entries_come_in_flat_pieces() -> None:
    source = weights(a=torch.arange(5.0), b=torch.tensor(7.0), c=torch.empty(0, 3))
    assert consumed(source, 2) == [("a", 0, [0, 1]), ("a", 2, [2, 3]), ("a", 4, [4]), ("b", 0, [7])]


def test_tied_entries_come_once() -> None:
    shared = torch.ones(1)
    assert consumed(TensorWeights({"b": shared, "a": shared}), 9) == [("b", 0, [1])]


def test_pieces_are_taken_in_the_order_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    keys: list[str] = []
    stream(weights(z=[1, 2], a=[1, 2], m=[1]), lambda key, start, values: keys.append(key), 1)
    assert keys == ["z", "z", "a", "a", "m"]


@pytest.mark.parametrize(
    ("in_pieces", "bytes_each", "threads"), [(True, 2**40, 2), (False, 2**28, 2), (False, 2**29, 1)]
)
def test_what_cannot_be_cut_has_as_many_threads_as_have_room(
    in_pieces: bool, bytes_each: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.get_num_threads() != 2:
        pytest.skip("torch has not two threads")
    both = threading.Barrier(threads)
    seen = set()

    def consume(key: str, start: int, values: Tensor) -> None:
        both.wait(10)
        seen.add((threading.current_thread().name, torch.get_num_threads()))

    source = weights(a=[1.0, 2.0])
    source.in_pieces = in_pieces
    monkeypatch.setattr(source, "cost", lambda key: Cost(8, bytes_each))
    stream(source, consume, 1)
    assert {count for _, count in seen} == {2 // threads}
    assert len(seen) == threads
    assert torch.get_num_threads() == 2


def test_no_gradient_is_followed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    merged = merge({"m": TensorWeights({"w": parameter}), "n": weights(w=[1.0, 1.0])}, total)
    stream(merged, lambda key, start, values: None)
    assert not in_memory(merged)["w"].requires_grad


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_consumers_exception_surfaces_as_itself(error: type[BaseException]) -> None:
    def fail(key: str, start: int, values: Tensor) -> None:
        raise error("boom")

    with pytest.raises(error, match="boom"):
        stream(weights(a=torch.ones(100)), fail, 1)


def test_work_ends_soon_after_a_failure() -> None:
    calls = []

    def fail(key: str, start: int, values: Tensor) -> None:
        calls.append(start)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream(weights(a=torch.ones(1000)), fail, 1)
    assert len(calls) <= torch.get_num_threads()


def test_weights_that_cannot_be_cut_as_they_say_are_no_silent_success() -> None:
    class Odd(TensorWeights):
        def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
            yield 0, 1
            raise LookupError("odd")

    with pytest.raises(LookupError, match="odd"):
        in_memory(Odd({"a": torch.ones(3)}))
    with pytest.raises(ValueError):
        stream(weights(a=[1.0]), lambda *piece: None, 0)


def test_what_was_noticed_is_said_at_the_end() -> None:
    class Doubtful(TensorWeights):
        def verify(self) -> None:
            raise FusionBenchError("doubtful")

    seen: list[str] = []
    with pytest.raises(FusionBenchError, match="doubtful"):
        stream(Doubtful({"a": torch.ones(1)}), lambda key, start, values: seen.append(key))
    assert seen == ["a"]


def test_progress_counts_the_bytes_and_does_not_change_the_result() -> None:
    model = weights(a=torch.rand(9), b=torch.empty(0), c=1)
    shown = merge({"m": model, "n": model}, total, elementwise=True, show_progress=True)
    with step("fusing", 200, "B") as work:
        result = in_memory(shown)
        assert work.done == sum(bytes_to_read(shown).values()) == 2 * 9 * 4 + 8
    assert all_bits(result) == all_bits(merge({"m": model, "n": model}, total))


def test_a_copy_in_memory_is_its_own() -> None:
    source = weights(a=[1.0, 2.0], b=3)
    copied = in_memory(source)
    copied["a"].zero_()
    assert list(copied) == ["a", "b"] and source["a"].tolist() == [1, 2]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_a_module_on_the_meta_device_is_filled() -> None:
    source = Tied()
    with torch.device("meta"):
        empty = Tied()
    module = into_module(TensorWeights(source.state_dict()), empty)
    assert module is empty
    assert all_bits(module.state_dict()) == all_bits(source.state_dict())
    assert empty.head.weight.data_ptr() == empty.embed.weight.data_ptr()
    assert empty.embed.weight.requires_grad
    assert empty.embed.weight.data_ptr() != source.embed.weight.data_ptr()


def test_a_module_of_other_keys_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="weight"):
        into_module(weights(a=1.0), nn.Linear(1, 1))
