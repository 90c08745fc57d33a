"""Samples that a merge changed: which are found, and how the page shows them."""

import numpy as np
import pytest
from fixtures_report import report

from fusion_bench.report import (
    ModelResult,
    Report,
    Scores,
    TaskInfo,
    TaskResult,
    compare_contenders,
    metric_info,
    summarise,
)
from fusion_bench.report.changes import changed_samples, task_changes
from fusion_bench.report.page import page
from fusion_bench.results import (
    ACCURACY,
    METRICS,
    Example,
    Metric,
    SampleScores,
    text_array,
    with_ones,
)

PERPLEXITY = METRICS["perplexity"]
SAMPLES = np.array([3, 5, 8, 9, 11])


def evaluated(metric: Metric, own: SampleScores, merged: SampleScores) -> tuple[Report, Scores]:
    scores, models = Scores(), {}
    for name, role, found in (("a", "individual", own), ("merged", "merged", merged)):
        scores.add("a", name, found)
        results = {"a": TaskResult.of(found, [metric])}
        models[name] = ModelResult(role=role, identity="0" * 64, num_parameters=1, tasks=results)
    scores.metrics = {"a": [metric]}
    info = TaskInfo(
        kind="test",
        main=metric.name,
        metrics=[metric_info(metric)],
        num_samples=len(SAMPLES),
        identity={},
        owner="a",
    )
    summarise(models, {"a": info})
    found = report({}).model_copy(update={"models": models, "tasks": {"a": info}})
    found.comparisons = compare_contenders(found, scores)
    return found, scores


def chosen(*predictions: int) -> SampleScores:
    labels, answers = np.zeros(len(SAMPLES), dtype=np.int64), np.array(predictions)
    return SampleScores(
        SAMPLES,
        {ACCURACY.name: with_ones(labels == answers)},
        {"labels": labels, "predictions": answers},
    )


@pytest.fixture
def choices() -> tuple[Report, Scores]:
    found, scores = evaluated(ACCURACY, chosen(0, 0, 1, 0, 1), chosen(0, 1, 0, 2, 1))
    texts = {3: "unused"} | {n: f"question <b>{n}</b>" for n in (5, 8, 9)}
    scores.examples["a"] = {n: Example(t, "cat", ("cat", "dog", "<i>")) for n, t in texts.items()}
    return found, scores


def test_both_directions(choices: tuple[Report, Scores]) -> None:
    assert changed_samples(*choices) == {"a": [5, 9, 8]}
    (changes,) = task_changes(*choices)
    assert (changes.num_worse, changes.num_better) == (2, 1)
    assert [(c.sample, c.own, c.merged) for c in changes.worse] == [
        (5, "cat", "dog"),
        (9, "cat", "<i>"),
    ]
    assert [(c.sample, c.own, c.merged) for c in changes.better] == [(8, "dog", "cat")]


def test_the_page_folds_and_escapes_texts(choices: tuple[Report, Scores]) -> None:
    html = page(*choices)
    assert "worse on 2 samples, better on 1" in html
    assert "question &lt;b&gt;5&lt;/b&gt;" in html
    assert "<b>5</b>" not in html
    assert "<i>" not in html
    assert html.count('<details class="sample">') == 3


def test_texts_that_were_written() -> None:
    def written(*texts: str) -> SampleScores:
        right = np.array([text == "yes" for text in texts])
        statistics = {"exact_match": with_ones(right)}
        return SampleScores(SAMPLES, statistics, {"answers": text_array(texts)})

    own, merged = written(*["yes"] * 5), written("yes", "nö", "", "yes", "yes")
    found, scores = evaluated(METRICS["exact_match"], own, merged)
    scores.examples["a"] = {n: Example(f"prompt {n}", "yes") for n in SAMPLES.tolist()}
    (changes,) = task_changes(found, scores)
    assert [(c.sample, c.own, c.merged) for c in changes.worse] == [
        (5, "yes", "nö"),
        (8, "yes", ""),
    ]


def test_where_lower_is_better_the_greatest_changes_come_first() -> None:
    def predicted(*nats: float) -> SampleScores:
        return SampleScores(SAMPLES, {PERPLEXITY.name: with_ones(np.log(nats))})

    own, merged = predicted(2, 2, 2, 2, 2), predicted(3, 1, 9, 2, 1.5)
    found, scores = evaluated(PERPLEXITY, own, merged)
    scores.examples["a"] = {n: Example(f"text {n}") for n in SAMPLES.tolist()}
    (changes,) = task_changes(found, scores)
    assert [(c.sample, round(c.merged_value, 6)) for c in changes.worse] == [(8, 9), (3, 3)]
    assert [(c.sample, round(c.merged_value, 6)) for c in changes.better] == [(5, 1), (11, 1.5)]


def test_no_texts_no_section(choices: tuple[Report, Scores]) -> None:
    found, scores = choices
    scores.examples.clear()
    assert "Samples that changed" not in page(found, scores)
