import torch
from torch import nn

from fusion_bench.weights import TensorWeights, sha256


def digest(**tensors: torch.Tensor) -> str:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return sha256(TensorWeights(module.state_dict()))


def test_the_order_of_keys_and_the_layout_in_memory_do_not_matter() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(True)
    assert digest(a=a, b=b) == digest(b=b, a=a.T.contiguous().T)


def test_name_value_shape_and_dtype_matter() -> None:
    a = torch.arange(6.0)
    others = [
        digest(b=a),
        digest(a=a + 1e-6),
        digest(a=a.view(2, 3)),
        digest(a=a.bfloat16()),
        digest(a=-a.mul(0)),
    ]
    assert len({digest(a=a), *others}) == 6


def test_half_precision_and_scalars_have_one_too() -> None:
    assert len(digest(a=torch.tensor(1.0, dtype=torch.bfloat16))) == 64
