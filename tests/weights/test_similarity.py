"""Norms and cosines of task vectors, against numbers by hand and a float64 reference."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusion_bench.weights import Inputs, MergePolicy, TensorWeights, align
from fusion_bench.weights.similarity import Part, similarity

State = dict[str, Tensor]


def parts_of(base: State, **models: State) -> dict[str, Part]:
    weights = {name: TensorWeights(state) for name, state in models.items()}
    aligned = align(weights, TensorWeights(base), MergePolicy(), None)
    return {part.name: part for part in similarity(Inputs(aligned, MergePolicy(), True, False))}


def test_by_hand() -> None:
    keys = ("embed.weight", "layers.0.w", "layers.1.w", "norm.weight")
    base = {key: torch.ones(2) for key in keys}
    one = {**base, "layers.0.w": torch.tensor([4.0, 5.0]), "norm.weight": torch.tensor([2.0, 1.0])}
    two = {**base, "layers.0.w": torch.tensor([5.0, 4.0]), "norm.weight": torch.tensor([1.0, 3.0])}
    found = parts_of(base, one=one, two=two)
    assert list(found) == ["all", "before the blocks", "block 0", "block 1", "after the blocks"]
    assert found["block 0"].norms == [5, 5]
    assert found["block 0"].cosines[0] == pytest.approx([1, 24 / 25])
    assert found["after the blocks"].norms == [1, 2]
    assert found["after the blocks"].cosines[0][1] == 0
    assert found["block 1"].norms == [0, 0] and found["block 1"].cosines == [[0, 0], [0, 0]]
    assert found["all"].norms == pytest.approx([26**0.5, 29**0.5])
    assert found["all"].cosines[1][0] == pytest.approx(24 / (26 * 29) ** 0.5)


def test_as_in_float64_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(300, 1000, generator=random) for i in range(2)}
    models = {
        name: {k: v + 1e-3 * torch.randn(v.shape, generator=random) for k, v in base.items()}
        for name in "abc"
    }
    found = parts_of(base, **models)["all"]
    vectors = torch.stack([torch.cat(list(_differences(m, base))) for m in models.values()])
    norms = vectors.norm(dim=1)
    assert found.norms == pytest.approx(norms.tolist(), rel=1e-12)
    cosines = vectors @ vectors.T / norms / norms[:, None]
    assert torch.tensor(found.cosines, dtype=torch.float64).allclose(cosines, atol=1e-12)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert parts_of(base, **models)["all"] == found
    finally:
        torch.set_num_threads(before)


def _differences(model: State, base: State) -> Iterator[Tensor]:
    for key, value in model.items():
        yield (value - base[key]).double().flatten()  # float32 is what the models have


def test_several_stacks_and_none() -> None:
    base = {"text.layers.0.w": torch.zeros(1), "vision.layers.0.w": torch.zeros(1)}
    assert list(parts_of(base, a=base)) == ["all", "text.layers.0", "vision.layers.0"]
    assert list(parts_of({"w": torch.zeros(1)}, a={"w": torch.ones(1)})) == [
        *("all", "outside of blocks")
    ]


def test_whole_numbers_take_no_part() -> None:
    base = {"w": torch.zeros(2), "ids": torch.arange(3)}
    found = parts_of(base, a={"w": torch.tensor([3.0, 4.0]), "ids": torch.arange(3) + 5})
    assert found["all"].norms == [5]
