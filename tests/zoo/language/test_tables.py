"""The data sets: disjoint splits, right answers, the same rows in every process."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from datasets import ClassLabel, Dataset

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.datasets import DatasetPlace, columns_sha256, describe, load_split
from fusion_bench.taskpool.language.texts import Texts
from fusion_bench.trust import find
from fusion_bench.zoo import SPLITS, language
from fusion_bench.zoo.language.questions import CHOICES, Question, choices
from fusion_bench.zoo.language.tables import rows, text_columns

TARGET = "fusion_bench.zoo.language.load_dataset"
#: Every dataset's rows in one number.
DIGEST = """
import json
import os
import subprocess
import sys
from hashlib import sha256
from fusion_bench.zoo.language import DATASETS
from fusion_bench.zoo.language.tables import rows
print(sha256(json.dumps([rows(name, "test") for name in DATASETS]).encode()).hexdigest())
"""


@pytest.mark.parametrize("name", language.DATASETS)
def test_splits_are_disjoint_and_have_the_columns_that_were_promised(name: str) -> None:
    node = {"_target_": TARGET, "name": name}
    described = describe(node)
    assert described is not None and list(described.splits) == list(SPLITS)
    inputs = ("prompt",) if name in language.GENERATION else text_columns(name)
    seen: set[tuple[str, ...]] = set()
    counts = []
    for split in SPLITS:
        found = find(TARGET)(name=name, split=split)
        assert isinstance(found, Dataset) and found.features == described.features
        texts = set(zip(*(found[column] for column in inputs), strict=True))
        assert len(texts) == len(found) and not texts & seen
        assert all(text == text.strip() for row in texts for text in row)
        seen |= texts
        counts.append(len(found))
    assert counts[1:] == [100, 200] and counts[0] >= 400


def test_every_process_draws_the_same() -> None:
    own = [rows(name, "test") for name in language.DATASETS]
    env = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.check_output([sys.executable, "-c", DIGEST], env=env, text=True)
    assert other.strip() == sha256(json.dumps(own).encode()).hexdigest()


def right_sort(prompt: str) -> str:
    return "".join(sorted(prompt.removeprefix("sort ").removesuffix(":")))


def right_capitals(prompt: str) -> str:
    return prompt.removeprefix("write ").removesuffix(":").upper()


def right_mood(prompt: str) -> str:
    *_, before, word = prompt.removesuffix(":").split()
    praised = word in ("good", "great", "fine", "lovely", "fresh", "witty")
    return "good" if praised != (before == "not") else "bad"


def right_dialect(prompt: str) -> str:
    own = {"A": "ka ti pu ra", "B": "mo le bo ge", "C": "si sa ru ri", "D": "na wu no mi"}
    found = {
        name for name, all_own in own.items() for each in all_own.split() if each == prompt[:2]
    }
    return found.pop()


@pytest.mark.parametrize("right", [right_sort, right_capitals, right_mood, right_dialect])
def test_answers_are_right(right: Any) -> None:
    for row in rows(right.__name__.removeprefix("right_"), "test"):
        assert row["answer"] == right(row["prompt"])


def test_numbers_by_hand() -> None:
    found = {row["prompt"]: row["answer"] for split in SPLITS for row in rows("number", split)}
    by_hand = {
        "zero:": "0",
        "nineteen:": "19",
        "twenty:": "20",
        "ninety nine:": "99",
        "one hundred:": "100",
        "three hundred seven:": "307",
        "eight hundred eighty seven:": "887",
    }
    assert len(found) == 1000 and found.items() >= by_hand.items()


@pytest.mark.parametrize("name", language.GENERATION)
def test_the_answer_is_at_a_random_place_among_the_choices(name: str) -> None:
    found = rows(name, "test")
    for row in found:
        assert row["choices"][row["label"]] == row["answer"]
        assert len(set(row["choices"])) == len(row["choices"]) == CHOICES
    counts = [sum(row["label"] == place for row in found) for place in range(CHOICES)]
    assert min(counts) > 25


def test_wrong_choices_are_other_answers_of_the_wanted_style() -> None:
    question = Question("sort ab:", ("ab", "ba", "ab"))
    others = [question, Question("sort cd:", ("cd", "dc", "cd")), Question("sort ef:", ("ef",) * 3)]
    assert sorted(choices(question, others, Random(0))) == ["ab", "ba", "cd", "ef"]


def test_sentiment_is_that_of_the_last_remark() -> None:
    praise = {"good", "great", "lovely", "clever", "moving", "fresh", "witty", "superb"}
    for row in rows("sentiment", "test"):
        joint = "but" if " but " in row["text"] else "and"
        kinds = [
            (remark.split()[-1] in praise) != (" not " in remark)
            for remark in row["text"].split(f" {joint} ")
        ]
        assert kinds[1] == row["label"] and (kinds[0] == kinds[1]) == (joint == "and")


def test_entailment_says_less_neutral_more_and_contradiction_other() -> None:
    for row in rows("entailment", "test"):
        premise, hypothesis = row["premise"].split(), row["hypothesis"].split()
        changed = sum(a != b for a, b in zip(premise[:-1], hypothesis, strict=False))
        expected = {0: (0, 5), 1: (0, 7), 2: (2, 5)}[row["label"]]
        assert (changed, len(hypothesis)) == expected


def test_the_score_counts_equal_words() -> None:
    for row in rows("similarity", "test"):
        pairs = zip(row["text1"].split(), row["text2"].split(), strict=True)
        same = sum(one == other for one, other in pairs)
        assert row["score"] == same - 1  # the article is the same in all
    assert {row["score"] for row in rows("similarity", "test")} == {0, 1, 2, 3, 4, 5}


def test_questions_by_hand() -> None:
    label = language.columns("question")["label"]
    assert isinstance(label, ClassLabel)
    words = {"who": "person", "where": "place", "when": "time", "how often": "amount"}
    for row in rows("question", "train"):
        for word, expected in words.items():
            if f" {word} " in f" {row['text']} ":
                assert label.int2str(row["label"]) == expected


def test_some_prose_is_long() -> None:
    lengths = [len(row["text"].encode()) for row in rows("prose", "test")]
    assert min(lengths) < 150 and sum(length > 300 for length in lengths) > 20


def test_unknown_names_are_refused() -> None:
    for call in (
        language.load_dataset,
        lambda *own: describe({"_target_": TARGET, "name": own[0]}),
    ):
        with pytest.raises(FusionBenchError, match=r"no dataset 'moood'\. Did you mean 'mood'"):
            call("moood")
    with pytest.raises(FusionBenchError, match=r"no split 'tset'\. Did you mean 'test'"):
        language.load_dataset("mood", "tset")
    with pytest.raises(FusionBenchError, match=r"no split 'tset'\. Did you mean 'test'"):
        describe({"_target_": TARGET, "name": "mood", "split": "tset"})


@pytest.mark.parametrize("name", language.DATASETS)
def test_texts_are_those_of_the_dataset_which_is_made_only_for_its_hash(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"_target_": TARGET, "name": name, "split": "validation"}
    dataset = load_split(node)
    made: list[str] = []

    def noted(node: Any) -> Any:
        made.append(node["name"])
        return load_split(node)

    monkeypatch.setattr("fusion_bench.taskpool.language.texts.load_split", noted)
    for times in (1, 2):
        texts = Texts.load(node, DatasetPlace(("dataset",)))
        assert list(texts) == list(dataset) and len(texts) == len(dataset)
        assert sorted(texts.columns) == sorted(dataset.features)
        assert texts.split == str(dataset.split) == "validation"
        assert texts.fingerprint == columns_sha256(dataset, list(dataset.features))
        # Real numbers are rounded by the dataset, so that it is always made.
        assert len(made) == (times if name == language.SCORED else 1)
