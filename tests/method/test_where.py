"""Options by tensor, layer and model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_bench.method import (
    ConsensusTaskArithmetic,
    DareTaskArithmetic,
    EMRMerging,
    KnOTSMerging,
    LiNeSAlgorithm,
    LocalizeAndStitch,
    MagMaxAlgorithm,
    ModelBreadcrumbs,
    NuSlerpAlgorithm,
    PCBMerging,
    SCEAlgorithm,
    SimpleAverageAlgorithm,
    SlerpMergeAlgorithm,
    TallMaskTaskArithmeticAlgorithm,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TensorwiseAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
)
from fusion_bench.method.checks import Pool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, Renamed, TensorWeights, Weights, in_memory
from fusion_bench.weights.statistics import products

LAYERS = 4
NAMES = ("self_attn.q", "mlp.up", "norm")
KEYS = [
    "embed",
    *(f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in NAMES),
    "head",
]


def weights(seed: int, keys: Sequence[str] = KEYS) -> TensorWeights:
    generator = torch.Generator().manual_seed(seed)
    return TensorWeights({key: torch.randn(4, 6, generator=generator) for key in keys})


def models(*names: str, base: bool = True) -> dict[str, Weights]:
    found: dict[str, Weights] = {"_pretrained_": weights(0)} if base else {}
    return found | {name: weights(seed) for seed, name in enumerate(names, 1)}


def merged(method: Any, own: Mapping[str, Weights] | None = None) -> dict[str, Tensor]:
    return in_memory(method.fuse(Pool(own or models("a", "b"))))


def arithmetic(factors: Mapping[str, float], default: float) -> dict[str, Tensor]:
    """Task arithmetic in float64; ``factors`` maps the begin of keys to their factors."""
    base, *tuned = (models("a", "b")[name] for name in ("_pretrained_", "a", "b"))
    found = {}
    for key in base:
        factor = next((factors[start] for start in factors if start in key), default)
        vectors = sum(model[key].double() - base[key].double() for model in tuned)
        found[key] = base[key].double() + factor * vectors
    return found


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[key].double(), rtol=1e-5, atol=1e-6)


def assert_parts(method: Any, parts: Mapping[str, Any], own: Any = None) -> None:
    """Compare with the methods that merge each part, by a piece of the key; bit by bit."""
    found = merged(method, own)
    whole = {piece: merged(other, own) for piece, other in parts.items()}
    for key, tensor in found.items():
        piece = next(piece for piece in parts if piece in key)
        assert torch.equal(tensor, whole[piece][key]), key


def test_the_first_rule_that_matches_and_sets_the_option_wins() -> None:
    where = [
        {"match": "*self_attn*", "scaling_factor": 0.5},
        {"match": ["*layers.1.*", "head"], "scaling_factor": 2},
    ]
    method = TaskArithmeticAlgorithm(0.3, where=where)
    assert_near(merged(method), arithmetic({"self_attn": 0.5, "layers.1.": 2, "head": 2}, 0.3))


def test_a_gradient_goes_through_the_layers() -> None:
    method = TaskArithmeticAlgorithm(where=[{"scaling_factor": {"gradient": [0.1, 1, 0.3]}}])
    along = [0.1, 0.7, 1 - 0.7 / 3, 0.3]  # at 0, 2/3, 4/3 and 2
    factors = {f"layers.{layer}.": value for layer, value in enumerate(along)}
    assert_near(merged(method), arithmetic(factors, 0.1))


def test_of_one_layer_the_last_value_is_used() -> None:
    keys = ["embed", *(f"h.7.{name}" for name in NAMES)]
    own: dict[str, Weights] = {"_pretrained_": weights(0, keys), "a": weights(1, keys)}
    method = TaskArithmeticAlgorithm(where=[{"scaling_factor": {"gradient": [0, 1]}}])
    found = merged(method, own)
    assert torch.equal(found["embed"], own["_pretrained_"]["embed"])
    torch.testing.assert_close(found["h.7.norm"], own["a"]["h.7.norm"])


def test_layers_that_are_missing_do_not_count() -> None:
    keys = [f"h.{layer}.{name}" for layer in (3, 5, 9) for name in NAMES]
    own: dict[str, Weights] = {"_pretrained_": weights(0, keys), "a": weights(1, keys)}
    method = TaskArithmeticAlgorithm(where=[{"scaling_factor": {"gradient": [0, 1]}}])
    half = (own["_pretrained_"]["h.5.norm"] + own["a"]["h.5.norm"]) / 2
    torch.testing.assert_close(merged(method, own)["h.5.norm"], half)


def test_texts_and_booleans_take_the_value_before() -> None:
    rules = [{"merge_func": {"gradient": ["mean", "sum"]}, "match": "*layers*"}]
    method = TiesMergingAlgorithm(where=rules)
    parts = {"layers.3.": TiesMergingAlgorithm(merge_func="sum"), "": TiesMergingAlgorithm()}
    assert_parts(method, parts)


def test_ties_finds_its_largest_elements_in_the_whole_model() -> None:
    where = [{"match": "*mlp*", "threshold": 50}]
    parts = {"mlp": TiesMergingAlgorithm(threshold=50), "": TiesMergingAlgorithm()}
    assert_parts(TiesMergingAlgorithm(where=where), parts)


@pytest.mark.parametrize(
    ("kind", "options", "others"),
    [
        (TaskArithmeticAlgorithm, {"weights": [1, 2]}, {"normalize": True, "weights": [3, 1]}),
        (TiesMergingAlgorithm, {"scope": "tensor"}, {"scope": "model", "threshold": [30, 40]}),
        (DareTaskArithmetic, {"rescale": "l1"}, {"sparsity_ratio": {"a": 0.1, "b": 0.9}}),
        (ModelBreadcrumbs, {"gamma": 0.2}, {"density": [0.5, 0.2], "scope": "row"}),
        (SCEAlgorithm, {"select_topk": 0.5}, {"select_topk": 1}),
        (NuSlerpAlgorithm, {"weights": [1, 2]}, {"axis": -1}),
        (KnOTSMerging, {"scaling_factor": 0.4}, {"scaling_factor": 0.6}),
    ],
)
def test_every_entry_is_merged_as_by_a_method_with_its_options(
    kind: Any, options: dict[str, Any], others: dict[str, Any]
) -> None:
    method = kind(**options, where=[{"match": "*mlp*", **others}])
    assert_parts(method, {"mlp": kind(**{**options, **others}), "": kind(**options)})


@pytest.mark.parametrize(
    ("kind", "option", "values"),
    [
        (PCBMerging, "density", (0.2, 0.5)),
        (LocalizeAndStitch, "density", (0.2, 0.5)),
        (ConsensusTaskArithmetic, "tall_mask_lambda", (0.3, 0.9)),
        (TallMaskTaskArithmeticAlgorithm, "tall_mask_lambda", (0.3, 0.9)),
        (TaskSingularVectorMerging, "alpha", (0.3, 0.9)),
        (MagMaxAlgorithm, "weights", (0.3, -0.9)),
    ],
)
def test_values_of_models_by_name_are_those_in_order(
    kind: Any, option: str, values: tuple[float, float]
) -> None:
    def fused(value: Any) -> dict[str, Tensor]:
        made = kind(**{option: value}).fuse(Pool(models("a", "b")))
        parts = made.items() if isinstance(made, dict) else [("", made)]
        return {f"{name}:{key}": t for name, own in parts for key, t in in_memory(own).items()}

    first, second = values
    named, listed = fused({"b": second, "a": first}), fused([first, second])
    alike, turned = fused(first), fused([second, first])
    assert all(torch.equal(named[key], listed[key]) for key in named)
    assert any(not torch.equal(named[key], alike[key]) for key in named)
    assert any(not torch.equal(named[key], turned[key]) for key in named)


def test_methods_that_make_several_models_take_rules() -> None:
    own = models("a", "b")
    method: Any = EMRMerging(where=[{"match": "*mlp*", "rescale": "released"}])
    found, paper, released = (
        {name: in_memory(one) for name, one in m.fuse(Pool(own)).items()}
        for m in (method, EMRMerging(), EMRMerging("released"))
    )
    assert list(found) == ["a", "b"]
    for name in found:
        for key, tensor in found[name].items():
            expected = released if "mlp" in key else paper
            assert torch.equal(tensor, expected[name][key])


def test_values_of_models_come_from_different_rules() -> None:
    where = [
        {"match": "*mlp*", "weights": {"a": 3}},
        {"match": "*layers.1.*", "weights": 5},
    ]
    method = TaskArithmeticAlgorithm(1, weights={"a": 1, "b": 2}, where=where)
    found, own = merged(method), models("a", "b")
    for key, (a, b) in {
        "embed": (1, 2),
        "model.layers.0.mlp.up": (3, 2),
        "model.layers.1.mlp.up": (3, 5),
        "model.layers.1.norm": (5, 5),
    }.items():
        base = own["_pretrained_"][key]
        expected = base + a * (own["a"][key] - base) + b * (own["b"][key] - base)
        torch.testing.assert_close(found[key], expected)


def test_rules_may_give_a_model_the_value_that_it_lacks() -> None:
    where = [{"weights": {"b": {"gradient": [2, 2]}}}]
    method = TaskArithmeticAlgorithm(1, weights={"a": 1}, where=where)
    assert_near(merged(method), merged(TaskArithmeticAlgorithm(1, weights=[1, 2])))
    method.where = [{"match": "*mlp*", "weights": {"b": 2}}]
    with pytest.raises(
        FusionBenchError, match=r"^weights: .* no value for the model 'b' in 'embed'"
    ):
        merged(method)


def test_a_model_may_call_its_entries_otherwise() -> None:
    own = models("a", "b")
    turned = {key: key.replace("layers.1", "layers.0") for key in KEYS if "layers.1" in key}
    own["b"] = Renamed(own["b"], {key: turned.get(key, key) for key in KEYS})
    where = [{"match": "*layers.0.*", "weights": 0}]
    found = merged(TaskArithmeticAlgorithm(1, where=where), own)
    for key, a, b in [("model.layers.0.norm", 0, 0), ("model.layers.1.norm", 1, 0)]:
        base = own["_pretrained_"][key]
        expected = base + a * (own["a"][key] - base) + b * (own["b"][key] - base)
        torch.testing.assert_close(found[key], expected)


def test_tied_entries_have_the_options_of_the_first() -> None:
    tied = torch.randn(4, 6)
    own = {
        name: TensorWeights({"embed": t, "head": t}) for name, t in [("a", tied), ("b", tied + 1)]
    }
    method = WeightedAverageAlgorithm([1, 1], where=[{"match": "head", "weights": [1, 0]}])
    found = merged(method, own)
    assert found["embed"] is found["head"]
    torch.testing.assert_close(found["embed"], tied + 0.5)


def test_the_middle_of_an_arc_differs_by_layer() -> None:
    own = models("a")
    where = [{"match": "*self_attn*", "t": {"gradient": [0, 1]}}]
    found = merged(SlerpMergeAlgorithm(0.5, where=where), own)
    assert torch.equal(
        found["model.layers.0.self_attn.q"], own["_pretrained_"]["model.layers.0.self_attn.q"]
    )
    torch.testing.assert_close(
        found["model.layers.3.self_attn.q"], own["a"]["model.layers.3.self_attn.q"]
    )


class Own(TensorwiseAlgorithm):
    """A method with an ``__init__`` of its own, which keeps no arguments."""

    def __init__(self, factor: float = 1.0, where: Any = ()):
        super().__init__(where=where)
        self.factor = factor

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        return tensors[0] * self.factor


@dataclass(eq=False)
class Counting(TensorwiseAlgorithm):
    """A method whose options are its fields."""

    factor: float = 1.0
    steps: int = 1

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        return tensors[0] * self.factor * self.steps


def test_whole_numbers_are_not_interpolated() -> None:
    own = models("a", base=False)
    rules = [{"steps": {"gradient": [1, 4]}, "factor": {"gradient": [1, 4]}}]
    found = merged(Counting(where=rules), own)
    for layer, factor in enumerate([1, 2, 3, 4 * 4]):
        key = f"model.layers.{layer}.norm"
        torch.testing.assert_close(found[key], own["a"][key] * factor)


def test_a_method_of_ones_own_has_to_keep_its_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"where: Own does not keep its arguments"):
        merged(Own(where=[{"factor": 2}]))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"thresold": 1}, r"where\[1\]\.thresold: .* no such option\. Did you mean 'threshold'"),
        ({"match": "*mlp*"}, r"where\[1\]: this rule sets no option"),
        ({"inplace": True}, r"where\[1\]\.inplace: 'inplace' holds for the whole model"),
        ({"threshold": 200}, r"where\[1\]\.threshold: 200 is not a number from 0 to 100"),
        ({"threshold": {"a": 20, "b": 101}}, r"where\[1\]\.threshold: 101 is not a number"),
        ({"threshold": "many"}, r"where\[1\]\.threshold: 'many' is not a number"),
        ({"threshold": {"c": 1}}, r"where\[1\]\.threshold\.c: no .* called 'c'\. Known: a, b"),
        ({"threshold": [1]}, r"where\[1\]\.threshold: 1 value for 2 models \(a, b\)"),
        ({"scope": "tensors"}, r"where\[1\]\.scope: 'tensors' is unknown\. Did you mean 'tensor'"),
        ({"threshold": {"gradient": 3}}, r"where\[1\]\.threshold\.gradient: 3 is not a list"),
        ({"threshold": {"gradient": []}}, r"threshold\.gradient: it is empty\. Give at least one"),
        ({"threshold": {"gradiant": [1]}}, r"threshold\.gradiant: .* Did you mean 'gradient'\?"),
        ({"scaling_factor": {"gradiant": [1]}}, r"factor\.gradiant: .* Did you mean 'gradient'"),
        ({"threshold": {"a": {"gradiant": [1]}}}, r"old\.a\.gradiant: .* Did you mean 'gradient'"),
        ({"scaling_factor": {"x": 1}}, r"\[1\]\.scaling_factor: '{'x': 1}' is not a number"),
        ({"threshold": {"a": {"x": 1}}}, r"threshold\.a: {'x': 1} is no gradient\. Write it as"),
        ({"match": "*MLP*", "threshold": 1}, r"matches no entry\. Did you mean '\*mlp\*'\?"),
        ({"match": "*.Mlp.UP", "threshold": 1}, r"no entry\. Did you mean '\*\.mlp\.up'"),
        ({"threshold": {"gradient": [1], "match": "x"}}, r"where\[1\]\.threshold\.match: there"),
        ({"match": [], "threshold": 1}, r"where\[1\]\.match: \[\] is not a pattern"),
        ({"match": "*self_atn.*", "threshold": 1}, r"\[1\]\.match: '\*self_atn\.\*' matches no"),
        ({"match": "*self_atn.*", "threshold": 1}, r"nearest: model\.layers\.0\.self_attn\.q"),
        (3, r"where\[1\]: 3 is not a mapping"),
        ({"threshold": [{"gradient": 1}, 2]}, r"where\[1\]\.threshold\.a\.gradient: 1 is not"),
    ],
)  # fmt: skip
def test_rules_that_do_not_work_are_told_with_their_place(rule: Any, message: str) -> None:
    method = TiesMergingAlgorithm(where=[{"match": "head", "scaling_factor": 1}, rule])
    with pytest.raises(FusionBenchError, match=message):
        method.check_pool(Pool(models("a", "b")))


def test_rules_are_a_list() -> None:
    method: Any = TiesMergingAlgorithm(where={"scaling_factor": 1})  # type: ignore[arg-type]
    with pytest.raises(FusionBenchError, match=r"^where: it is not a list .* Put it in a list"):
        method.check_pool(Pool(models("a", "b")))


def test_all_that_is_wrong_with_the_form_is_told_at_once() -> None:
    method = TiesMergingAlgorithm(where=[{"scal": 1}, {"threshold": {"z": 1}}])
    with pytest.raises(FusionBenchError) as caught:
        method.check_pool(Pool(models("a", "b")))
    assert [problem.key for problem in caught.value.problems] == [
        "where[0].scal",
        "where[1].threshold.z",
    ]


def test_one_look_at_the_whole_model_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, survey = [], Inputs.survey
    monkeypatch.setattr(Inputs, "survey", lambda *a, **k: (looks.append(1), survey(*a, **k))[1])
    own = models("a", "b")
    TiesMergingAlgorithm().fuse(Pool(own))  # type: ignore[arg-type]
    alone = len(looks)
    rules = [{"scaling_factor": {"gradient": [0.1, 1]}}, {"weights": {"gradient": [1, 2]}}]
    TiesMergingAlgorithm(where=rules).fuse(Pool(own))  # type: ignore[arg-type]
    assert alone and len(looks) == 2 * alone


def test_statistics_of_single_entries_are_of_those_that_are_asked_for() -> None:
    own, seen = models("a", "b"), []

    def look(key: str, *_: object) -> list[Tensor]:
        seen.append(key)
        return [torch.zeros(1)]

    inputs = SCEAlgorithm().inputs(Pool(own))  # type: ignore[arg-type]
    products(inputs.asking(["head"]), look)  # type: ignore[arg-type]
    assert set(seen) == {"head"}


def test_rules_in_a_base_method_are_checked_and_used() -> None:
    rules = [{"match": "*mlp*", "scaling_factor": 0.0}]
    own = models("a", "b")
    for kind in (KnOTSMerging, lambda inner: LiNeSAlgorithm(inner, alpha=1, beta=0)):
        found = merged(kind(TaskArithmeticAlgorithm(1, where=rules)), own)
        for key, tensor in found.items():
            same = torch.allclose(tensor, own["_pretrained_"][key], atol=1e-6)
            assert same == ("mlp" in key), key
        wrong = kind(TaskArithmeticAlgorithm(where=[{"match": "x", "scaling_factor": 1}]))
        with pytest.raises(FusionBenchError, match=r"^base_method\.where\[0\]\.match"):
            wrong.check_pool(Pool(own))


def test_lines_scales_by_layer_itself() -> None:
    method = LiNeSAlgorithm(SimpleAverageAlgorithm(), where=[{"alpha": 0.1}])
    with pytest.raises(FusionBenchError, match=r"^where: .*base_method\.where"):
        method.check_pool(Pool(models("a", "b")))


def test_what_no_rule_decides_is_known() -> None:
    where = [
        {"match": "*layers*", "scaling_factor": 1},
        {"match": "*mlp*", "scaling_factor": 2, "threshold": 3},
    ]
    method = TiesMergingAlgorithm(where=where)
    resolved = method.resolved(method.inputs(Pool(models("a", "b"))))
    assert resolved.unused == ((1, "scaling_factor"),)
    assert [len(own.keys) for own in resolved.variants] == [2, 8, 4]


def test_a_pattern_is_looked_for_among_the_names_that_its_options_look_at() -> None:
    """Values for all models have the merged model's names, values by model those of the model."""
    own = models("a", "b")
    stored = TensorWeights({f"other.{key}": own["b"][key] for key in KEYS})
    own["b"] = Renamed(stored, {key: f"other.{key}" for key in KEYS})
    for rule, told in (
        ({"scaling_factor": 0}, True),
        ({"weights": {"a": 0}}, True),
        ({"weights": {"b": 0}}, False),
        ({"weights": {"b": 0}, "scaling_factor": 0}, True),
    ):
        method = TaskArithmeticAlgorithm(1, where=[{"match": "other.*mlp*", **rule}])
        if told:
            with pytest.raises(
                FusionBenchError, match=r"'other.*' matches no.*nearest: model\.lay"
            ):
                method.check_pool(Pool(own))
        else:
            found, base = merged(method, own), own["_pretrained_"]
            for key in KEYS:
                expected = own["a"][key].double() + (own["b"][key] - base[key]) * ("mlp" not in key)
                torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_an_optional_rule_may_match_nothing() -> None:
    rules = [
        {"match": "*no such*", "optional": True, "scaling_factor": 1},
        {"match": "*mlp*", "optional": True, "scaling_factor": 2},
    ]
    assert_near(merged(TaskArithmeticAlgorithm(0.3, where=rules)), arithmetic({"mlp": 2}, 0.3))


def test_a_gradient_outside_of_a_rule_is_refused() -> None:
    for option in ("scaling_factor", "weights"):
        method = TaskArithmeticAlgorithm(**{option: {"gradient": [0, 1]}})  # type: ignore[arg-type]
        with pytest.raises(FusionBenchError, match=rf"^{option}: .*where=\[{{{option}: {{gradient"):
            method.check_pool(Pool(models("a", "b")))
