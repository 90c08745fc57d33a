import hashlib
from pathlib import Path

import pytest
import torch
from fixtures_weights import FLOATS, OTHERS, total, weights, written
from torch import Tensor

from fusion_bench.weights import TensorWeights, digest, in_memory, merge, sha256


def of(**tensors: Tensor) -> str:
    return sha256(TensorWeights(tensors))


def test_the_order_of_keys_and_the_layout_in_memory_do_not_matter() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(True)
    assert of(a=a, b=b) == of(b=b, a=a.T.contiguous().T)


def test_name_value_shape_and_dtype_matter() -> None:
    a = torch.arange(6.0)
    others = [
        of(b=a),
        of(a=a + 1e-6),
        of(a=a.view(2, 3)),
        of(a=a.bfloat16()),
        of(a=-a.mul(0)),
        of(a=a, b=torch.empty(0)),
    ]
    assert len({of(a=a), *others}) == 7


@pytest.mark.parametrize("dtype", FLOATS + OTHERS)
def test_every_type_has_one(dtype: torch.dtype) -> None:
    assert len(of(a=torch.ones((), dtype=dtype), b=torch.ones(0, dtype=dtype))) == 64


def test_it_is_the_hash_of_one_line_an_entry() -> None:
    value = hashlib.sha256(bytes([0, 0, 0x80, 0x3F])).hexdigest()
    line = f"a (1,) torch.float32 {value}\n"
    assert of(a=torch.ones(1)) == hashlib.sha256(line.encode()).hexdigest()


def test_long_entries_are_hashed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.rand(5, 5)
    expected = of(a=a)
    monkeypatch.setattr(digest, "_CHUNK", 7)
    assert of(a=a) == expected


@pytest.mark.parametrize("elementwise", [True, False])
def test_weights_have_the_same_one_wherever_they_are(elementwise: bool, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=random).bfloat16() for _ in range(2))
    merged = merge({"m": weights(w=a), "n": weights(w=b)}, total, elementwise=elementwise)
    expected = sha256(TensorWeights(in_memory(merged)))
    assert sha256(merged) == expected
    assert sha256(written(merged, tmp_path / "out")) == expected
