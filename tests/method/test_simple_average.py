import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench.method import SimpleAverageAlgorithm


def linear(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values], dtype=torch.float32)
    return layer


def test_by_hand() -> None:
    merged = SimpleAverageAlgorithm().run({"a": linear(1, 2), "b": linear(3, 6)})
    assert merged["weight"].tolist() == [[2, 4]]


def test_the_pretrained_model_is_not_averaged() -> None:
    pool = {"_pretrained_": linear(100, 100), "a": linear(1, 2), "b": linear(3, 6)}
    assert SimpleAverageAlgorithm().run(pool)["weight"].tolist() == [[2, 4]]


def test_inputs_stay_as_they_are() -> None:
    pool = {"_pretrained_": linear(0, 0), "a": linear(1, 2), "b": linear(3, 6)}
    SimpleAverageAlgorithm().run(pool)
    assert [m.weight.tolist() for m in pool.values()] == [[[0, 0]], [[1, 2]], [[3, 6]]]


def test_inplace_writes_to_the_pretrained_model() -> None:
    pool = {"_pretrained_": linear(0, 0), "a": linear(1, 2), "b": linear(3, 6)}
    SimpleAverageAlgorithm(inplace=True).run(pool)
    assert [m.weight.tolist() for m in pool.values()] == [[[2, 4]], [[1, 2]], [[3, 6]]]


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-1e3, 1e3, width=32), min_size=n, max_size=n), min_size=1, max_size=5
        )
    )
)
@settings(deadline=None)
def test_against_float64(rows: list[list[float]]) -> None:
    merged = SimpleAverageAlgorithm().run({str(i): linear(*row) for i, row in enumerate(rows)})
    expected = torch.tensor(rows, dtype=torch.float64).mean(0)
    torch.testing.assert_close(merged["weight"][0].double(), expected, rtol=1e-6, atol=5e-4)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1), st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_copies_of_one_model_give_that_model(values: list[float], copies: int) -> None:
    model = linear(*values)
    merged = SimpleAverageAlgorithm().run({str(i): model for i in range(copies)})
    assert torch.equal(merged["weight"], model.weight)
