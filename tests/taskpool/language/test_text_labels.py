"""Labels that a model writes, against transformers without batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from fixtures_llm import seeded
from fixtures_texts import CPU, LABELS, TEXTS, WORDS, entropy, pool_of, write_t5, write_tokenizer
from torch import Tensor, nn

from fusion_bench.method import (
    AdaMergingAlgorithm,
    FisherMergingAlgorithm,
    GreedySoupAlgorithm,
    RegMeanAlgorithm,
)
from fusion_bench.modelpool import Seq2SeqLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.results.metrics import F1, MATTHEWS, PEARSON
from fusion_bench.taskpool import LearningData, TaskPool, TextLabelTask
from fusion_bench.weights import Weights

PROMPT = "the {{text}} on"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base`, `a` and `b`."""
    root = tmp_path_factory.mktemp("t5")
    for seed, name in enumerate(("base", "a", "b")):
        write_t5(root / name, seed)
    return root


@pytest.fixture(scope="module")
def model(family: Path) -> nn.Module:
    return models(family).load_model("a")


@pytest.fixture(scope="module")
def written(family: Path) -> list[str]:
    """What `a` writes, by its own means."""
    own = transformers.T5ForConditionalGeneration.from_pretrained(family / "a").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "a")
    texts = []
    for text in TEXTS:
        ids = tokenizer(f"the {text} on", return_tensors="pt")["input_ids"]
        found = own.generate(ids, max_new_tokens=2, do_sample=False, num_beams=1)[0]
        texts.append(tokenizer.decode(found, skip_special_tokens=True))
    return texts


def data(**more: Any) -> Dataset:
    scores = [0.5, 2.0, 1.0, 3.0, 2.5]
    return Dataset.from_dict({"text": TEXTS, "label": LABELS, "score": scores, **more})


def models(family: Path) -> Seq2SeqLMPool:
    names = {"_pretrained_": "base", "a": "a", "b": "b"}
    return Seq2SeqLMPool({name: str(family / folder) for name, folder in names.items()})


def tasks(family: Path, batch_size: int | None = None, **more: Any) -> TaskPool:
    given = {"dataset": data(), "prompt": PROMPT, "max_new_tokens": 2, "name": "t", **more}
    return pool_of(TextLabelTask(**given), models(family).tokenizer, batch_size)


def test_what_is_written_is_compared(family: Path, model: nn.Module, written: list[str]) -> None:
    first = written[0]
    others = sorted(set(written) - {first})
    labels = [first, others[0] if others else "no"]
    expected = [labels.index(text) if text in labels else -1 for text in written]
    for size in (1, 5):
        pool = tasks(family, size, labels=labels)
        scores = pool.evaluate(model, CPU, name="merged")["t"]
        assert scores.details["predictions"].tolist() == expected
        right = [int(a == b) for a, b in zip(expected, LABELS, strict=True)]
        assert scores.statistics["accuracy"][:, 0].tolist() == right
    described = pool.describe("t")
    assert [metric.name for metric in described.metrics] == ["accuracy", "f1", "matthews"]
    assert described.num_classes == 2


def test_an_answer_that_is_none_is_wrong_and_told(family: Path, model: nn.Module) -> None:
    pool = tasks(family, labels=["under", "bird under"], max_new_tokens=1)
    scores = pool.evaluate(model, CPU, name="merged")["t"]
    unread = int((scores.details["predictions"] == -1).sum())
    assert unread and scores.details["unread"].sum() == unread
    said = f"'merged' on 't': {unread} of 5 answers are the text of no class, and are wrong."
    assert said in pool.notes
    if unread == 5:
        assert scores.value(F1) == 0 and scores.value(MATTHEWS) <= 0


def test_numbers_are_written(family: Path, model: nn.Module, written: list[str]) -> None:
    pool = tasks(family, number=True, label="score")
    scores = pool.evaluate(model, CPU, name="merged")["t"]
    values = [float(text) if text in ("1", "2") else 0.0 for text in written]
    assert scores.details["predictions"].tolist() == values
    assert scores.details["unread"].tolist() == [int(t not in ("1", "2")) for t in written]
    if len(set(values)) == 1:
        assert np.isnan(scores.value(PEARSON)) and "has no value" in pool.notes[0]
    assert "answers are no number, and count as 0." in pool.notes[-1]


def test_a_written_number_is_read(family: Path) -> None:
    task = TextLabelTask(data(), number=True)
    found = [task._read(text) for text in ("2.4", "1", "-3", "nan", "inf", "x", "")]
    assert found == [2.4, 1, -3, None, None, None, None]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "labels: give either these"),
        ({"labels": ["a", "b"], "number": True}, "labels: give either these"),
        ({"labels": [True, False]}, "labels: '[True, False]' is not a list of texts. Quote"),
        ({"labels": ["a", "a "]}, "labels: '['a', 'a ']' are not two or more different"),
        ({"labels": "abc"}, "labels: 'abc' is not a list"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, "metrics[0]: 'f1' is not measured of 3"),
        ({"number": True, "metrics": ["accuracy"]}, "metrics[0]: 'accuracy' is not measured of"),
    ],
)
def test_what_is_wrong_is_said(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(FusionBenchError) as caught:
        TextLabelTask(data(), **arguments)
    assert str(caught.value.problems[0]).startswith(problem)


def test_samples_that_are_wrong(family: Path) -> None:
    for more, problem in {
        "label": ([0, 5, 1, 0, 1], "sample 1: the label 5 is none of the 2 classes"),
        "text": (["", *TEXTS[1:]], "sample 0: the prompt is empty"),
    }.items():
        column, message = problem
        pool = tasks(family, labels=["no", "yes"], prompt="text", dataset=data(**{more: column}))
        with pytest.raises(FusionBenchError, match=message):
            pool.prepare(CPU)


# What methods learn.


def learning(family: Path, **more: Any) -> dict[str, LearningData]:
    given = {"labels": ["no", "yes under"], **more}
    task = {
        name: TextLabelTask(data(), PROMPT, max_new_tokens=2, name=name, **given) for name in "ab"
    }
    pool = TaskPool(task, cache=False).with_tokenizer(models(family).tokenizer)
    return dict(pool.tuning({"a": data(), "b": data()}, CPU, ("here",)))


def logits(model: nn.Module, own: LearningData) -> Tensor:
    inputs, _ = next(own.batches(own.sample(None), 100))
    return own.classify(model)(inputs)


def by_hand(family: Path, texts: list[str]) -> Tensor:
    """Return the likelihoods of labels that a T5 computes by itself, in float64."""
    own = transformers.T5ForConditionalGeneration.from_pretrained(family / "a").double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "a")
    rows = []
    for text in TEXTS:
        ids = tokenizer(f"the {text} on", return_tensors="pt")["input_ids"]
        row = []
        for label in texts:
            target = tokenizer(label, return_tensors="pt")["input_ids"]
            loss = own(input_ids=ids, labels=target).loss
            row.append(-loss * target.shape[1])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_the_logits_are_the_labels_likelihoods(family: Path, model: nn.Module) -> None:
    found = logits(model, learning(family)["a"])
    expected = by_hand(family, ["no", "yes under"])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_fisher_is_that_of_the_labels(family: Path) -> None:
    module = models(family).load_model("a").double().requires_grad_(True)
    found = FisherMergingAlgorithm(estimator="empirical").fisher(module, "a", learning(family)["a"])
    own = transformers.T5ForConditionalGeneration.from_pretrained(family / "a").double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "a")
    weight = own.encoder.block[0].layer[0].SelfAttention.q.weight
    total = torch.zeros_like(weight)
    for text, label in zip(TEXTS, LABELS, strict=True):
        ids = tokenizer(f"the {text} on", return_tensors="pt")["input_ids"]
        targets = [tokenizer(t, return_tensors="pt")["input_ids"] for t in ("no", "yes under")]
        values = [-own(input_ids=ids, labels=t).loss * t.shape[1] for t in targets]
        log_probs = torch.stack(values).log_softmax(dim=0)
        (gradient,) = torch.autograd.grad(log_probs[label], weight)
        total += gradient.square() / len(TEXTS)
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(found[key], total, rtol=1e-6, atol=1e-12)


def test_nothing_but_tokens_goes_through_layers(family: Path, model: nn.Module) -> None:
    seen: list[int] = []
    layer = model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wi")
    handle = layer.register_forward_hook(lambda m, i, output: seen.append(i[0][..., 0].numel()))
    with torch.no_grad():
        logits(model, learning(family)["a"])
    handle.remove()
    tokenizer = models(family).tokenizer.tokenizer
    assert sum(seen) == sum(len(tokenizer(f"the {text} on")["input_ids"]) for text in TEXTS)


def test_numbers_are_learned_by_their_first_token(family: Path, model: nn.Module) -> None:
    own = learning(family, labels=None, number=True, label="score")["a"]
    _, labels = next(own.batches(own.sample(None), 5))
    assert [WORDS[i] for i in labels.tolist()][1:3] == ["2", "1"]
    assert logits(model, own).shape == (5, len(WORDS))


def test_methods_learn(family: Path) -> None:
    pool, own = models(family), learning(family)

    def mean(steps: int) -> float:
        merged = AdaMergingAlgorithm("task", lr=0.05, max_steps=steps, batch_size=5).run(
            pool, CPU, own
        )
        assert isinstance(merged, Weights)
        built = pool.build_model(merged)
        return sum(entropy(logits(built, each)) for each in own.values())

    assert mean(10) < mean(0)
    for method in (RegMeanAlgorithm(), GreedySoupAlgorithm()):
        assert isinstance(method.run(pool, CPU, own), Weights)


def test_a_causal_model_writes_labels_too(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=12, n_layer=1, n_head=2, n_positions=24, eos_token_id=2
    )
    model = seeded(lambda: transformers.GPT2LMHeadModel(config), 0).eval()
    write_tokenizer(tmp_path, "t5")  # which ends each text; a model that goes on sees no end
    task = TextLabelTask(
        data(), PROMPT, labels=["no", "yes under"], tokenizer=str(tmp_path), name="t"
    )
    own = pool_of(task).tuning({"t": data()}, CPU, ("here",))["t"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = logits(model, own).detach()
    for row, text in enumerate(TEXTS):
        for column, label in enumerate(("no", "yes under")):
            context = tokenizer(f"the {text} on")["input_ids"][:-1]
            ids = torch.tensor([context + tokenizer(label)["input_ids"][:-1]])
            each = model(ids).logits.log_softmax(dim=-1)[0, :-1]
            value = each.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum().detach()
            assert float(found[row, column]) == pytest.approx(float(value), rel=1e-4)
