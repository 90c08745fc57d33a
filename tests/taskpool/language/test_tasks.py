"""Tasks of language models against plain computations in float64, and what they refuse."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from fixtures_language import BOS, CPU, LENGTH, asked, greedy, letters, reference, tiny
from torch import nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import SampleScores, array_texts, text_array
from fusion_bench.results.metrics import METRICS
from fusion_bench.taskpool import (
    GenerationTask,
    MultipleChoiceTask,
    PerplexityTask,
    Task,
    TaskPool,
)
from fusion_bench.taskpool.language.requests import Generation
from fusion_bench.taskpool.language.tuning import NOTHING, by_length, filled
from fusion_bench.tokenizer import TokenizerSource

QUESTIONS: dict[str, list[Any]] = {
    "prompt": ["one and one", "sea", "a long question about a cat"],
    "choices": [["two", "three"], ["salt", "s", "sweet"], ["it sleeps", "it flies"]],
    "label": [0, 2, 1],
    "answer": ["two", "sweet", "it flies"],
}
TEXTS = ["the cat sat.", "a longer text of many letters, " * 6, "é"]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("Llama")


def evaluated(task: Task, module: nn.Module, tokenizer: Any = None) -> SampleScores:
    """Evaluate one task in a pool without a cache."""
    pool = TaskPool({"task": task}, cache=False, dataloader_kwargs={"batch_size": 2})
    pool = pool.with_tokenizer(TokenizerSource(lambda: tokenizer or letters()))
    return pool.evaluate(module, CPU)["task"]


def values(scores: SampleScores) -> dict[str, float]:
    return {name: scores.value(METRICS[name]) for name in scores.statistics}


def likelihoods(module: nn.Module, prompt: str, choices: Sequence[str]) -> np.ndarray:
    encoder = asked(module).encoder
    requests = encoder.likelihoods([(prompt, f" {choice}") for choice in choices])
    return np.array([reference(module, own)[0] for own in requests])


def test_multiple_choice(llama: nn.Module) -> None:
    scores = evaluated(MultipleChoiceTask(Dataset.from_dict(QUESTIONS), name="task"), llama)
    right, by_byte, losses = [], [], []
    rows = zip(*(QUESTIONS[k] for k in ("prompt", "choices", "label")), strict=True)
    for prompt, choices, label in rows:
        found = likelihoods(llama, prompt, choices)
        right.append(found.argmax() == label)
        by_byte.append((found / [len(c) for c in choices]).argmax() == label)
        losses.append(np.log(np.exp(found - found.max()).sum()) + found.max() - found[label])
    assert values(scores) == pytest.approx(
        {
            "accuracy": np.mean(right),
            "accuracy_per_byte": np.mean(by_byte),
            "loss": np.mean(losses),
        },
        rel=1e-5,
    )
    assert scores.details["labels"].tolist() == QUESTIONS["label"]
    assert not scores.details["tied"].any()


def test_choices_from_templates_and_labels_of_all_kinds(llama: nn.Module) -> None:
    rows = {
        "q": ["x", "y", "z"],
        "a": ["one", "two", "no"],
        "b": ["four", "five", "yes"],
        "key": ["B", "1", "no"],
    }
    task = MultipleChoiceTask(
        Dataset.from_dict(rows),
        prompt="Question: {{q}}\n",
        choices=["{{a}}", "{{b}}!"],
        label="key",
        name="task",
    )
    evaluated(task, llama)
    pool = TaskPool({"task": task}, cache=False)
    pool = pool.with_tokenizer(TokenizerSource(letters))
    pool.prepare(CPU)
    own: Any = pool.tasks["task"]
    assert [item.label for item in own.items] == [1, 1, 0]
    assert own.items[0].prompt == "Question: x\n"
    assert own.items[0].choices == (" one", " four!")


def test_a_part_of_a_column(llama: nn.Module) -> None:
    rows = [{"q": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "key": "2"}]
    task = MultipleChoiceTask(
        Dataset.from_list(rows),
        prompt="q",
        choices="choices.text",
        label="{{choices.label.index(key)}}",
        name="task",
    )
    assert evaluated(task, llama).details["labels"].tolist() == [1]


def test_ties_and_cut_prompts_are_told(llama: nn.Module) -> None:
    constant = tiny("Llama", seed=5)
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
    rows = {"prompt": ["a", "b" * 80], "choices": [["x", "y"], ["x", "yz"]], "label": [0, 0]}
    pool = TaskPool({"q": MultipleChoiceTask(Dataset.from_dict(rows), name="q")}, cache=False)
    pool = pool.with_tokenizer(TokenizerSource(letters))
    pool.evaluate(constant, CPU, name="constant")
    pool.evaluate(llama, CPU, name="llama")
    assert pool.notes == [
        "Task 'q': 1 of 2 samples are longer than what the model reads, and lost their beginnings.",
        "'constant' on 'q': the best choices of 1 of 2 samples are tied; the first of them is "
        "taken.",
    ]


@pytest.mark.parametrize("kind", ("Llama", "T5"))
def test_generation(kind: str) -> None:
    module = tiny(kind)
    encoder = asked(module).encoder
    prompts = QUESTIONS["prompt"]
    written = [
        letters().decode(greedy(module, Generation(tokens, (), 7)), skip_special_tokens=True)
        for tokens in encoder.texts(prompts)
    ]
    rows = {"prompt": prompts, "answer": [f" {written[0]} ", "no", ["no", written[2]][1]]}
    task = GenerationTask(Dataset.from_dict(rows), max_new_tokens=7, stop=[], name="task")
    scores = evaluated(task, module)
    assert scores.statistics["exact_match"][:, 0].tolist() == [1, 0, 1]
    assert array_texts(scores.details["answers"]) == written


def test_what_is_compared() -> None:
    def right(text: str, answer: str, **options: Any) -> bool:
        rows = Dataset.from_dict({"prompt": ["x"], "answer": [answer]})
        task = GenerationTask(rows, name="t", **options)
        return task.is_right(text, task.with_tokenizer(SOURCE).item(rows[0]))

    assert right(" Yes ", "Yes")
    assert not right("yes", "Yes")
    assert right("yes", "Yes", ignore_case=True)
    assert right("so the answer is 42.", "42", extract=r"answer is (\d+)")
    assert not right("42", "42", extract=r"answer is (\d+)")


SOURCE = TokenizerSource(letters)


def test_texts_survive_as_arrays() -> None:
    texts = ["", "a", "é – ü", "x\ny"]
    assert array_texts(text_array(texts)) == texts


@pytest.mark.parametrize("bos", (True, False))
@pytest.mark.parametrize("stride", (None, 7, LENGTH))
def test_perplexity(llama: nn.Module, bos: bool, stride: int | None) -> None:
    """The token in front is read and never scored, whether the tokenizer adds it or not."""
    task = PerplexityTask(Dataset.from_dict({"text": TEXTS[:2]}), stride=stride, name="task")
    scores = evaluated(task, llama, letters(bos=bos))
    wide: Any = llama.double()
    nats = []
    for text in TEXTS[:2]:
        ids = [BOS, *map(ord, text)]
        scored, total = 1, 0.0
        while scored < len(ids):
            count = LENGTH if scored == 1 else (stride or LENGTH // 2)
            end = min(scored + count, len(ids))
            start = max(0, end - 1 - LENGTH)
            with torch.no_grad():
                logits = wide(input_ids=torch.tensor([ids[start : end - 1]])).logits[0]
            each = logits.log_softmax(-1)[scored - 1 - start :]
            total -= float(each[range(end - scored), ids[scored:end]].sum())
            scored = end
        nats.append(total)
    llama.float()
    sizes = [len(text) for text in TEXTS[:2]]
    assert values(scores) == pytest.approx(
        {
            "perplexity": np.exp(sum(nats) / sum(sizes)),
            "bits_per_byte": sum(nats) / sum(sizes) / np.log(2),
        },
        rel=1e-5,
    )


def test_bytes_are_not_letters(llama: nn.Module) -> None:
    scores = evaluated(PerplexityTask(Dataset.from_dict({"text": ["é"]}), name="task"), llama)
    assert scores.statistics["bits_per_byte"][0, 1] == 2
    assert scores.statistics["perplexity"][0, 1] == 1


def test_a_chat(llama: nn.Module) -> None:
    rows = Dataset.from_dict({"prompt": ["hi"], "answer": ["x"]})
    task = GenerationTask(rows, apply_chat_template=True, system_prompt="be kind", name="task")
    own = task.with_tokenizer(TokenizerSource(lambda: letters(chat=True)))
    assert own.item(rows[0]).prompt == "[system]be kind[user]hi[reply]"
    with pytest.raises(FusionBenchError, match="the tokenizer has no chat template"):
        evaluated(task, llama)
    with pytest.raises(FusionBenchError, match="needs a chat template"):
        GenerationTask(rows, system_prompt="be kind")


def refused(task: Task, tokenizer: Any = None, module: nn.Module | None = None) -> str:
    with pytest.raises(FusionBenchError) as caught:
        evaluated(task, module or tiny("Llama"), tokenizer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 3, 1]}, "sample 1: the label 3 is none of its 3 choices"),
        ({"label": [0, -1, 1]}, "A label of -1 marks an unlabelled split"),
        ({"choices": [["a", "b"], ["a"], ["a", "b"]]}, "sample 1: it has 1 answers"),
        ({"choices": [["a", ""], ["a", "b"], ["a", "b"]]}, "sample 0: the answer '' is no text"),
        ({"choices": ["ab", "ab", "ab"]}, "'choices' holds no list of answers"),
        ({"prompt": [1, 2, 3]}, "'prompt' holds 1, not a text"),
    ],
)
def test_bad_questions(change: Mapping[str, list[Any]], message: str) -> None:
    rows = Dataset.from_dict({**QUESTIONS, **change})
    said = refused(MultipleChoiceTask(rows, name="q"))
    assert message in said
    assert "tasks.q.dataset" in said


def test_bad_texts() -> None:
    rows = Dataset.from_dict({"text": ["a", ""], "answer": ["x", " "], "prompt": ["x", "y"]})
    assert "sample 1: the text is empty" in refused(PerplexityTask(rows, name="t"))
    assert "sample 1: the answer ' ' is no text" in refused(GenerationTask(rows, name="t"))
    said = refused(PerplexityTask(rows, text="txt", name="t"))
    assert "tasks.t.text: the dataset has no column 'txt'" in said
    assert "text" in said
    failing = refused(PerplexityTask(rows, text="{{ text.nothing() }}", name="t"))
    assert "sample 0: the template fails" in failing
    with pytest.raises(FusionBenchError, match="the template is wrong"):
        PerplexityTask(rows, text="{{ text")
    nothing = letters(bos=False)
    nothing.bos_token = nothing.eos_token = None
    single = Dataset.from_dict({"text": ["a"]})
    assert "single token" in refused(PerplexityTask(single, name="t"), nothing)


def test_a_template_cannot_reach_python() -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    attack = "{{ cycler.__init__.__globals__.os.popen('touch /tmp/x').read() }}"
    assert "is unsafe" in refused(PerplexityTask(rows, text=attack, name="t"))


def test_no_tokenizer() -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    pool = TaskPool({"t": PerplexityTask(rows, name="t")}, cache=False)
    plan = pool.with_tokenizer(TokenizerSource(lambda: None)).plan()
    assert [str(problem) for problem in plan.problems] == [
        "tasks.t.tokenizer: the models have no tokenizer. Name one: "
        "'tasks.t.tokenizer=path/to/one'."
    ]
    own = TaskPool({"t": PerplexityTask(rows, tokenizer=letters(), name="t")}, cache=False)
    same = own.with_tokenizer(TokenizerSource(lambda: None))
    assert not same.plan().problems
    assert same is own.with_tokenizer(TokenizerSource(lambda: None)) or same.tasks == own.tasks


def test_results_depend_on_all_that_a_model_reads(llama: nn.Module) -> None:
    rows = Dataset.from_dict(QUESTIONS)

    def key(tokenizer: Any = None, **options: Any) -> str | None:
        pool = TaskPool({"t": GenerationTask(rows, name="t", **options)})
        pool = pool.with_tokenizer(TokenizerSource(lambda: tokenizer or letters()))
        pool.prepare(CPU)
        return pool.identity("t", CPU)

    keys = [
        key(),
        key(letters(eos=True)),
        key(prompt="{{prompt}} "),
        key(max_new_tokens=3),
        key(stop=["."]),
        key(ignore_case=True),
        key(max_length=32),
        key(letters(chat=True), apply_chat_template=True),
        key(letters(chat=True), apply_chat_template=True, system_prompt="x"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


@pytest.mark.parametrize("kind", (MultipleChoiceTask, GenerationTask, PerplexityTask))
def test_methods_learn_from_texts_without_padding(kind: Any, llama: nn.Module) -> None:
    rows = Dataset.from_dict({**QUESTIONS, "text": ["a text", "longer text", "t x"]})
    options = {"max_new_tokens": 8} if kind is GenerationTask else {}
    pool = TaskPool({"task": kind(rows, name="task", **options)}, cache=False)
    pool = pool.with_tokenizer(TokenizerSource(letters))
    data = pool.tuning({"task": rows}, CPU, ("modelpool", "val_datasets"))["task"]
    assert data.is_test
    read: list[torch.Tensor] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    ((inputs, labels),) = data.batches(data.sample(None), 8)
    logits = data.classify(llama)(inputs)
    handle.remove()
    assert all((own != NOTHING).all() for own in read)
    assert len(logits) == len(labels) == 3
    logits.log_softmax(-1)[range(3), labels].sum().backward()
    if kind is MultipleChoiceTask:
        rows_of = zip(QUESTIONS["prompt"], QUESTIONS["choices"], strict=True)
        for own, (prompt, choices) in zip(logits, rows_of, strict=True):
            expected = likelihoods(llama, prompt, choices)
            np.testing.assert_allclose(own[: len(choices)].detach(), expected, rtol=1e-4)
            assert (own[len(choices) :] == -torch.inf).all()
    assert data.evaluate(llama).num_samples == 3
    llama.zero_grad()


@pytest.mark.parametrize("kind", (MultipleChoiceTask, GenerationTask, PerplexityTask))
def test_methods_learn_from_the_ends_of_long_texts(kind: Any) -> None:
    """A model with as many positions as it can read raises for one more token."""
    module = tiny("GPT2")
    long = {"prompt": ["a" * 80, "b"], "choices": [["x", "yz"]] * 2, "label": [0, 1]}
    rows = Dataset.from_dict({**long, "answer": ["x", "y"], "text": ["ab" * 50, "c d"]})
    options = {"max_new_tokens": 8} if kind is GenerationTask else {}
    pool = TaskPool({"task": kind(rows, name="task", **options)}, cache=False)
    pool = pool.with_tokenizer(TokenizerSource(letters))
    data = pool.tuning({"task": rows}, CPU, ("modelpool", "val_datasets"))["task"]
    ((inputs, _),) = data.batches(data.sample(None), 8)
    logits = data.classify(module)(inputs)
    assert logits.isfinite().all()
    if kind is MultipleChoiceTask:
        encoder = asked(module).encoder
        requests = encoder.likelihoods([("a" * 80, " x"), ("a" * 80, " yz")])
        expected, _ = asked(module).log_likelihoods(requests)
        np.testing.assert_allclose(logits[0].detach(), expected, rtol=1e-4)


def test_the_samples_of_all_tasks_are_looked_at() -> None:
    bad = Dataset.from_dict({**QUESTIONS, "label": [0, 9, 1]})
    tasks = {name: MultipleChoiceTask(bad, name=name) for name in ("a", "b")}
    pool = TaskPool(tasks, cache=False).with_tokenizer(TokenizerSource(letters))
    with pytest.raises(FusionBenchError) as caught:
        pool.prepare(CPU)
    assert [own.key for own in caught.value.problems] == ["tasks.a.dataset", "tasks.b.dataset"]


def test_rows_by_their_length() -> None:
    ids = filled([(1, 2, 3), (4,), (5, 6, 7), ()])
    found = {tuple(rows.tolist()): own.tolist() for rows, own in by_length(ids)}
    assert found == {(1,): [[4]], (0, 2): [[1, 2, 3], [5, 6, 7]]}
    cut = {tuple(rows.tolist()): own.tolist() for rows, own in by_length(ids, 2)}
    assert cut == {(1,): [[4]], (0, 2): [[2, 3], [6, 7]]}
