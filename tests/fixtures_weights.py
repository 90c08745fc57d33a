"""Small weights of all kinds, and the plain formulas that merging them must agree with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.method.checks import bits
from fusion_bench.weights import (
    Inputs,
    MergePolicy,
    TensorWeights,
    Weights,
    align,
    open_checkpoint,
    write_checkpoint,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
METHODS = {"average": SimpleAverageAlgorithm(), "arithmetic": TaskArithmeticAlgorithm(0.3)}


def total(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def first(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return tensors[0]


def weights(**tensors: Any) -> TensorWeights:
    return TensorWeights({key: torch.as_tensor(value) for key, value in tensors.items()})


def all_bits(tensors: Any) -> dict[str, tuple[torch.Size, torch.dtype, bytes]]:
    return {key: bits(tensors[key]) for key in tensors}


def open_directory(directory: Path) -> TensorWeights:
    index = directory / "model.safetensors.index.json"
    return open_checkpoint(index if index.exists() else directory / "model.safetensors")


def written(tensors: Weights, directory: Path, **options: Any) -> TensorWeights:
    directory.mkdir()
    write_checkpoint(tensors, directory, **options)
    return open_directory(directory)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(9).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@st.composite
def families(draw: st.DrawFn) -> dict[str, dict[str, Tensor]]:
    """``_pretrained_`` and some models, with the same keys in an order of their own."""
    keys = draw(st.permutations(["a", "b.weight", "b.bias", "ü", "z.9"]))[: draw(st.integers(1, 5))]
    specs = {
        key: (
            draw(st.lists(st.integers(0, 6), max_size=4)),
            draw(st.sampled_from(FLOATS * 2 + OTHERS)),
        )
        for key in keys
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return {
        name: {key: random_tensor(*specs[key], generator) for key in draw(st.permutations(keys))}
        for name in ["_pretrained_", "x", "y", "w"][: draw(st.integers(2, 4))]
    }


def oracle(method: str, tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Return the method's formula in float64."""
    stack = torch.stack([tensor.double() for tensor in tensors])
    if method == "average":
        return stack.sum(0) / len(tensors)
    return base.double() + 0.3 * (stack - base.double()).sum(0)


def tolerance(expected: Tensor, tensors: Sequence[Tensor], stored: torch.dtype) -> Tensor:
    """Return the error of a few operations in the working type and of one rounding."""
    working = torch.finfo(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    size = torch.stack([tensor.double().abs() for tensor in tensors]).sum(0)
    one = torch.finfo(stored)
    rounding = one.eps / 2 * expected.abs() * (1 + one.eps) + one.tiny * one.eps
    return rounding + 4 * len(tensors) * working.eps * size


class Cut(Inputs):
    """Models that are read in pieces of ``piece`` elements at most; they count their readings."""

    piece = 2**18
    surveys = 0

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        return super().pieces(key, min(size, self.piece))

    def survey(self, *arguments: Any) -> None:
        self.surveys += arguments[1:] in [(), (1,)]  # samples do not count
        super().survey(*arguments)


def opened(
    *models: dict[str, Tensor], piece: int = 2**18, whole: bool = False, in_threads: bool = False
) -> Cut:
    named = {f"model{i}": TensorWeights(state) for i, state in enumerate(models)}
    aligned = align(named, policy=MergePolicy(on_dtype="cast"))
    inputs = Cut(aligned, MergePolicy(), not whole, in_threads)
    inputs.piece = piece
    return inputs


def themselves(
    key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Iterator[Tensor]:
    yield from tensors


def noise(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator, dtype=torch.float64).exp().to(dtype)
