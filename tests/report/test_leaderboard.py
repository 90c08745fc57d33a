import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from fixtures_report import model, report, task_info

from fusion_bench.report import Scores, TaskResult, summarise
from fusion_bench.report.leaderboard import Failure, Job, Leaderboard, leaderboard
from fusion_bench.report.leaderboard_files import print_leaderboard, save, tex
from fusion_bench.results import ACCURACY, SampleScores

SIZE = 400
HOSTILE = "=x|<script>alert(1)</script>&%$#_{}~^\\'\"\n🙂"


def job(name: str, merged: Mapping[str, np.ndarray], **changes: object) -> Job:
    """Return a job whose merged model answers rightly where ``merged`` says so, task by task.

    The individual models are right on all but every tenth sample.
    """
    scores, results = Scores(), {}
    for task, right in merged.items():
        samples = np.arange(len(right), dtype=np.int32)
        labels = np.zeros_like(samples)
        own = (samples % 10 == 0).astype(np.int32)
        scores.metrics[task] = [ACCURACY]
        for who, wrong in {task: own, "merged": (~right).astype(np.int32)}.items():
            found = SampleScores.classified(samples, labels, wrong)
            scores.add(task, who, found)
            results.setdefault(who, {})[task] = TaskResult.of(found, [ACCURACY])
    models = {who: model("merged" if who == "merged" else "individual") for who in results}
    for who, found in results.items():
        models[who].tasks = found
    infos = {task: task_info(task, task, samples=len(right)) for task, right in merged.items()}
    summarise(models, infos)
    made = report(models)
    made.tasks = infos
    made.run.precision = str(changes.get("precision", "32-true"))
    return Job(f"jobs/{name}", name.split(" "), made, scores)


def first(count: int, size: int = SIZE) -> dict[str, np.ndarray]:
    """Return right answers to the first ``count`` samples of the task ``a``."""
    return {"a": np.arange(size) < count}


def ranks(board: Leaderboard) -> dict[str, int | None]:
    (table,) = board.tables
    return {line.name: line.rank for line in table.lines}


def test_the_best_come_first_and_those_alike_share_a_rank() -> None:
    # The second lacks two of the first's 400 right answers, which resampling leaves out at times;
    # the third lacks a hundred.
    board = leaderboard("s", [job("low", first(200)), job("top", first(300)), job("b", first(298))])
    assert ranks(board) == {"top": 1, "b": 1, "low": 3, "individual": None}
    lines = {line.name: line for line in board.tables[0].lines}
    assert lines["top"].difference is None
    assert lines["b"].difference.difference == pytest.approx(-2 / 360)
    assert lines["b"].difference.low < 0 <= lines["b"].difference.high
    assert lines["low"].difference.difference == pytest.approx(-100 / 360)
    assert lines["low"].average.value == 0.5 and lines["low"].normalized == 0.5 / 0.9
    assert lines["low"].stderr == pytest.approx(0.5 / 20 / 0.9)  # of 400 throws, over 0.9


def test_equal_models_share_a_rank_in_the_order_of_their_names() -> None:
    board = leaderboard("s", [job("y", first(300)), job("x", first(300))])
    assert list(ranks(board).items())[:2] == [("x", 1), ("y", 1)]


def test_a_rank_is_told_by_its_best_alone() -> None:
    """The next is unlike the best, though better on average than one that is like it."""
    best = np.arange(SIZE) < 300
    steady = best.copy()
    steady[290:300] = False  # 10 answers lost and none won: surely worse
    other = best.copy()
    other[200:300], other[300:388] = False, True  # 12 fewer right, but 100 lost and 88 won
    jobs = [job("best", {"a": best}), job("steady", {"a": steady}), job("other", {"a": other})]
    board = leaderboard("s", jobs)
    assert list(ranks(board).items())[:3] == [("best", 1), ("other", 1), ("steady", 3)]


def test_far_apart_means_what_resampling_says() -> None:
    """Nothing is resampled there, so that it must not change a rank."""
    from fusion_bench.report import leaderboard as module

    random = np.random.default_rng(0)
    jobs = [
        job(f"j{n}", {t: random.random(SIZE) < 0.5 + n / 40 for t in ("a", "b")}) for n in range(8)
    ]
    found = ranks(leaderboard("s", jobs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_APART", float("inf"))
        assert ranks(leaderboard("s", jobs)) == found
    assert len(set(found.values())) > 3


def test_what_cannot_be_compared_has_a_table_of_its_own() -> None:
    jobs = [
        job("x", first(300)),
        job("half", first(300), precision="bf16-true"),
        job("short", first(150, size=200)),
        job("y", first(301)),
    ]
    board = leaderboard("s", jobs)
    names = [[line.name for line in t.lines if line.rank is not None] for t in board.tables]
    assert names == [["y", "x"], ["half"], ["short"]]
    assert board.tables[0].facts["precision"] == "32-true"
    assert board.tables[1].facts["precision"] == "bf16-true"
    assert board.tables[2].facts["samples"] == "200"
    assert "tasks" not in board.tables[0].facts  # which they have in common


def test_without_individual_models_the_accuracy_ranks() -> None:
    bare = job("x", first(300))
    del bare.report.models["a"]
    bare.report.models["merged"].tasks["a"].main.normalized = None
    (table,) = leaderboard("s", [bare, job("y", first(200))]).tables
    assert table.ranked_by == "accuracy" and "normalised" not in table.sentence()
    assert [line.rank for line in table.lines if line.role == "merged"] == [1, 2]


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Leaderboard, Path]:
    jobs = [job(f"{HOSTILE} k={n}", {"a": first(200 + 20 * n)["a"], HOSTILE: first(90)["a"]})
            for n in range(4)]  # fmt: skip
    board = leaderboard(HOSTILE, jobs, [Failure(name="f", directory="f", message=HOSTILE)])
    save(board, tmp_path)
    return board, tmp_path


def test_json_is_read_again(hostile: tuple[Leaderboard, Path]) -> None:
    board, directory = hostile
    assert Leaderboard.model_validate_json((directory / "leaderboard.json").read_text()) == board
    assert json.loads((directory / "leaderboard.json").read_text())["schema_version"] == 2


def test_csv_opens_with_numbers(hostile: tuple[Leaderboard, Path]) -> None:
    board, directory = hostile
    frame = pd.read_csv(directory / "leaderboard.csv")
    assert frame["accuracy"].dtype == frame["normalized_accuracy"].dtype == np.float64
    assert frame["rank"].max() == 4 and len(frame) == 4 + 1 + 1
    (table,) = board.tables
    assert frame["accuracy"].tolist()[:5] == [line.average.value for line in table.lines]
    assert frame["error"].dropna().tolist() == [f"'{HOSTILE}"]
    # A spreadsheet takes none of it for a formula.
    rows = csv.reader(io.StringIO((directory / "leaderboard.csv").read_text()))
    assert not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "@")]


def test_tex_is_balanced_and_escaped(hostile: tuple[Leaderboard, Path]) -> None:
    board, directory = hostile
    text = (directory / "leaderboard.tex").read_text()
    assert text == tex(board)
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0].startswith(r"\begin{tabular}{rlrrrr}") and body[-1] == r"\end{tabular}"
    rows = [line for line in body if line.endswith(r"\\")]
    assert len(rows) == 1 + 5  # the failed job is no row
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == 5
        plain = re.sub(r"\\text\w+\{\}|\\[&%$#_{}]|\\\\$", "", row)
        assert not re.search(r"[%$#_{}~^\\]", plain)
        assert plain.isascii()
    assert "U+1F642" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_tex_compiles(hostile: tuple[Leaderboard, Path]) -> None:
    _, directory = hostile
    (directory / "all.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}"
        "\\begin{document}\\input{leaderboard}\\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    assert subprocess.run(command, cwd=directory, capture_output=True).returncode == 0


def test_the_page_is_well_formed_and_names_stay_text(hostile: tuple[Leaderboard, Path]) -> None:
    _, directory = hostile
    text = (directory / "leaderboard.html").read_text()
    assert text.count("<script>") == 1 and "<script>alert" not in text
    assert "https://" not in text and "http://www.w3.org" not in re.sub('xmlns="[^"]*"', "", text)
    body = re.search("<main>.*</main>", text, re.DOTALL)
    main = ElementTree.fromstring(body[0].replace("&thinsp;", " "))
    (table,) = main.iter("table")
    assert len(list(table.find("tbody"))) == 5
    assert HOSTILE.split("\n")[0] in "".join(table.itertext())
    (picture,) = main.iter("svg")
    assert picture.find("title").text == "Average normalised accuracy"
    assert len(list(picture.iter("path"))) > 3


def test_markdown_keeps_its_columns(hostile: tuple[Leaderboard, Path]) -> None:
    _, directory = hostile
    lines = (directory / "leaderboard.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 + 5
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert not any("<" in line for line in lines)


def test_the_terminal_shows_it(hostile: tuple[Leaderboard, Path]) -> None:
    from rich.console import Console

    board, _ = hostile
    shown = io.StringIO()
    print_leaderboard(board, Console(file=shown, width=300))
    assert "failed: f: =x|<script>" in shown.getvalue()
    narrow = io.StringIO()
    print_leaderboard(board, Console(file=narrow, width=90))
    assert "normalised" in narrow.getvalue()


def test_curves_where_a_number_was_swept() -> None:
    jobs = [job(f"k={n / 10}", first(200 + n)) for n in range(3)]
    jobs += [job("method=other", first(210))]
    from fusion_bench.report.leaderboard_files import page

    text = page(leaderboard("s", jobs))
    assert "k=0.1" in re.search("<desc>(.*?)</desc>", text)[1]


def test_failed_jobs_alone_make_no_table() -> None:
    board = leaderboard("s", [], [Failure(name="f", directory="f", message="no")])
    assert board.tables == [] and [f.name for f in board.failures] == ["f"]
