"""What the harness itself gets wrong does not reach the user."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_harness import (
    CHOICE,
    QUESTIONS,
    WRITTEN,
    byte_tokenizer,
    from_file,
    metrics,
    own_pool,
    tiny_llama,
    write_rows,
    write_task,
)
from lightning.fabric import Fabric
from torch import nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import SampleScores, array_texts
from fusion_bench.taskpool import LMEvalHarnessTaskPool


def texts(scores: SampleScores) -> list[str]:
    return array_texts(scores.details["answers"].astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data.jsonl", QUESTIONS)
    return tmp_path


class Counted(nn.Module):
    """Counts the calls of a model's forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.calls = 0
        self.model = model
        model.register_forward_pre_hook(self._count)

    def _count(self, *given: Any) -> None:
        self.calls += 1


def evaluated(
    pool: LMEvalHarnessTaskPool, model: nn.Module, fabric: Fabric, **more: Any
) -> dict[str, SampleScores]:
    return pool.evaluate(model, fabric, **more)


def same(one: SampleScores, other: SampleScores) -> bool:
    return all(
        np.allclose(one.statistics[name], other.statistics[name], rtol=1e-5)
        for name in one.statistics
    )


def test_a_second_evaluation_computes_nothing(tasks: Path, tokenizer: Any, fabric: Fabric) -> None:
    model = tiny_llama()
    counted = Counted(model)
    names = ["choice", "rolling", "written"]
    first = evaluated(
        own_pool(names, tasks, tokenizer, cache=True), model, fabric, weights_sha256="a"
    )
    assert (calls := counted.calls) > 0
    again = evaluated(
        own_pool(names, tasks, tokenizer, cache=True), model, fabric, weights_sha256="a"
    )
    assert counted.calls == calls
    assert all(same(first[name], again[name]) for name in names)
    pool = own_pool(names, tasks, tokenizer, cache=True)
    pool.prepare(fabric)
    bleu = {own.name: own for own in pool.describe("written").metrics}["bleu"]
    assert again["written"].value(bleu) == first["written"].value(bleu)


def test_another_model_has_other_answers(tasks: Path, tokenizer: Any, fabric: Fabric) -> None:
    pool = own_pool("choice,written", tasks, tokenizer, cache=True)
    one = evaluated(pool, tiny_llama(0), fabric, weights_sha256="a")
    two = evaluated(pool, tiny_llama(1), fabric, weights_sha256="b")
    fresh = evaluated(own_pool("choice,written", tasks, tokenizer), tiny_llama(1), fabric)
    assert not same(one["choice"], two["choice"])
    assert texts(one["written"]) != texts(two["written"])
    assert same(two["choice"], fresh["choice"])
    assert texts(two["written"]) == texts(fresh["written"])


def test_another_prompt_is_asked_anew(
    folder: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    found = []
    for prompt in ("Q: {{question}}", "Which is right: {{question}}"):
        config = {**CHOICE, "doc_to_text": prompt, "metric_list": metrics("brier_score")}
        write_task(folder, "one", **from_file("data.jsonl"), **config)
        pool = own_pool("one", folder, tokenizer, cache=True)
        found.append((evaluated(pool, model, fabric, weights_sha256="a"), pool.tasks["one"].key()))
    assert not same(found[0][0]["one"], found[1][0]["one"])
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("task", ["choice", "shots", "filtered", "rolling"])
def test_a_subset_is_these_documents(
    tasks: Path, tokenizer: Any, model: nn.Module, fabric: Fabric, task: str
) -> None:
    whole = evaluated(own_pool(task, tasks, tokenizer), model, fabric)[task]
    some = evaluated(own_pool(task, tasks, tokenizer, max_samples=2), model, fabric)[task]
    assert len(some.samples) == 2 and some.samples.tolist() != [0, 1]
    keep = np.isin(whole.samples, some.samples)
    assert same(whole.at(keep), some)
    assert np.array_equal(whole.details["documents"][keep], some.details["documents"])


def test_a_limit_takes_the_first_documents(
    tasks: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    whole = evaluated(own_pool("shots", tasks, tokenizer), model, fabric)["shots"]
    for limit, count in ((3, 3), (0.5, 4), (100, 7)):
        pool = own_pool("shots", tasks, tokenizer, limit=limit)
        found = evaluated(pool, model, fabric)["shots"]
        assert found.samples.tolist() == list(range(count))
        assert same(whole.at(whole.samples < count), found)


def test_the_token_in_front_is_not_scored(
    tasks: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    adds = byte_tokenizer(bos=True)
    assert adds("a")["input_ids"][0] == 0
    one, two = (
        evaluated(own_pool("rolling", tasks, own), model, fabric)["rolling"]
        for own in (tokenizer, adds)
    )
    assert same(one, two)


def test_long_texts_are_read_in_windows(tasks: Path, tokenizer: Any, fabric: Fabric) -> None:
    from fixtures_harness import by_harness

    model = tiny_llama(length=48)
    ours = evaluated(own_pool("rolling", tasks, tokenizer), model, fabric)["rolling"]
    theirs = by_harness(model, tokenizer, ["rolling"], tasks)["samples"]["rolling"]
    wanted = [-own["byte_perplexity"][0] for own in theirs]
    assert ours.statistics["byte_perplexity"][:, 0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", ["choice", "rolling", "likely"])
def test_values_that_are_no_numbers_are_refused(
    tasks: Path, tokenizer: Any, fabric: Fabric, task: str
) -> None:
    model = tiny_llama()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(FusionBenchError, match=rf"tasks\.{task}: 'model' gives values"):
        evaluated(own_pool(task, tasks, tokenizer), model, fabric)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"right": 3}, "the label 3 is none of its 3 choices"),
        ({"right": -1}, "the label -1 is none of its 3 choices"),
        ({"options": ["1", "", "no"]}, "the choice '' is no text"),
    ],
)
def test_samples_that_cannot_be_right_are_refused(
    folder: Path, tokenizer: Any, fabric: Fabric, row: dict[str, Any], reason: str
) -> None:
    rows = [*deepcopy(QUESTIONS[:2]), {**QUESTIONS[2], **row}]
    write_rows(folder / "data.jsonl", rows)
    write_task(folder, "one", **from_file("data.jsonl"), **CHOICE, metric_list=metrics("acc"))
    with pytest.raises(FusionBenchError, match=rf"tasks\.one: sample 2: {reason}"):
        own_pool("one", folder, tokenizer).prepare(fabric)


def test_an_empty_text_is_refused(folder: Path, tokenizer: Any, fabric: Fabric) -> None:
    write_rows(folder / "data.jsonl", [{"text": "a"}, {"text": ""}])
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, "one", **from_file("data.jsonl"), **rolling)
    with pytest.raises(FusionBenchError, match="sample 1: the text to score is empty"):
        own_pool("one", folder, tokenizer).prepare(fabric)


def test_the_models_own_generation_settings_do_not_count(
    tasks: Path, tokenizer: Any, fabric: Fabric
) -> None:
    plain, own = tiny_llama(), tiny_llama()
    settings: Any = own.generation_config
    settings.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_new_tokens=2)
    found = [
        texts(evaluated(own_pool("written", tasks, tokenizer), model, fabric)["written"])
        for model in (plain, own)
    ]
    assert found[0] == found[1]


def test_what_is_cut_and_what_is_tied_is_told(tasks: Path, tokenizer: Any, fabric: Fabric) -> None:
    model = tiny_llama(length=16)
    for parameter in model.parameters():
        parameter.data.zero_()
    pool = own_pool("listed", tasks, tokenizer)
    scores = evaluated(pool, model, fabric)["listed"]
    assert scores.details["truncated"].all()
    # All tokens are as likely as any other: the choices of three letters are tied.
    assert scores.details["tied"].all()
    assert "lost their beginnings" in pool.notes[0] and "are tied" in pool.notes[1]


def test_a_text_longer_than_the_model_is_told(tasks: Path, tokenizer: Any, fabric: Fabric) -> None:
    with pytest.raises(FusionBenchError, match="asks for 4 new tokens"):
        evaluated(own_pool("written", tasks, tokenizer), tiny_llama(length=4), fabric)


def test_the_batch_size_does_not_count(
    tasks: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    one, many = (
        evaluated(own_pool("choice", tasks, tokenizer, batch_size=size), model, fabric)["choice"]
        for size in (1, 16)
    )
    assert same(one, many)


def test_a_chat_template_is_part_of_the_key(tasks: Path, chatting: Any, fabric: Fabric) -> None:
    keys = []
    ways: list[dict[str, Any]] = [
        {},
        {"apply_chat_template": True},
        {"apply_chat_template": True, "system_instruction": "Be brief."},
    ]
    for options in ways:
        pool = own_pool("choice", tasks, chatting, **options)
        pool.prepare(fabric)
        keys.append(pool.tasks["choice"].key())
    assert keys[0] != keys[1] != keys[2] and keys[0]["requests"] != keys[1]["requests"]


def test_what_is_sampled_twice_is_drawn_twice(
    folder: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    sampled = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 4, "until": ["\n"]}
    write_task(
        folder,
        "drawn",
        **from_file("data.jsonl"),
        **WRITTEN,
        generation_kwargs=sampled,
        repeats=3,
        metric_list=metrics("exact_match"),
    )
    pool = own_pool("drawn", folder, tokenizer, limit=2)
    pool.prepare(fabric)
    asked: list[Any] = []
    from fusion_bench.taskpool.language.harness import model as ours

    def generate_until(self: Any, requests: Any) -> list[str]:
        asked.append(answer(self, requests))
        return asked[-1]

    answer = ours.HarnessModel.generate_until
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.HarnessModel, "generate_until", generate_until)
        first = evaluated(pool, model, fabric)["drawn"]
        again = evaluated(pool, model, fabric)["drawn"]
    assert asked[0] == asked[1] and len(set(asked[0])) > 2
    assert texts(first) == texts(again)


def test_documents_with_the_same_prompt_are_a_cluster(
    folder: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    rows = [{**own, "passage": "xyyzzxx"[i]} for i, own in enumerate(QUESTIONS)]
    write_rows(folder / "data.jsonl", [*rows, rows[0]])
    write_task(folder, "one", **from_file("data.jsonl"), **CHOICE, metric_list=metrics("acc"))
    by_prompt = evaluated(own_pool("one", folder, tokenizer), model, fabric)["one"].clusters
    assert by_prompt is not None and by_prompt.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    pool = own_pool("one", folder, tokenizer, cluster_by="passage")
    clusters = evaluated(pool, model, fabric)["one"].clusters
    assert clusters is not None and clusters.tolist() == [0, 1, 1, 2, 2, 0, 0, 0]
    with pytest.raises(FusionBenchError, match="cluster_by: the documents have no 'story'"):
        evaluated(own_pool("one", folder, tokenizer, cluster_by="story"), model, fabric)


def test_the_harness_is_left_as_it_was(
    tasks: Path, tokenizer: Any, model: nn.Module, fabric: Fabric
) -> None:
    import logging
    import random

    from lm_eval import utils
    from lm_eval.api import registry, task

    def state() -> list[Any]:
        return [
            utils.env,
            task.tqdm,
            logging.getLogger("lm_eval").level,
            logging.getLogger("lm_eval").handlers[:],
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.random.get_rng_state().tolist(),
            *(sorted(own.keys()) for own in (registry.metric_registry, registry.filter_registry)),
        ]

    pool = own_pool("choice", tasks, tokenizer)
    pool.plan()
    before = state()
    evaluated(pool, model, fabric)
    assert state() == before
