import pytest
import torch
from torch import nn

from fusion_bench.weights import Stacked, TensorSpec, TensorWeights, Weights, is_special


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_it_is_the_state_dict_in_its_order() -> None:
    module = Tied()
    weights = TensorWeights(module.state_dict())
    assert list(weights) == list(module.state_dict())
    assert len(weights) == len(module.state_dict())
    assert weights["embed.weight"].data_ptr() == module.embed.weight.data_ptr()
    assert not weights["embed.weight"].requires_grad


def test_specs_tell_shape_and_dtype() -> None:
    weights = TensorWeights(Tied().state_dict())
    assert weights.spec("embed.weight") == TensorSpec((3, 2), torch.float32)
    assert weights.spec("norm.num_batches_tracked") == TensorSpec((), torch.int64)


def test_tied_entries_name_the_first() -> None:
    weights = TensorWeights(Tied().state_dict())
    assert weights.tied_to("head.weight") == "embed.weight"
    assert weights.tied_to("embed.weight") == "embed.weight"
    assert weights.tied_to("norm.weight") == "norm.weight"


def test_empty_tensors_are_not_tied_to_each_other() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.empty(0))
    module.register_buffer("b", torch.empty(0))
    assert TensorWeights(module.state_dict()).tied_to("b") == "b"


def test_another_view_of_the_same_memory_is_not_tied() -> None:
    square = torch.arange(4.0).view(2, 2)
    tensors = {"a": square, "b": square.T, "c": square.view(torch.int32), "d": square[:1]}
    weights = TensorWeights(tensors)
    assert [weights.tied_to(key) for key in weights] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 0, 3)])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_pieces_follow_each_other_and_make_the_whole(shape: tuple[int, ...], size: int) -> None:
    weights = TensorWeights({"a": torch.rand(shape)})
    numel = weights.spec("a").numel
    pieces = list(weights.pieces("a", size))
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(numel))
    assert all(stop - start <= size for start, stop in pieces)
    read = torch.cat([torch.empty(0), *(weights.read("a", *piece) for piece in pieces)])
    assert torch.equal(read, weights["a"].flatten())


def test_what_is_contiguous_is_read_without_a_copy() -> None:
    tensor = torch.rand(3, 4)
    assert TensorWeights({"a": tensor}).read("a", 4, 8).data_ptr() == tensor[1].data_ptr()


def test_what_is_not_contiguous_is_read_in_its_logical_order() -> None:
    tensor = torch.rand(3, 4).T
    read = TensorWeights({"a": tensor}).read("a", 2, 9)
    assert torch.equal(read, tensor.flatten()[2:9])


def test_bytes_count_elements_times_their_size() -> None:
    assert TensorSpec((2, 3), torch.bfloat16).nbytes == 12
    assert TensorSpec((), torch.int64).nbytes == 8
    assert TensorSpec((0, 3), torch.float32).nbytes == 0


@pytest.mark.parametrize(("name", "special"), [("_a", True), ("a_", True), ("a_b", False)])
def test_an_underscore_at_an_end_makes_a_name_special(name: str, special: bool) -> None:
    assert is_special(name) is special


class Pieces(Stacked):
    """Weights that take rows as any others do, by reading."""

    take = Weights.take


@pytest.mark.parametrize("width", [1, 3, 5000])
def test_rows_are_taken_in_any_order(width: int) -> None:
    table = torch.arange(7 * width, dtype=torch.float32).view(7, width)
    stored = TensorWeights({"a": table})
    for weights in (stored, Stacked({"a": (stored, "a")}), Pieces({"a": (stored, "a")})):
        for rows in ([], [3], [0, 1, 2], [6, 0, 0, 3], [5, 4, 3, 2, 1]):
            wanted = torch.tensor(rows, dtype=torch.int64)
            assert torch.equal(weights.take("a", wanted, width), table[wanted])
