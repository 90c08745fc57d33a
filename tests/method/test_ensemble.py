import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_contract import family as small_models
from fixtures_tuning import linear, linear_models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from fusion_bench.method import (
    MaxModelPredictorAlgorithm,
    SimpleAverageAlgorithm,
    SimpleEnsembleAlgorithm,
    WeightedAverageAlgorithm,
    WeightedEnsembleAlgorithm,
)
from fusion_bench.method.checks import BASE, TrainablePool
from fusion_bench.method.ensemble import Ensemble, LogitEnsemble, load_ensemble
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.images.task import EnsembleClassifier

KINDS = ["logits", "probabilities", "log_probabilities"]


class Says(nn.Module):
    """A model that answers the same whatever it is asked."""

    def __init__(self, answer: Any):
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.answer


def saying(*answers: Any) -> dict[str, nn.Module]:
    return {name: Says(answer) for name, answer in zip("abcdefgh", answers, strict=False)}


def of(*answers: Sequence[float]) -> dict[str, nn.Module]:
    return saying(*(torch.tensor(answer, dtype=torch.float32) for answer in answers))


def test_ensembles_by_hand() -> None:
    models = of([1, 5], [3, 2])
    assert SimpleEnsembleAlgorithm().run(models)().tolist() == [2, 3.5]
    assert MaxModelPredictorAlgorithm().run(models)().tolist() == [3, 5]
    assert MaxModelPredictorAlgorithm("outputs").run(models)().tolist() == [3, 5]
    assert WeightedEnsembleAlgorithm().run(models)().tolist() == [2, 3.5]
    assert WeightedEnsembleAlgorithm([1, 3]).run(models)().tolist() == [2.5, 2.75]
    assert WeightedEnsembleAlgorithm([1, 3], normalize=False).run(models)().tolist() == [10, 11]
    assert WeightedEnsembleAlgorithm([2, -1]).run(models)().tolist() == [-1, 8]


def test_the_pretrained_model_has_no_say() -> None:
    models = of([1, 5], [3, 2]) | {BASE: Says(torch.tensor([100.0, 100]))}
    for use in (models, TrainablePool(models)):
        ensemble = SimpleEnsembleAlgorithm().run(use)
        assert ensemble.names == ["a", "b"] and ensemble().tolist() == [2, 3.5]


@pytest.mark.parametrize("kind", ["outputs", "logits"])
def test_an_ensemble_of_linear_models_is_the_averaged_model(kind: Any) -> None:
    models = {name: model for name, model in linear_models("abc").items() if name != BASE}
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    pairs: list[tuple[Any, Any]] = [
        (SimpleEnsembleAlgorithm(kind), SimpleAverageAlgorithm()),
        (WeightedEnsembleAlgorithm([1, 3, 4], of=kind), WeightedAverageAlgorithm([1, 3, 4])),
        (
            WeightedEnsembleAlgorithm([1, -3, 4], normalize=False, of=kind),
            WeightedAverageAlgorithm([1, -3, 4], normalize=False),
        ),
    ]
    for ensemble, average in pairs:
        averaged = linear(0)
        averaged.load_state_dict(average.run(models))
        torch.testing.assert_close(ensemble.run(models)(inputs), averaged(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_keep_their_type(dtype: torch.dtype) -> None:
    models = saying(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype))
    method: Any
    for method in (
        SimpleEnsembleAlgorithm(),
        WeightedEnsembleAlgorithm(),
        WeightedEnsembleAlgorithm([np.float64(0.25), 0.75]),
        MaxModelPredictorAlgorithm("outputs"),
    ):
        assert method.run(models)().dtype == dtype


def test_whatever_models_return_is_put_together() -> None:
    def answer(x: float) -> Any:
        tensor = torch.tensor([x])
        return {"one": tensor, "more": (tensor + 1, [tensor + 2, None], "text"), "none": None}

    found = SimpleEnsembleAlgorithm().run(saying(answer(1), answer(4)))()
    assert found == {"one": 2.5, "more": (3.5, [4.5, None], "text"), "none": None}
    assert type(found["more"]) is tuple and type(found["more"][1]) is list
    assert SimpleEnsembleAlgorithm().run(saying(None, None))() is None

    outputs = [
        BaseModelOutputWithPooling(
            last_hidden_state=torch.full((1, 2), x), hidden_states=(torch.full((1,), 2 * x),)
        )
        for x in (1.0, 3.0)
    ]
    made = MaxModelPredictorAlgorithm("outputs").run(saying(*outputs))()
    assert type(made) is BaseModelOutputWithPooling
    assert made.last_hidden_state.tolist() == [[3, 3]] and made.pooler_output is None
    assert made.hidden_states[0].tolist() == [6]


def test_arguments_reach_all_models() -> None:
    class Adds(nn.Module):
        def forward(self, one: Tensor, *, two: Tensor) -> Tensor:
            return one + two

    models: dict[str, nn.Module] = {"a": Adds(), "b": Adds()}
    ensemble = SimpleEnsembleAlgorithm().run(models)
    assert ensemble(torch.tensor(1.0), two=torch.tensor(2.0)) == 3
    assert isinstance(ensemble.models[0], Adds) and len(list(ensemble.modules())) == 4


def expected(kind: str, answers: Any, weights: Sequence[float] | None) -> Any:
    """Return logits in float64, of logits in float64."""
    logs = answers - np.logaddexp.reduce(answers, axis=-1, keepdims=True)
    if kind == "logits":
        return answers.max(0) if weights is None else np.tensordot(weights, answers, 1)
    if kind == "log_probabilities":
        return logs.max(0) if weights is None else np.tensordot(weights, logs, 1)
    probabilities = np.exp(logs)
    if weights is None:
        return np.log(probabilities.max(0))
    return np.log(np.tensordot(weights, probabilities, 1))


some_logits = st.integers(2, 4).flatmap(
    lambda models: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3),
        min_size=models,
        max_size=models,
    )
)


@given(some_logits, st.sampled_from(KINDS), st.booleans())
@settings(deadline=None, max_examples=examples(80))
def test_against_float64(answers: list[list[float]], kind: Any, weighted: bool) -> None:
    weights = [i + 0.5 for i in range(len(answers))] if weighted else [1.0] * len(answers)
    shares = [weight / sum(weights) for weight in weights]
    logits = np.array(answers)[:, None]
    models = saying(*(torch.tensor(own, dtype=torch.float32) for own in logits))
    ensembles: list[tuple[Any, Sequence[float] | None]] = [
        (WeightedEnsembleAlgorithm(weights, of=kind), shares),
        (MaxModelPredictorAlgorithm(kind), None),
    ]
    if not weighted:
        ensembles.append((SimpleEnsembleAlgorithm(kind), shares))
    for method, own in ensembles:
        ensemble = method.run(models)
        want = expected(kind, logits, own)
        together = ensemble.combine([model.answer for model in ensemble.members])
        np.testing.assert_allclose(together.numpy(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(ensemble(), together)


def test_probabilities_are_averaged_where_all_but_one_vanish() -> None:
    models = of([0, -1000], [0, -1000])
    together = SimpleEnsembleAlgorithm("probabilities").run(models)()
    assert together.tolist() == [0, -1000]
    apart = SimpleEnsembleAlgorithm("probabilities").run(of([1000, 0], [0, 1000]))()
    assert apart.tolist() == pytest.approx([np.log(0.5)] * 2)
    # the model that is sure has no weight
    other = WeightedEnsembleAlgorithm([0, 1], of="probabilities").run(of([0, 900], [0, -900]))()
    assert other.tolist() == [0, -900]


def test_probabilities_give_probabilities() -> None:
    models = of([1, 2, 3], [3, -1, 0])
    found = SimpleEnsembleAlgorithm("probabilities").run(models)().exp()
    assert float(found.sum()) == pytest.approx(1)
    mean = sum(m.answer.softmax(0) for m in models.values() if isinstance(m, Says)) / 2
    torch.testing.assert_close(found, mean)


def test_logits_are_taken_out_of_what_classifiers_return() -> None:
    outputs = [ImageClassifierOutput(logits=torch.tensor([[x, 1.0]])) for x in (1.0, 2.0)]
    assert SimpleEnsembleAlgorithm("logits").run(saying(*outputs))().tolist() == [[1.5, 1]]
    features = [BaseModelOutputWithPooling(pooler_output=torch.ones(1, 2))] * 2
    with pytest.raises(FusionBenchError, match=r"of: a Says returns no logits"):
        SimpleEnsembleAlgorithm("logits").run(saying(*features))()


def test_half_precision_logits_are_put_together_in_float32() -> None:
    models = saying(*(torch.tensor([x, 0.0]).bfloat16() for x in (1.0, 1.0078125)))
    for kind in KINDS:
        method = SimpleEnsembleAlgorithm(kind)  # type: ignore[arg-type]
        assert method.run(models)().dtype == torch.float32
    assert SimpleEnsembleAlgorithm("logits").run(models)().tolist() == [1.00390625, 0]


def test_who_is_a_committee() -> None:
    models = of([1], [2])
    for method in (SimpleEnsembleAlgorithm, WeightedEnsembleAlgorithm, MaxModelPredictorAlgorithm):
        for kind in ("outputs", *KINDS):
            ensemble = method(of=kind).run(models)  # type: ignore[arg-type]
            assert isinstance(ensemble, LogitEnsemble) == (kind != "outputs")
            assert isinstance(ensemble, EnsembleClassifier) == (kind != "outputs")
    assert MaxModelPredictorAlgorithm().of == "logits"
    assert type(SimpleEnsembleAlgorithm().run(models)) is Ensemble


def test_a_config_is_the_first_models() -> None:
    modules = small_models("clip")
    assert SimpleEnsembleAlgorithm().run(modules).config is modules["a"].config
    assert SimpleEnsembleAlgorithm().run(of([1], [2])).config is None


@pytest.mark.parametrize(
    "build",
    [
        lambda: SimpleEnsembleAlgorithm(),
        lambda: WeightedEnsembleAlgorithm([1, 2, 5], of="probabilities"),
        lambda: MaxModelPredictorAlgorithm("outputs"),
    ],
)
def test_a_saved_ensemble_is_the_same_again(build: Callable[[], Any], tmp_path: Path) -> None:
    modules = dict(small_models("clip"))
    modules["Cats/Dogs"] = modules.pop("c")  # a name that is no directory's
    pool = HFModelPool(modules, model_class="CLIPVisionModel")
    ensemble = build().run(pool)
    place = tmp_path / "new" / "ensemble"
    for _ in range(2):  # the second time in place of the first
        ensemble.save(place, pool, {"seed": 1})
    described = json.loads((place / "ensemble.json").read_text())
    assert described == {
        "models": ["a", "b", "Cats/Dogs"],
        "weights": ensemble.weights,
        "of": ensemble.of,
    }
    directories = sorted(str(f.parent.relative_to(place)) for f in place.rglob("config.json"))
    assert directories == ["Cats%2FDogs", "a", "b"]
    again = HFModelPool(
        {
            name: str(place / directory)
            for name, directory in zip(["Cats/Dogs", "a", "b"], directories, strict=True)
        },
        model_class="CLIPVisionModel",
    )
    loaded = load_ensemble(place, {name: again.load_model(name) for name in again.model_names})
    assert type(loaded) is type(ensemble) and loaded.names == ensemble.names
    assert (loaded.weights, loaded.of) == (ensemble.weights, ensemble.of)
    mine, theirs = ensemble.state_dict(), loaded.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine) and mine.keys() == theirs.keys()


def test_bad_arguments() -> None:
    for method in (SimpleEnsembleAlgorithm, WeightedEnsembleAlgorithm, MaxModelPredictorAlgorithm):
        with pytest.raises(FusionBenchError, match=r"of: 'logit' is unknown\. Did you"):
            method(of="logit")  # type: ignore[arg-type]
    models = of([1], [2])
    with pytest.raises(FusionBenchError, match=r"weights: 3 values for 2 models \(a, b"):
        WeightedEnsembleAlgorithm([1, 2, 3]).run(models)
    with pytest.raises(FusionBenchError, match=r"weights: the weights sum to zero"):
        WeightedEnsembleAlgorithm([1, -1]).run(models)
    assert WeightedEnsembleAlgorithm([1, -1], normalize=False).run(models)().tolist() == [-1]
    with pytest.raises(FusionBenchError, match=r"weights: negative weights would"):
        WeightedEnsembleAlgorithm([2, -1], of="probabilities").run(models)
