import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_bench.method import (
    ISO_C_Merge,
    ISO_CTS_Merge,
    TaskSingularVectorMerging,
    WUDIMerging,
)
from fusion_bench.weights import Inputs, MergePolicy, TensorWeights, align, entries
from fusion_bench.weights.entries import (
    Kept,
    column_products,
    folded,
    restoring_l1,
    right_factors,
)
from fusion_bench.weights.largest import largest
from fusion_bench.weights.statistics import Piece

BASE = "_pretrained_"


def opened(*values: Tensor, cut: Any = "rows", piece: int = 7) -> Inputs:
    """Return models of one entry, `w`, that is read in small pieces."""

    class Small(Inputs):
        def pieces(self, key: str, size: int) -> Any:
            return super().pieces(key, min(size, piece))

    models = {f"m{i}": TensorWeights({"w": value}) for i, value in enumerate(values)}
    return Small(align(models), MergePolicy(), cuts=lambda key, shape: cut)


def themselves(*piece: *Piece) -> Sequence[Tensor]:
    return list(piece[2])


def first(*piece: *Piece) -> Tensor:
    return piece[2][0]


def test_rows_stay_whole_and_keep_their_shape() -> None:
    inputs = opened(torch.arange(24.0).view(6, 2, 2), piece=9)
    assert list(inputs.pieces("w", 100)) == [(0, 8), (8, 16), (16, 24)]
    tensors, _ = inputs.read("w", 8, 16)
    assert tensors[0].tolist() == torch.arange(8.0, 16).view(2, 2, 2).tolist()
    assert list(opened(torch.ones(50)).pieces("w", 100)) == [(0, 50)]  # one row
    assert list(opened(torch.ones(50), cut="whole").pieces("w", 100)) == [(0, 50)]


def test_what_is_kept_is_measured_once_however_it_is_cut() -> None:
    values = torch.arange(20.0, dtype=torch.float64).view(10, 2) / 3
    for inputs in (opened(values, piece=4), opened(values.float(), piece=4)):
        looks: list[tuple[str, int]] = []

        def double(*piece: *Piece, looks: Any = looks) -> Tensor:
            looks.append(piece[:2])
            return piece[2][0] * 2

        kept = Kept(inputs, double)
        pieces = [(0, 4), (4, 12), (12, 20), (0, 20)]
        for _ in range(2):
            for start, stop in pieces:
                tensors, base = inputs.read("w", start, stop)
                found = kept("w", start, tensors, base)
                assert torch.equal(found, tensors[0] * 2) and found.dtype == tensors[0].dtype
        assert looks == [("w", start) for start, _ in pieces]


def test_what_is_measured_is_put_together_in_order() -> None:
    inputs = opened(torch.arange(40.0).view(20, 2), piece=2)
    found = inputs.each(lambda entry: folded(entry, first, lambda a, b: torch.cat([a, b])))("w")
    assert found.tolist() == torch.arange(40.0).view(20, 2).tolist()


def test_inner_products_of_columns() -> None:
    a, b = torch.randn(9, 3), torch.randn(9, 3)
    (found,) = [opened(a, b).each(lambda entry: column_products(entry, themselves))("w")]
    expected = torch.einsum("irc,jrc->ijc", *[torch.stack([a, b]).double()] * 2)
    torch.testing.assert_close(found, expected)


def test_norms_are_restored_by_hand() -> None:
    sparse, whole = torch.tensor([0.0, -2, 0, 0]), torch.tensor([1.0, -2, 3, 0])
    inputs = opened(sparse, whole, cut="elements", piece=1)

    def of(model: int) -> Any:
        return lambda key, start, tensors, base: [tensors[model]]

    for one, other, expected in ((0, 1, [0, -6, 0, 0]), (1, 1, [1, -2, 3, 0])):
        restored = restoring_l1(inputs, of(one), of(other))
        (found,) = restored("w", 0, *inputs.read("w", 0, 4))
        assert found.tolist() == expected
    zero = opened(torch.zeros(3), torch.ones(3), cut="elements")
    (found,) = restoring_l1(zero, of(0), of(1))("w", 0, *zero.read("w", 0, 3))
    assert found.tolist() == [0, 0, 0]


def test_the_largest_of_one_entry_alone() -> None:
    inputs = opened(torch.tensor([3.0, -1, 2, 2, 0, 5, 2]), cut="elements", piece=2)
    (cutoff,) = inputs.each(lambda entry: largest(entry, themselves, [4]))("w")
    (values,) = inputs.read("w", 0, 7)[0]
    assert cutoff.keep("w", 0, values).tolist() == [3, 0, 2, 2, 0, 5, 0]


@pytest.mark.parametrize("rank", [4, 2])
def test_singular_vectors_of_a_matrix_in_rows(rank: int) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((30, rank)) @ generator.standard_normal((rank, 4))
    values = torch.tensor(matrix)
    s, v = opened(values).each(lambda entry: right_factors(entry, first))("w")
    assert s.tolist() == pytest.approx(np.linalg.svd(matrix)[1][:rank].tolist())
    torch.testing.assert_close(values @ v @ v.mT, values)
    torch.testing.assert_close(v.mT @ v, torch.eye(rank, dtype=torch.float64))


def test_small_singular_values_come_from_qr() -> None:
    generator = np.random.default_rng(0)
    left = np.linalg.qr(generator.standard_normal((30, 4)))[0]
    values = torch.tensor(left * [1, 1e-2, 3e-6, 1e-9])
    s, v = opened(values).each(lambda entry: right_factors(entry, first))("w")
    assert s.tolist() == pytest.approx([1, 1e-2, 3e-6], rel=1e-9)
    assert v.abs().diagonal().tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    "method",
    [
        ISO_C_Merge(0.5),
        ISO_CTS_Merge(),
        ISO_CTS_Merge(common_space_fraction=1),
        TaskSingularVectorMerging(alpha=[1, 2, -0.5]),
        TaskSingularVectorMerging(return_single_task_models=True),
        WUDIMerging(iter_num=20),
        WUDIMerging(iter_num=20, divisor="norm"),
        WUDIMerging(solver="lstsq"),
    ],
)
def test_a_tall_matrix_in_rows_is_merged_as_a_whole_one(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.ModuleDict({"tall": nn.Linear(9, 70), "wide": nn.Linear(9, 5, bias=False)})

    models = {BASE: model(0), "a": model(1), "b": model(2), "c": model(3)}
    expected = method.run(models)
    monkeypatch.setattr(entries, "LARGE", 1)
    pieces = Inputs.pieces
    monkeypatch.setattr(Inputs, "pieces", lambda self, key, size: pieces(self, key, 100))
    found = method.run(models)
    both = [expected, found] if "tall.weight" in found else [expected["merged"], found["merged"]]
    for key, tensor in both[0].items():
        torch.testing.assert_close(both[1][key], tensor, rtol=1e-5, atol=1e-6)
    if both[0] is not expected:
        for name, weights in expected.items():
            for key, tensor in weights.items():
                torch.testing.assert_close(found[name][key], tensor, rtol=1e-5, atol=1e-6)


def test_threads_that_wait_take_part() -> None:
    """Two threads ask for the same statistic: both work on its pieces, and it is found once."""
    size = 2**15  # smaller pieces are taken together
    inputs = opened(torch.zeros(2 * size), cut="elements", piece=size)
    both, seen, found = threading.Barrier(2), set(), []

    def find(entry: Inputs) -> int:
        def look(*piece: *Piece) -> None:
            if len(seen) < 2:
                both.wait(10)
            seen.add(threading.current_thread().name)

        entry.survey(look)
        found.append(1)
        return 5

    statistic = inputs.each(find)
    threads = [threading.Thread(target=statistic, args=("w",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 2 and found == [1] and statistic("w") == 5


def test_an_error_while_a_statistic_is_found_surfaces_each_time() -> None:
    def find(entry: Inputs) -> int:
        entry.survey(lambda *piece: 1 / 0)
        return 1

    statistic = opened(torch.ones(3)).each(find)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            statistic("w")
