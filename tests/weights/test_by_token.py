"""Rows by token, against rows put together by hand in float64."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion_bench.weights import (
    ByToken,
    Row,
    Stacked,
    TensorWeights,
    Weights,
    in_memory,
    sha256,
    token_axis,
)
from fusion_bench.weights.mapping import TensorSpec

EMBEDDING, HEAD, BIAS, NORM = "embed.weight", "head.weight", "head.bias", "norm.weight"
KEYS = (EMBEDDING, HEAD, BIAS)


class Counting(Stacked):
    """Weights that note how many elements were read at once."""

    take = Weights.take

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__({key: (TensorWeights(tensors), key) for key in tensors})
        self.reads: list[tuple[str, int]] = []

    def __getitem__(self, key: str) -> Tensor:
        self.reads.append((key, self.spec(key).numel))
        return super().__getitem__(key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        self.reads.append((key, stop - start))
        return super().read(key, start, stop)


def model(
    tokens: int,
    seed: int,
    width: int = 3,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    embedding = draw(tokens, width)
    head = embedding if tied else draw(tokens, width)
    # A norm with as many elements as there are tokens is no entry by token.
    return {EMBEDDING: embedding, NORM: draw(tokens), HEAD: head, BIAS: draw(1, tokens)}


def by_hand(own: Tensor, rows: list[list[Tensor] | int | None]) -> Tensor:
    """Return a table: own rows by number, means of others, and the mean of all for None."""
    table = [
        own[row].double()
        if isinstance(row, int)
        else sum((other.double() for other in row), torch.zeros(own.shape[1]).double())
        / max(len(row), 1)
        for row in rows
        if row is not None
    ]
    known = iter(table)
    mean = torch.stack(table).mean(0)
    return torch.stack([mean if row is None else next(known) for row in rows])


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_each_kind_of_row_against_a_table_by_hand(dtype: torch.dtype) -> None:
    a, b, c = model(5, 0, dtype=dtype), model(4, 1), model(6, 2)
    donors = TensorWeights(b), TensorWeights(c)
    rows = np.array([4, 0, -1, -1, -1, 2, -1, -1])
    fill = {
        2: (Row(donors[0], 3),),
        3: (Row(donors[0], 1), Row(donors[1], 5)),
        4: (),
        6: (Row(donors[1], 0),),
    }
    weights = ByToken(TensorWeights(a), rows, fill, KEYS)
    for key in KEYS:
        flat = {
            n: own[key].view(own[key].numel() // 3 if key != BIAS else -1, 3 if key != BIAS else 1)
            for n, own in zip("abc", (a, b, c), strict=True)
        }
        expected = by_hand(
            flat["a"],
            [4, 0, [flat["b"][3]], [flat["b"][1], flat["c"][5]], [], 2, [flat["c"][0]], None],
        )
        got = weights[key]
        assert got.dtype == dtype
        assert weights.spec(key) == TensorSpec(tuple(got.shape), dtype)
        assert got.shape == ((1, 8) if key == BIAS else (8, 3))
        error = (got.double().view_as(expected) - expected).abs().max()
        assert error <= (4e-3 if dtype == torch.bfloat16 else 1e-6) * 4
        exact = [0, 1, 5]
        assert torch.equal(got.view(expected.shape)[exact], flat["a"][[4, 0, 2]])
    assert torch.equal(weights[NORM], a[NORM])
    assert list(weights) == list(a)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 24, 100])
def test_pieces_are_the_whole(size: int) -> None:
    a, b = model(5, 0), model(4, 1)
    rows = np.array([4, -1, 0, -1, 2, 1, -1])
    weights = ByToken(TensorWeights(a), rows, {1: (Row(TensorWeights(b), 2),), 3: ()}, KEYS)
    for key in weights:
        pieces = [weights.read(key, *piece) for piece in weights.pieces(key, size)]
        assert torch.equal(torch.cat([p.float() for p in pieces]), weights[key].reshape(-1))
    # Elements from anywhere, not only whole rows.
    flat = weights[HEAD].reshape(-1)
    for start in range(len(flat)):
        for stop in range(start, len(flat) + 1):
            assert torch.equal(weights.read(HEAD, start, stop).float(), flat[start:stop])
    assert torch.equal(in_memory(weights)[HEAD], weights[HEAD])
    assert sha256(weights) == sha256(TensorWeights(in_memory(weights)))


def test_a_large_table_is_read_in_pieces_and_its_rows_together() -> None:
    tokens, width = 8000, 64
    own = Counting({EMBEDDING: torch.randn(tokens, width)})
    rows = np.arange(tokens)
    rows[1000:1010] = rows[1000:1010][::-1]
    weights = ByToken(own, np.append(rows, -1), {}, [EMBEDDING])
    piece = 64 * width
    reads = []
    for start, stop in weights.pieces(EMBEDDING, piece):
        assert len(weights.read(EMBEDDING, start, stop)) <= piece
        reads.append(len(own.reads))
    assert max(size for _, size in own.reads) <= max(piece, 2**18)
    assert reads[40] == 41  # a read a piece, though some rows are in another order
    assert not any(size == tokens * width for _, size in own.reads)


def test_rows_far_apart_are_read_apart() -> None:
    own = Counting({EMBEDDING: torch.randn(10_000, 64)})
    rows = np.array([9_000, 3, 9_001, 5])
    weights = ByToken(own, rows, {}, [EMBEDDING])
    got = weights.read(EMBEDDING, 0, 4 * 64)
    assert sum(size for _, size in own.reads) < 100 * 64
    assert torch.equal(got.view(4, 64), own[EMBEDDING][rows])


def test_what_is_tied_stays_tied() -> None:
    tied, untied = model(5, 0, tied=True), model(4, 1)
    donor = TensorWeights(untied)
    weights = ByToken(TensorWeights(tied), np.array([0, -1]), {1: (Row(donor, 2),)}, KEYS)
    assert weights.tied_to(HEAD) == EMBEDDING
    merged = in_memory(weights)
    assert merged[HEAD] is merged[EMBEDDING]
    assert torch.equal(merged[EMBEDDING][1], untied[EMBEDDING][2])


def test_a_donor_whose_head_is_tied_gives_its_embedding() -> None:
    own, other = model(5, 0), model(4, 1)
    del other[HEAD]
    weights = ByToken(
        TensorWeights(own), np.array([0, -1]), {1: (Row(TensorWeights(other), 3),)}, KEYS
    )
    assert torch.equal(weights[HEAD][1], other[EMBEDDING][3])


def test_it_stands_on_the_models_that_rows_are_from() -> None:
    class Checked(TensorWeights):
        verified = 0

        def verify(self) -> None:
            self.verified += 1

    own, used, unused = (Checked(model(4, seed)) for seed in range(3))
    weights = ByToken(own, np.array([-1, 2]), {0: (Row(used, 1),), 1: (Row(unused, 1),)}, KEYS)
    assert [origin.weights for origin in weights.origins(HEAD)] == [own, used]
    assert [origin.weights for origin in weights.origins(NORM)] == [own]
    weights.verify()
    assert (own.verified, used.verified, unused.verified) == (1, 1, 0)
    assert weights.bytes_to_read(HEAD) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3), 0), ((5,), 0), ((1, 5), 1), ((1,), 0), ((2, 2), 0)]
)
def test_the_tokens_are_along_the_first_dimension_that_counts(
    shape: tuple[int, ...], axis: int
) -> None:
    assert token_axis(TensorSpec(shape, torch.float32)) == axis


def test_it_is_weights() -> None:
    assert isinstance(ByToken(TensorWeights({}), np.array([], dtype=np.int64), {}, ()), Weights)
