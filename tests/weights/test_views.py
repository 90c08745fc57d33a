import pytest
import torch
from fixtures_weights import all_bits, total, weights

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import (
    MergePolicy,
    Renamed,
    Rounded,
    Stacked,
    TensorWeights,
    in_memory,
    merge,
    without_prefix,
)


def test_entries_have_the_new_names_in_the_new_order() -> None:
    source = weights(a=[1.0, 2.0], b=3, c=4.0)
    renamed = Renamed(source, {"y": "b", "x": "a"})
    assert list(renamed) == ["y", "x"] and len(renamed) == 2
    assert renamed.spec("x") == source.spec("a")
    assert renamed["x"] is source["a"]
    assert renamed.read("x", 1, 2).tolist() == [2]
    assert list(renamed.pieces("x", 1)) == [(0, 1), (1, 2)]
    assert renamed.bytes_to_read("y") == 8
    assert all_bits(in_memory(renamed)) == all_bits({"y": source["b"], "x": source["a"]})


def test_only_the_new_names_are_known() -> None:
    renamed = Renamed(weights(a=1.0), {"x": "a"})
    assert "a" not in renamed
    for look in (renamed.__getitem__, renamed.spec, renamed.tied_to):
        with pytest.raises(KeyError):
            look("a")


@pytest.mark.parametrize("names", [{"x": "a", "y": "b"}, {"y": "b", "x": "a"}])
def test_ties_are_kept_under_the_new_names(names: dict[str, str]) -> None:
    shared = torch.ones(2)
    renamed = Renamed(TensorWeights({"a": shared, "b": shared}), names)
    assert renamed.tied_to("y") == renamed.tied_to("x") == "x"
    tensors = in_memory(renamed)
    assert list(tensors) == list(names) and tensors["x"] is tensors["y"]


def test_one_end_of_a_tie_stands_alone() -> None:
    shared = torch.ones(2)
    renamed = Renamed(TensorWeights({"a": shared, "b": shared}), {"y": "b"})
    assert renamed.tied_to("y") == "y"
    assert in_memory(renamed)["y"].tolist() == [1, 1]


def test_one_entry_under_two_names_is_tied() -> None:
    renamed = Renamed(weights(a=1.0), {"x": "a", "y": "a"})
    assert renamed.tied_to("y") == "x"


def test_merged_weights_are_renamed_with_what_they_noticed() -> None:
    merged = merge({"m": weights(a=torch.nan)}, total)
    renamed = Renamed(merged, {"x": "a"})
    assert renamed.in_pieces is merged.in_pieces is False
    with pytest.raises(FusionBenchError, match="NaN"):
        in_memory(renamed)


def test_rounded_entries_are_read_as_they_would_be_stored() -> None:
    third = torch.full((2, 2), 1 / 3)
    merged = merge(
        {"m": TensorWeights({"a": third, "b": third})}, total, policy=MergePolicy(dtype="bfloat16")
    )
    assert merged.read("a", 0, 1).dtype is torch.float32
    rounded, expected = Rounded(merged), third.bfloat16()
    for found in (rounded["a"], rounded.take("a", torch.tensor([0, 1]), 2)):
        assert torch.equal(found, expected) and found.dtype is torch.bfloat16
    assert torch.equal(rounded.read("a", 1, 3), expected.view(-1)[1:3])
    assert rounded.tied_to("b") == "a" and rounded.spec("b") == merged.spec("b")


@pytest.mark.parametrize(
    ("keys", "known", "prefix"),
    [
        (["v.a", "v.b", "t.a"], ["a", "b"], "v."),
        (["t.a", "v.a", "v.b"], ["a", "b"], "v."),
        (["m.v.a", "m.v.b"], ["a", "b"], "m.v."),
        (["a", "b"], ["a", "b"], ""),
        (["v.a"], ["a", "b"], ""),
        (["va", "vb"], ["a", "b"], ""),
        ([], ["a"], ""),
        (["a"], [], ""),
    ],
)
def test_a_prefix_counts_if_all_known_keys_have_it(
    keys: list[str], known: list[str], prefix: str
) -> None:
    assert without_prefix(dict.fromkeys(keys), dict.fromkeys(known)) == prefix


def test_a_stack_takes_entries_of_several_weights() -> None:
    shared = torch.ones(3)
    one = TensorWeights({"embed": shared, "head": shared, "layer": torch.zeros(2)})
    other = TensorWeights({"layer": torch.full((2,), 5.0)})
    stack = Stacked(
        {
            "0.layer": (one, "layer"),
            "1.layer": (other, "layer"),
            "2.layer": (one, "layer"),
            "embed": (one, "embed"),
            "head": (one, "head"),
        }
    )
    tensors = in_memory(stack)
    assert [tensors[f"{i}.layer"].tolist() for i in range(3)] == [[0, 0], [5, 5], [0, 0]]
    assert stack.tied_to("2.layer") == "2.layer"  # a layer that is used twice is written twice
    assert stack.tied_to("head") == "embed"
    assert [(origin.weights, origin.key) for origin in stack.origins("1.layer")] == [
        (other, "layer")
    ]


def test_a_merged_entry_comes_from_all_models() -> None:
    models = {"a": weights(x=1.0), "b": weights(x=3.0)}
    merged = merge(models, lambda key, tensors, base: sum(tensors))
    origins = Renamed(merged, {"y": "x"}).origins("y")
    assert [(origin.weights, origin.key) for origin in origins] == [
        (models["a"], "x"),
        (models["b"], "x"),
    ]
