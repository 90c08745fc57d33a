import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from fixtures_report import model, report, synthetic
from jinja2 import UndefinedError

from fusion_bench.report import Report, Scores, Tuning, TuningTask, summarise
from fusion_bench.report.figures import (
    comparison_sentence,
    shown,
    shown_error,
    signed,
    with_stderr,
)
from fusion_bench.report.page import page, render
from fusion_bench.results import SampleScores

HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onload=alert(1) x='",
    "{{7*7}}{% raw %}",
    r"$\alpha$ costs $5",
    "n" * 300,
    "مرحبا \u202eevil",
    "😀 <img src=x>",
    "</title></style></svg>",
]


class Reader(HTMLParser):
    """Collects a page's tables, by caption, as rows of text; and the tags and words outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.words = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._rows = []
        elif tag == "table":
            self.tables[self._caption.strip()] = [
                [" ".join(c.split()) for c in r] for r in self._rows
            ]

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data
        else:
            self._caption += data


def minus(text: str) -> str:
    return text.replace("-", "−")


def read(found: Report, scores: Scores | None = None) -> Reader:
    return Reader(page(found, scores or Scores()))


def evaluated() -> Report:
    models = {
        "_pretrained_": model("pretrained", a=40, b=30),
        "a": model("individual", a=80),
        "b": model("individual", b=60),
        "merged": model("merged", a=60, b=45),
    }
    found = report(models)
    summarise(models, found.tasks)
    return found


def test_the_comparison_in_percent_with_standard_errors() -> None:
    found = read(evaluated())
    assert found.tables["Accuracy in percent, ± its standard error"] == [
        ["model", "a", "b", "average", "normalised"],
        ["pretrained", "40.0 ±4.9", "30.0 ±4.6", "35.0 ±3.4", "50.0"],
        ["individual", "80.0 ±4.0", "60.0 ±4.9", "70.0 ±3.2", "100.0"],
        ["merged", "60.0 ±4.9", "45.0 ±5.0", "52.5 ±3.5", "75.0"],
    ]
    assert "★" not in found.words  # one merged model has no rivals


def test_where_it_loses_and_what_it_keeps() -> None:
    found = read(evaluated())
    assert found.tables["Accuracy in percent, compared with the task's own model"][1:] == [
        ["a", "80.0", "60.0", "−20.0", "–", "75.0"],
        ["b", "60.0", "45.0", "−15.0", "–", "75.0"],
    ]
    assert found.tables["Normalised accuracy, %"] == [
        ["task", "merged", "pretrained"],
        ["a", "75.0", "50.0"],
        ["b", "75.0", "50.0"],
    ]


def test_the_best_of_several_merged_models_is_marked() -> None:
    models = {
        "a": model("individual", a=80),
        "one": model("merged", a=60, b=45),
        "two": model("merged", a=50, b=45),
    }
    told = report(models)
    summarise(models, told.tasks)
    found = read(told)
    _, individual, one, two = found.tables["Accuracy in percent, ± its standard error"]
    assert not any("★" in cell for cell in individual)
    assert ["★" in cell for cell in one] == [False, True, True, True, False]
    assert ["★" in cell for cell in two] == [False, False, True, False, False]  # b is a tie
    assert "★ marks the best merged model" in found.words
    assert "Of 2 merged models this is one" in found.words


def test_sentences_and_intervals() -> None:
    found, scores = synthetic({"a": 3, "b": 4})
    shown = read(found, scores)
    for comparison in found.main_comparisons():
        assert comparison_sentence(found, comparison) in shown.words.replace("\u00a0", " ")
    rows = shown.tables["Average over the tasks that both were evaluated on"][1:]
    assert [row[:2] for row in rows] == [["merged", "pretrained"], ["merged", "individual"]]
    difference = found.comparisons[0].average
    assert difference is not None
    assert rows[0][2] == minus(signed(difference.difference))
    assert rows[0][3] == minus(f"{signed(difference.low)} to {signed(difference.high)}")
    assert rows[0][6] == found.comparisons[0].verdict
    assert len(shown.tables["Task by task"]) == 1 + 4


def test_a_family_is_one_contender() -> None:
    found, scores = synthetic({"a": 3, "b": 4, "c": 5}, merged=["merged/a", "merged/b", "merged/c"])
    shown = read(found, scores)
    rows = shown.tables["Accuracy in percent, ± its standard error"]
    assert [row[0] for row in rows[1:]] == ["pretrained", "individual", "merged"]
    assert "Where merged loses most" in shown.words


def tuning(labels: bool, test_split: bool) -> Tuning:
    split = "test" if test_split else "validation"
    data = {"a": TuningTask(num_samples=7, fingerprint="f")}
    return Tuning(split=split, labels=labels, test_split=test_split, tasks=data)


@pytest.mark.parametrize(
    ("labels", "test_split", "kind"),
    [(True, False, "note"), (False, True, "alarm"), (True, True, "alarm")],
)
def test_what_a_method_learned_from_is_told(labels: bool, test_split: bool, kind: str) -> None:
    found = evaluated()
    found.run.tuning = tuning(labels, test_split)
    text = page(found, Scores())
    assert f'class="{kind}"' in text and "a</bdi> (7 samples)" in text
    assert found.run.tuning.sentence() in text


def test_a_trial_run_is_called_one() -> None:
    found = evaluated()
    assert 'class="note"' not in page(found, Scores())
    found.run.config["fast_dev_run"] = True
    assert "A trial run." in page(found, Scores())


def test_what_was_run() -> None:
    found = evaluated()
    found.run.config |= {
        "method": {
            "_target_": "fusion_bench.method.TiesMergingAlgorithm",
            "threshold": 20,
            "weights": None,
        },
        "modelpool": {"models": {"_pretrained_": "owner/base", "a": "owner/a", "c": {"path": "x"}}},
    }
    found.run.command = ["fusion_bench", "method.x=a b"]
    found.run.packages = {"torch": "9.9"}
    shown = read(found)
    assert "3 models merged by TiesMergingAlgorithm" in shown.words  # a, b and c
    for text in ("threshold: 20", "weights: null", "fusion_bench 'method.x=a b'", "torch 9.9"):
        assert text in shown.words
    assert "_target_: fusion_bench.method.TiesMergingAlgorithm" in shown.words  # the config
    rows = re.findall(
        r'<th scope="row"><bdi>(\w+)</bdi></th><td>(\w+)</td><td><bdi>(.*?)<',
        page(found, Scores()),
    )
    assert rows == [
        ("_pretrained_", "pretrained", "owner/base"),
        ("a", "individual", "owner/a"),
        ("c", "individual", "{path: x}"),
        ("b", "individual", "–"),
        ("merged", "merged", "made by this run"),
    ]


def confused(num_classes: int) -> tuple[Report, Scores]:
    """Return a task whose class 0 is taken for 1 twice, by a model that is else right."""
    labels = np.array([0, 0, 0, 1, 1, num_classes - 1], np.int32)
    predictions = {"a": labels, "merged": np.array([0, 1, 1, 1, 1, num_classes - 1], np.int32)}
    scores = Scores()
    for name, chosen in predictions.items():
        scores.add("a", name, SampleScores.classified(np.arange(6), labels, chosen))
    models = {"a": model("individual", a=100), "merged": model("merged", a=67)}
    found = report(models)
    summarise(models, found.tasks)
    del found.tasks["b"]
    found.tasks["a"].num_classes = num_classes
    found.tasks["a"].classes = [f"class {i}" for i in range(num_classes)]
    return found, scores


def test_few_classes_have_a_confusion_matrix() -> None:
    shown = read(*confused(3))
    assert shown.tables["Correct predictions, for the classes that lose most"][1:] == [
        ["class 0", "3", "3", "1", "2"]
    ]
    assert shown.tables["Confusion matrix of merged: true (rows), predicted (columns)"] == [
        ["class", "class 0", "class 1", "class 2"],
        ["class 0", "1", "2", "0"],
        ["class 1", "0", "2", "0"],
        ["class 2", "0", "0", "1"],
    ]


def test_of_many_classes_the_most_frequent_confusions_are_listed() -> None:
    shown = read(*confused(13))
    assert shown.tables["Most frequent confusions"] == [
        ["class", "taken for", "times", "of samples"],
        ["class 0", "class 1", "2", "3"],
    ]


def test_without_named_classes_there_is_no_word_of_them() -> None:
    found, scores = synthetic({"a": 3, "b": 4})
    assert "Classes of" not in page(found, scores)


def test_similarities_and_their_figures() -> None:
    found, scores = synthetic({"a": 3, "b": 4, "c": 5}, parts=3)
    assert found.similarity is not None
    shown = read(found, scores)
    for title in (
        "Cosines of the task vectors",
        "Cosines in each part",
        "Norms of the task vectors",
    ):
        assert title in shown.words
    assert f"{found.similarity.cosines[1][0][1]:.3g}" in shown.words
    assert f"{found.similarity.norms[0][2]:.3g}" in shown.words
    pairs = {(i, j): found.similarity.cosines[0][i][j] for i in range(3) for j in range(i)}
    assert f"(cosine {min(pairs.values()):.2f})" in shown.words


def test_of_many_models_each_is_shown_beside_all_others() -> None:
    found, scores = synthetic({f"t{i}": 3 for i in range(9)}, samples=20, parts=2)
    assert found.similarity is not None
    shown = read(found, scores)
    assert "Mean cosine with all other task vectors, in each part" in shown.words
    mean = (sum(found.similarity.cosines[1][0]) - 1) / 8
    assert f"{mean:.3g}" in shown.words


def no_tasks() -> tuple[Report, Scores]:
    found, _ = synthetic({"a": 3, "b": 4})
    found.tasks, found.comparisons = {}, []
    for each in found.models.values():
        each.tasks, each.average = {}, None
    return found, Scores()


def no_lengths() -> tuple[Report, Scores]:
    found, scores = synthetic({"a": 3, "b": 4}, parts=1)
    assert found.similarity is not None
    found.similarity.norms = [[0.0, 0.0]] * 2
    found.similarity.cosines = [[[0.0, 0.0]] * 2] * 2
    return found, scores


def nothing_right() -> tuple[Report, Scores]:
    models = {"a": model("individual", a=0), "merged": model("merged", a=0, b=0)}
    found = report(models)
    summarise(models, found.tasks)
    return found, Scores()


DEGENERATE = {
    "nothing evaluated": no_tasks,
    "nothing evaluated nor described": lambda: (
        report({}).model_copy(update={"tasks": {}}),
        Scores(),
    ),
    "no pretrained model": lambda: synthetic({"a": 3, "b": 4}, pretrained=False),
    "no individual models": lambda: synthetic({"a": 3, "b": 4}, individual=False, per_class=True),
    "merged alone": lambda: synthetic({"a": 3}, individual=False, pretrained=False),
    "no similarity": lambda: synthetic({"a": 3, "b": 4, "c": 5}, parts=0),
    "one model": lambda: synthetic({"a": 3}),
    "task vectors of no length": no_lengths,
    "nothing right": nothing_right,
    "nothing merged": lambda: (report({"a": model("individual", a=50)}), Scores()),
    "no scores": lambda: (synthetic({"a": 3, "b": 4}, per_class=True)[0], Scores()),
    "full matrix": lambda: synthetic({"a": 3, "b": 4}, full=True, per_class=True),
    "family in the full matrix": lambda: synthetic(
        {"a": 3, "b": 4}, full=True, merged=["merged/a", "merged/b"]
    ),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_what_a_report_lacks_the_page_leaves_out(case: str) -> None:
    found, scores = DEGENERATE[case]()
    shown = read(found, scores)
    for word in ("nan", "None", "Undefined", "inf"):
        assert not re.search(rf"\b{word}\b", shown.words), word
    assert ("Nothing was evaluated." in shown.words) == (not found.tasks)
    assert ("task vectors" in shown.words) == (found.similarity is not None)
    figures = bool(found.similarity) + any(
        m.role == "merged" and m.tasks for m in found.models.values()
    )
    assert ("svg" in shown.tags) == bool(figures)
    tables = [row for rows in shown.tables.values() for row in rows]
    assert all(tables) and shown.tags.count("h1") == 1


@pytest.fixture(scope="module")
def hostile() -> str:
    found, scores = synthetic(dict.fromkeys(HOSTILE, 3), samples=50, per_class=True)
    for name, info in found.tasks.items():
        info.classes = [name, f"{name} 2", f"{name} 3"]
    found.run.command = ["fusion_bench", HOSTILE[0]]
    found.run.device = HOSTILE[0]
    found.run.packages = {HOSTILE[0]: HOSTILE[7]}
    found.run.config["method"] = {"_target_": f"x.{HOSTILE[0]}", HOSTILE[1]: HOSTILE[7]}
    return page(found, scores)


def test_a_name_is_text_whatever_it_is(hostile: str) -> None:
    shown = Reader(hostile)
    assert set(shown.tags) <= {
        *("html", "head", "meta", "title", "link", "style", "body", "main", "script", "footer"),
        *("h1", "h2", "p", "strong", "dl", "dt", "dd", "ul", "li", "code", "pre", "bdi", "time"),
        *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "small", "span"),
        *("details", "summary", "figure", "figcaption", "svg", "title", "desc", "g", "path"),
        *("text", "defs", "clippath", "rect", "use", "image", "button"),
    }
    assert shown.tags.count("script") == 1
    assert not re.search(
        r"<[^>]*\son\w+=", re.sub(r"<script>.*?</script>", "", hostile, flags=re.S)
    )
    for name in HOSTILE:
        assert name in shown.words
    assert "49" not in shown.tables["Accuracy in percent, ± its standard error"][0][3]


def test_the_page_needs_nothing_else(hostile: str) -> None:
    referred = re.findall(r'\b(?:src|href)="([^"]*)"', hostile)
    assert referred and all(address.startswith(("#", "data:")) for address in referred)
    assert "@import" not in hostile
    assert set(re.findall(r"url\((.)", hostile)) <= {"#"}


def test_twenty_models_on_twenty_tasks_of_397_classes_stay_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fusion_bench.results.statistics.RESAMPLES", 50)
    tasks = dict.fromkeys((f"dataset-number-{i}" for i in range(20)), 397)
    family = [f"merged/{task}" for task in tasks]
    found, scores = synthetic(
        tasks, samples=100, full=True, per_class=True, merged=family[:3], parts=30
    )
    found.comparisons *= 10  # as many as for thirty merged models
    text = page(found, scores)
    assert "report.json has the rest" in text
    assert len(text.encode()) < 1_500_000


@pytest.mark.cold
def test_the_same_page_in_another_process() -> None:
    """Which hashes texts otherwise."""
    code = """if True:
        import sys
        sys.path.insert(0, "tests")
        from fixtures_report import synthetic
        from fusion_bench.report.page import page
        print(page(*synthetic({"a": 3, "b": 4, "c": 5}, per_class=True)), end="")
    """
    env = {**os.environ, "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=env)
    assert done.stdout == page(*synthetic({"a": 3, "b": 4, "c": 5}, per_class=True))


@pytest.mark.cold
def test_what_draws_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, fusion_bench.report.page; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_template_must_be_given_all_that_it_names() -> None:
    with pytest.raises(UndefinedError, match="report"):
        render("report.html.j2", {})


def test_figures_as_people_read_them() -> None:
    assert shown(0.8371) == "83.7" and shown(None) == "–"
    assert signed(-0.0123) == "-1.2" and signed(0.5) == "+50.0" and signed(None) == "–"
    values = [0.031249, 12.3456, 99.96, 1234.5, 1e6, float("inf")]
    assert [shown(v, "m") for v in values] == ["0.0312", "12.3", "100", "1,234", "1,000,000", "∞"]
    errors = [(0.00282, 0.25), (0.127, 13.4), (0.4, 1234.5), (25.4, 1234.5), (0.0, 0.5)]
    told = [shown_error(error, value, "m") for error, value in errors]
    assert told == ["0.003", "0.1", "0.4", "25", "0.000"] and shown_error(0.012, 0.5) == "1.2"
    assert with_stderr(0.25, 0.00282, "m") == "0.250 ± 0.003" and with_stderr(0.5, None) == "50.0"
    assert signed(-0.5, "m") == "-0.500" and signed(0.25, "") == "+0.250"
