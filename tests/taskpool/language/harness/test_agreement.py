"""Our figures are the harness's own, document by document, where these are right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_harness import by_harness, own_pool
from lightning.fabric import Fabric
from torch import nn

from fusion_bench.results import SampleScores, array_texts
from fusion_bench.taskpool import LMEvalHarnessTaskPool

#: A group of two is among them.
NAMES = ["both", "shots", "listed", "mutual", "binary", "likely", "rolling", "filtered"]
CHAT = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 1}
TASKS = [
    ("plain", name)
    for name in (
        *("choice", "written", "shots", "listed", "mutual"),
        *("binary", "likely", "rolling", "filtered"),
    )
] + [("chat", "shots"), ("chat", "written"), ("chat", "choice")]
#: Values of float32 models differ by the order of their sums.
CLOSE = 2e-5

Both = dict[str, tuple[LMEvalHarnessTaskPool, dict[str, SampleScores], Any]]


@pytest.fixture(scope="module")
def both(tasks: Path, tokenizer: Any, chatting: Any, model: nn.Module, fabric: Fabric) -> Both:
    """Return our pool, our scores and the harness's results, without and with a chat template."""
    found = {}
    ways: list[tuple[str, list[str], Any, dict[str, Any]]] = [
        ("plain", NAMES, tokenizer, {}),
        ("chat", ["both", "shots"], chatting, CHAT),
    ]
    for way, names, its, options in ways:
        # One example needs data to take it from: without a split of its own that is the test's.
        pool = own_pool(names, tasks, its, **options)
        multiturn = {"fewshot_as_multiturn": True} if options else {}
        theirs = by_harness(model, its, names, tasks, **options, **multiturn)
        found[way] = pool, pool.evaluate(model, fabric), theirs
    return found


@pytest.mark.parametrize(("way", "task"), TASKS)
def test_aggregates_and_each_documents_values(both: Both, way: str, task: str) -> None:
    pool, scores, theirs = both[way]
    own, metrics = scores[task], pool.describe(task).metrics
    kinds = {key for key in theirs["results"][task] if "," in key and "_stderr" not in key}
    assert len(metrics) == len(kinds)
    for metric in metrics:
        name, _, behind = metric.name.partition(" (")
        filter_name = behind.removesuffix(")") or "none"
        wanted = theirs["results"][task][f"{name},{filter_name}"]
        assert own.value(metric) == pytest.approx(wanted, rel=CLOSE)
        assert metric.higher_is_better is theirs["higher_is_better"][task][name]
        if metric.recompute is None and name != "brier_score":
            records = [r for r in theirs["samples"][task] if r["filter"] == filter_name]
            for record, row in zip(records, own.statistics[metric.name], strict=True):
                value = record[name]
                value = abs(value[0] if isinstance(value, tuple) else value)
                assert row[0] == pytest.approx(value, rel=CLOSE)


@pytest.mark.parametrize(("way", "task"), TASKS)
def test_each_document_is_asked_the_same_and_has_its_hash(both: Both, way: str, task: str) -> None:
    pool, scores, theirs = both[way]
    records = {record["doc_id"]: record for record in theirs["samples"][task]}
    for i, requests in enumerate(pool.tasks[task].requests):  # type: ignore[attr-defined]
        assert [own.args for own in requests] == records[i]["arguments"]
        digits = f"{scores[task].details['documents'][i]:015x}"
        assert records[i]["doc_hash"].startswith(digits)


@pytest.mark.parametrize(
    ("way", "task"), [(w, t) for w, t in TASKS if t in ("written", "filtered")]
)
def test_texts_are_the_same(both: Both, way: str, task: str) -> None:
    _, scores, theirs = both[way]
    records = {record["doc_id"]: record for record in theirs["samples"][task]}
    texts = array_texts(scores[task].details["answers"].astype(np.uint8))
    assert texts == [records[i]["resps"][0][0] for i in range(len(records))]
    assert any(texts)


def test_log_likelihoods_are_the_same(both: Both, record_property: Any) -> None:
    """The greatest difference of continuous values, for whoever wants to know it."""
    _, scores, theirs = both["plain"]
    rows = scores["likely"].statistics["perplexity"][:, 0]
    wanted = [-record["perplexity"] for record in theirs["samples"]["likely"]]
    greatest = float(np.abs(rows - wanted).max())
    record_property("greatest difference in nats", greatest)
    print("greatest difference in nats:", greatest)
    assert greatest < 1e-4
