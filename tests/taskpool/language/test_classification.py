"""Classification of texts, against transformers in float64 without batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from fixtures_texts import CPU, LABELS, OTHERS, TEXTS, entropy, pool_of, write_classifier
from torch import Tensor, nn

from fusion_bench.method import (
    AdaMergingAlgorithm,
    FisherMergingAlgorithm,
    GreedySoupAlgorithm,
    LearnedSoupAlgorithm,
    RegMeanAlgorithm,
)
from fusion_bench.method.ensemble import ensemble_of
from fusion_bench.modelpool import SequenceClassificationModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.results.metrics import F1, MATTHEWS, PEARSON, SPEARMAN
from fusion_bench.taskpool import LearningData, SequenceClassificationTask, Task, TaskPool
from fusion_bench.weights import Weights, in_memory

KINDS = ("bert", "roberta", "gpt2")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write for each kind `base`, `a` and `b`; `number` with one value, `three` with classes."""
    root = tmp_path_factory.mktemp("classifiers")
    for kind in KINDS:
        for seed, name in enumerate(("base", "a", "b")):
            write_classifier(root / kind / name, kind, seed)
    write_classifier(root / "bert" / "number", "bert", 3, num_labels=1)
    write_classifier(root / "bert" / "three", "bert", 4, num_labels=3)
    write_classifier(root / "bert" / "narrow", "bert", 5, hidden_dropout_prob=0.0)
    return root


def data(**more: Any) -> Dataset:
    columns = {"text": TEXTS, "other": OTHERS, "label": LABELS, "score": [0.5, 2, 1, 3, 2.5]}
    return Dataset.from_dict({**columns, **more})


def models(family: Path, kind: str = "bert", **more: Any) -> SequenceClassificationModelPool:
    names = {"_pretrained_": "base", "a": "a", "b": "b"}
    folders = {name: str(family / kind / folder) for name, folder in names.items()}
    return SequenceClassificationModelPool(folders, **more)


def tasks(family: Path, kind: str = "bert", head: str = "a", **more: Any) -> TaskPool:
    batch_size = more.pop("batch_size", None)
    given = {"dataset": data(), "head": str(family / kind / head), "name": "t", **more}
    return pool_of(SequenceClassificationTask(**given), models(family, kind).tokenizer, batch_size)


def plain(folder: Path, pairs: bool) -> np.ndarray:
    """Return the logits of a classifier that reads one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text, other in zip(TEXTS, OTHERS, strict=True):
        encoded = tokenizer(text, other if pairs else None, return_tensors="pt")
        if "gpt2" in str(folder):  # it would embed the types
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            rows.append(model.double().eval()(**encoded).logits[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_classifier_whatever_the_batch(family: Path, kind: str, pairs: bool) -> None:
    expected = plain(family / kind / "a", pairs)
    losses = np.logaddexp.reduce(expected, axis=1) - expected[range(len(LABELS)), LABELS]
    model = models(family, kind).load_model("a")
    for size in (1, 2, 5):
        pool = tasks(family, kind, text_pair="other" if pairs else None, batch_size=size)
        scores = pool.evaluate(model, CPU)["t"]
        assert scores.details["predictions"].tolist() == expected.argmax(axis=1).tolist()
        np.testing.assert_allclose(scores.statistics["loss"][:, 0], losses, rtol=1e-5)
    assert getattr(models(family, kind).tokenizer.tokenizer, "pad_token", None) in (None, "<pad>")


def test_memory_that_runs_out_halves_the_batch(family: Path) -> None:
    model: Any = models(family).load_model("a")
    forward, sizes = model.forward, []

    def greedy(input_ids: Tensor, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(input_ids, **more)

    expected = tasks(family).evaluate(model, CPU)["t"].statistics["loss"]
    model.forward = greedy
    pool = tasks(family, batch_size=5)
    found = pool.evaluate(model, CPU)["t"].statistics["loss"]
    assert sizes == [5, 2, 2, 1] and found == pytest.approx(expected)
    assert "2 samples were evaluated at a time" in pool.notes[-1]


def test_it_is_a_task(family: Path) -> None:
    """As mypy sees it, too; and another of its datasets evaluates the same."""
    task: Task = SequenceClassificationTask(data(), str(family / "bert" / "a"), name="t")
    pool = pool_of(task, models(family).tokenizer)
    learned: LearningData = pool.tuning({"t": data().select(range(3))}, CPU, ("here",))["t"]
    assert (learned.task, len(learned), learned.metric.name) == ("t", 3, "accuracy")
    assert learned.is_test
    model = models(family).load_model("a")
    whole = pool.evaluate(model, CPU)["t"]
    part = learned.evaluate(model)
    assert whole.at(whole.samples < 3).statistics["loss"] == pytest.approx(part.statistics["loss"])
    again = pool.evaluating({"t": learned}).evaluate(model, CPU)["t"]
    assert np.array_equal(again.statistics["loss"], part.statistics["loss"])
    described = pool.describe("t")
    assert [metric.name for metric in described.metrics] == ["accuracy", "f1", "matthews", "loss"]
    assert described.num_classes == 2


def test_f1_and_matthews_by_hand(family: Path) -> None:
    scores = tasks(family).evaluate(models(family).load_model("b"), CPU)["t"]
    truth, found = np.array(LABELS), scores.details["predictions"]
    tp, fp = ((truth == own) & (found == 1) for own in (1, 0))
    fn, tn = ((truth == own) & (found == 0) for own in (1, 0))
    a, b, c, d = (int(own.sum()) for own in (tp, fp, fn, tn))
    assert scores.value(F1) == (2 * a / (2 * a + b + c) if a + b + c else 0)
    below = ((a + b) * (a + c) * (d + b) * (d + c)) ** 0.5
    assert scores.value(MATTHEWS) == pytest.approx((a * d - b * c) / below if below else 0)


def test_a_number_is_predicted(family: Path) -> None:
    pool = tasks(family, head="number", label="score")
    scores = pool.evaluate(models(family).load_model("a"), CPU)["t"]
    assert [metric.name for metric in pool.describe("t").metrics] == ["pearson", "spearman"]
    found, truth = scores.details["predictions"], scores.details["labels"]
    assert scores.value(PEARSON) == pytest.approx(np.corrcoef(found, truth)[0, 1])
    assert np.isfinite(scores.value(SPEARMAN))
    assert pool.notes == []


def test_a_constant_model_has_no_correlation(family: Path) -> None:
    head = transformers.AutoModelForSequenceClassification.from_pretrained(family / "bert/number")
    head.classifier.weight.data.zero_()
    task = SequenceClassificationTask(data(), head, label="score", name="t")
    pool = pool_of(task, models(family).tokenizer)
    scores = pool.evaluate(models(family).load_model("a"), CPU, name="merged")["t"]
    assert np.isnan(scores.value(PEARSON)) and np.isnan(scores.value(SPEARMAN))
    assert "'merged' on 't': pearson and spearman has no value" in pool.notes[0]
    assert head.bert is not None  # a module that is given stays as it is


def test_classes_by_name_and_three_of_them(family: Path) -> None:
    names = [["LABEL_0", "LABEL_1"][label] for label in LABELS]
    by_name = tasks(family, dataset=data(label=names))
    model = models(family).load_model("a")
    assert by_name.evaluate(model, CPU)["t"].details["labels"].tolist() == LABELS
    pool = tasks(family, head="three")
    scores = pool.evaluate(model, CPU)["t"]
    assert list(scores.statistics) == ["accuracy", "loss"]
    assert pool.describe("t").num_classes == 3


def test_the_head_is_a_part_of_what_a_result_is_of(family: Path) -> None:
    one, two = (tasks(family, head=head) for head in "ab")
    for pool in (one, two):
        pool.prepare(CPU)
    assert one.tasks["t"].key() != two.tasks["t"].key()
    heads = [pool.describe("t").identity["head"] for pool in (one, two)]
    assert heads[0] != heads[1]


def test_an_ensemble_of_classifiers(family: Path) -> None:
    members = {name: models(family).load_model(name) for name in "ab"}
    found = [tasks(family).evaluate(own, CPU)["t"] for own in members.values()]
    both = tasks(family).evaluate(ensemble_of(members, [0.5, 0.5], "logits"), CPU)["t"]
    together = tasks(family).evaluate(ensemble_of(members, None, "outputs"), CPU)["t"]
    losses = [own.statistics["loss"][:, 0] for own in (*found, both, together)]
    assert not np.allclose(losses[0], losses[2]) and not np.allclose(losses[2], losses[3])
    numbers = tasks(family, head="number", label="score")
    with pytest.raises(FusionBenchError, match="it has no classes"):
        numbers.evaluate(ensemble_of(members, [0.5, 0.5], "logits"), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_loses_its_end(family: Path, kind: str) -> None:
    texts = ["the cat " * 40, *TEXTS[1:]]
    pool = tasks(family, kind, dataset=data(text=texts))
    scores = pool.evaluate(models(family, kind).load_model("a"), CPU)["t"]
    assert scores.details["truncated"].tolist() == [1, 0, 0, 0, 0]
    assert "1 of 5 samples are longer" in pool.notes[0] and "lost their ends" in pool.notes[0]
    before = models(family, kind).tokenizer.identity
    assert before == pool.describe("t").identity["tokenizer"]  # cutting is no part of it


def wrong(family: Path, kind: str = "bert", **more: Any) -> str:
    model: nn.Module = more.pop("model", None) or models(family, kind).load_model("a")
    with pytest.raises(FusionBenchError) as caught:
        tasks(family, kind, **more).evaluate(model, CPU, name="merged")
    assert len(caught.value.problems) == 1
    return str(caught.value.problems[0])


def test_what_is_wrong_is_said(family: Path) -> None:
    unlabelled = wrong(family, dataset=data(label=[0, 1, -1, 0, 1]))
    assert unlabelled.startswith("tasks.t.dataset: sample 2: the label -1 is none of the 2 classes")
    assert "unlabelled split" in unlabelled
    assert "sample 1: the label 2 is none" in wrong(family, dataset=data(label=[0, 2, 1, 0, 1]))
    assert "'x' is none of the 2" in wrong(family, dataset=data(label=["x"] * 5))
    assert "sample 0: the label None is no number" in wrong(
        family, head="number", label="none", dataset=data(none=[None] * 5)
    )
    empty = wrong(family, dataset=data(text=["", *TEXTS[1:]]))
    assert empty == "tasks.t.dataset: sample 0: the text is empty. Leave the sample out."
    assert "metrics[0]: 'f1' is not measured of 3 classes" in wrong(
        family, head="three", metrics=["f1"]
    )
    assert wrong(family, text="words").startswith("tasks.t.text: the dataset has no column 'words'")


def test_another_number_or_order_of_classes(family: Path, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    rows = {"text": TEXTS, "label": LABELS}
    three = Dataset.from_dict(rows, features=features)
    assert wrong(family, dataset=three) == (
        "tasks.t.dataset: it has 3 classes, the head has 2. Name the head of this task."
    )
    write_classifier(tmp_path / "head", "bert", id2label={0: "Y", 1: "X"})
    features["label"] = ClassLabel(names=["x", "y"])
    swapped = {"dataset": Dataset.from_dict(rows, features=features), "head": tmp_path / "head"}
    assert "its classes are x, y, the head's are y, x" in wrong(family, **swapped)
    pool = tasks(family, **swapped, label="{{ 'XY'[label] }}")
    scores = pool.evaluate(models(family).load_model("a"), CPU)["t"]
    assert scores.details["labels"].tolist() == [1 - label for label in LABELS]


def test_a_head_of_another_model(family: Path, tmp_path: Path) -> None:
    other = models(family, "roberta").load_model("a")
    assert wrong(family, model=other) == (
        "tasks.t.head: it is of a model of type 'bert', 'merged' is of type 'roberta'. Name a head "
        "for such a model."
    )
    config = transformers.BertConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    wide = transformers.BertModel(config)
    assert "tasks.t.head: it is for 12 features, 'merged' has 16." in wrong(family, model=wide)
    bare = models(family).load_model("a")
    bare.pooler = None
    assert "it needs a pooler, and 'merged' has none" in wrong(family, model=bare)
    models(family).load_model("a").save_pretrained(tmp_path / "bare")
    task = SequenceClassificationTask(data(), str(tmp_path / "bare"), name="t")
    with pytest.raises(FusionBenchError, match="is not a classifier; it lacks 'classifier"):
        pool_of(task, models(family).tokenizer).prepare(CPU)
    with pytest.raises(FusionBenchError, match="there is none, and classes need one") as caught:
        SequenceClassificationTask(data())
    assert caught.value.problems[0].key == "head"


def test_no_number_and_no_tokenizer(family: Path) -> None:
    broken = models(family).load_model("a")
    next(broken.parameters()).data.fill_(float("nan"))
    assert "'merged' gives values that are no numbers" in wrong(family, model=broken)
    task = SequenceClassificationTask(data(), str(family / "bert" / "a"), name="t")
    with pytest.raises(FusionBenchError, match=r"tasks\.t\.tokenizer: there is no tokenizer"):
        pool_of(task).prepare(CPU)


def test_a_dry_run_tells_what_is_wrong(family: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "data")
    data().save_to_disk(place)
    node = {"_target_": "datasets.load_from_disk", "dataset_path": place}
    models(family).load_model("a").save_pretrained(tmp_path / "bare")
    kind = "fusion_bench.taskpool.SequenceClassificationTask"
    head, tokenizer = str(family / "bert" / "a"), str(family / "bert" / "a")
    common = {"_target_": kind, "dataset": node, "head": head, "tokenizer": tokenizer}
    pool = TaskPool(
        {
            "fine": common,
            "a": {**common, "text_pair": "second"},
            "b": {**common, "head": str(tmp_path / "bare")},
            "c": {**common, "head": str(tmp_path / "nothing")},
        }
    )
    found = [str(problem) for problem in pool.plan().problems]
    assert found[0].startswith("tasks.a.text_pair: the dataset has no column 'second'.")
    assert found[1].startswith(
        f"tasks.b.head: '{tmp_path}/bare' is a BertModel, which has no head of a classifier."
    )
    assert found[2].startswith("tasks.c.head: ") and len(found) == 3


# What methods learn.


def learning(family: Path, kind: str) -> dict[str, LearningData]:
    task = {
        name: SequenceClassificationTask(data(), str(family / kind / name), name=name)
        for name in "ab"
    }
    pool = TaskPool(task, cache=False).with_tokenizer(models(family, kind).tokenizer)
    return dict(pool.tuning({"a": data(), "b": data()}, CPU, ("here",)))


def logits(model: nn.Module, own: LearningData) -> Tensor:
    inputs, _ = next(own.batches(own.sample(None), 100))
    return own.classify(model)(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_methods_see_is_the_classifier(family: Path, kind: str) -> None:
    found = logits(models(family, kind).load_model("a"), learning(family, kind)["a"])
    np.testing.assert_allclose(
        found.detach().numpy(), plain(family / kind / "a", False), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_that_of_the_classifier(family: Path, kind: str) -> None:
    model = models(family, kind).load_model("a").double()
    found = FisherMergingAlgorithm(estimator="exact").fisher(
        model.requires_grad_(True), "a", learning(family, kind)["a"]
    )
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(family / kind / "a")
    whole = whole.double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / kind / "a")
    body = dict(whole.base_model.named_parameters())
    expected = {key: torch.zeros_like(own) for key, own in body.items()}
    for text in TEXTS:
        log_probs = whole(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits
        log_probs = log_probs.log_softmax(dim=-1)[0]
        for value in log_probs:
            parts = torch.autograd.grad(
                value, list(body.values()), retain_graph=True, allow_unused=True
            )
            for total, part in zip(expected.values(), parts, strict=True):
                if part is not None:
                    total += value.exp().detach() * part.square() / len(TEXTS)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_nothing_but_tokens_goes_through_layers(family: Path, kind: str) -> None:
    model = models(family, kind).load_model("a")
    seen: list[int] = []
    layer: Any = model.get_submodule("encoder.layer.0.intermediate.dense")
    layer.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0][..., 0].numel()))
    with torch.no_grad():
        logits(model, learning(family, kind)["a"])
    tokenizer = models(family, kind).tokenizer.tokenizer
    assert sum(seen) == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    merged = RegMeanAlgorithm(num_regmean_examples=None, batch_size=2)
    once = merged.run(models(family, kind), CPU, learning(family, kind))
    merged.batch_size = 5
    again = merged.run(models(family, kind), CPU, learning(family, kind))
    assert isinstance(once, Weights) and isinstance(again, Weights)
    for key, value in in_memory(once).items():
        torch.testing.assert_close(value, again[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adamerging_lowers_the_entropy(family: Path, kind: str) -> None:
    pool, own = models(family, kind), learning(family, kind)

    def mean(steps: int) -> float:
        method = AdaMergingAlgorithm("task", lr=0.1, max_steps=steps, batch_size=5)
        merged = method.run(pool, CPU, own)
        assert isinstance(merged, Weights)
        model = pool.build_model(merged)
        return sum(entropy(logits(model, each)) for each in own.values())

    assert mean(5) < mean(0)


def test_a_number_has_no_classes_to_learn_from(family: Path) -> None:
    head = str(family / "bert" / "number")
    task = SequenceClassificationTask(data(), head, label="score", name="a")
    pool = TaskPool({"a": task}, cache=False).with_tokenizer(models(family).tokenizer)
    own = pool.tuning({"a": data()}, CPU, ("here",))
    inputs, labels = next(own["a"].batches(own["a"].sample(None), 2))
    assert inputs.shape[:2] == (2, 2) and labels.tolist() == [0.5, 2]
    folders = {name: str(family / "bert" / name) for name in ("base", "a")}
    both = SequenceClassificationModelPool({"_pretrained_": folders["base"], "a": folders["a"]})
    for method in (FisherMergingAlgorithm(), AdaMergingAlgorithm(max_steps=1)):
        with pytest.raises(FusionBenchError, match="'a' predicts a number"):
            method.run(both, CPU, own)
    assert isinstance(RegMeanAlgorithm().run(both, CPU, own), Weights)


def test_soups_are_cooked(family: Path) -> None:
    own = learning(family, "bert")
    for method in (GreedySoupAlgorithm(), LearnedSoupAlgorithm(max_steps=3, batch_size=4)):
        merged = method.run(models(family), CPU, own)
        assert isinstance(merged, Weights)
        assert tasks(family).evaluate(models(family).build_model(merged), CPU)["t"].num_samples == 5
