import torch
from torch import nn

from fusion_bench.weights import TensorSpec, TensorWeights


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
