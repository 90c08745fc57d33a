"""Tasks that come with the harness run with its code; here on made-up data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fixtures_harness import tiny_llama
from lightning.fabric import Fabric

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool import LMEvalHarnessTaskPool
from fusion_bench.taskpool.language.harness import building

ARC = {
    "question": "Which is alive?",
    "choices": {"text": ["rock", "tree", "sand"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
HELLASWAG = {
    "activity_label": "Sport",
    "ctx_a": "A man runs [title] Then",
    "ctx_b": "he",
    "endings": ["stops.", "flies.", "swims.", "sings."],
    "label": "0",
}
GSM8K = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
SQUAD = {
    "id": "1",
    "title": "Cats",
    "context": "A cat sat.",
    "question": "Who sat?",
    "answers": {"text": ["A cat"], "answer_start": [0]},
}
DATA: Mapping[str, tuple[dict[str, Any], int]] = {
    "allenai/ai2_arc": (ARC, 3),
    "Rowan/hellaswag": (HELLASWAG, 3),
    "openai/gsm8k": (GSM8K, 7),
}


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let datasets of the Hub be made-up ones."""

    def load(kind: str, node: Mapping[str, Any]) -> Any:
        from datasets import Dataset, DatasetDict

        row, count = DATA[node["path"]]
        rows = Dataset.from_list([row] * count)
        return DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(building, "load", load)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the task's own code load made-up data."""
    import datasets

    rows = datasets.Dataset.from_list([SQUAD] * 2)
    found = datasets.DatasetDict(train=rows, validation=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: found)


@pytest.mark.usefixtures("answered")
def test_a_metric_from_elsewhere_needs_the_users_word(
    tokenizer: Any, fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squad_v2").mkdir()
    (tmp_path / "squad_v2" / "squad_v2.py").write_text(f"open('{tmp_path}/canary', 'w')")
    monkeypatch.chdir(tmp_path)  # where the harness would look for it
    pool = LMEvalHarnessTaskPool("squadv2", tokenizer=tokenizer)
    with pytest.raises(FusionBenchError, match=r"tasks\.squadv2: a metric .* --trust-remote-code"):
        pool.prepare(fabric)
    assert not (tmp_path / "canary").exists()


@pytest.mark.usefixtures("local")
def test_they_are_found_and_run(tokenizer: Any, fabric: Fabric) -> None:
    pool = LMEvalHarnessTaskPool("arc_easy, hellaswag,gsm8k", tokenizer=tokenizer, max_samples=2)
    scores = pool.evaluate(tiny_llama(length=2048), fabric, ["arc_easy", "hellaswag"])
    assert all(own.num_samples == 2 for own in scores.values())
    names = {task: [own.name for own in pool.describe(task).metrics] for task in pool.task_names}
    assert names == {
        "arc_easy": ["acc", "acc_norm"],
        "hellaswag": ["acc", "acc_norm"],
        "gsm8k": ["exact_match (strict-match)", "exact_match (flexible-extract)"],
    }
    first = pool.tasks["hellaswag"].requests[0][0]  # type: ignore[attr-defined]
    assert first.args == ("Sport: A man runs. Then He", " stops.")  # what its code makes
    shots = pool.tasks["gsm8k"].requests[0][0].args[0]  # type: ignore[attr-defined]
    assert shots.count("Question:") == 6
    assert pool.describe("gsm8k").identity["version"] == "3.0"
    assert len(pool.describe("gsm8k").identity["task"] or "") == 64
