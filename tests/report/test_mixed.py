"""Tasks of different metrics: what has an average, which way is better, and how it is shown."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from fixtures_report import report

from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import CompareProgram
from fusion_bench.report import (
    Contender,
    ModelResult,
    Report,
    Scores,
    TaskInfo,
    TaskResult,
    compare_contenders,
    comparison,
    markdown,
    metric_info,
    summarise,
)
from fusion_bench.report.figures import comparison_sentence, task_labels
from fusion_bench.report.leaderboard import Job, leaderboard
from fusion_bench.report.leaderboard_files import markdown as board_markdown
from fusion_bench.report.leaderboard_files import page as board_page
from fusion_bench.report.leaderboard_files import table_of_values, tex
from fusion_bench.report.losses import task_losses
from fusion_bench.report.page import page
from fusion_bench.results import ACCURACY, METRICS, Metric, SampleScores, with_ones

RMSE = METRICS["rmse"]
PERPLEXITY = METRICS["perplexity"]
SIZE = 200


def scored(metric: Metric, level: float, seed: int) -> SampleScores:
    """Return scores around a level: the share that is right, or the mean of the terms."""
    drawn = np.random.default_rng(seed).random(SIZE)
    values = drawn < level if metric is ACCURACY else level * (0.5 + drawn)
    return SampleScores(np.arange(SIZE), {metric.name: with_ones(values)})


def evaluated(metrics: dict[str, Metric], **levels: dict[str, float]) -> tuple[Report, Scores]:
    """Return a report of models with so good scores: a task's own model has its name."""
    scores, models = Scores(), {}
    for name, own in levels.items():
        role = "individual" if name in metrics else name.strip("_").partition("0")[0]
        results = {}
        for number, (task, level) in enumerate(own.items()):
            found = scored(metrics[task], level, number)
            scores.add(task, name, found)
            results[task] = TaskResult.of(found, [metrics[task]])
        models[name] = ModelResult(role=role, identity="0" * 64, num_parameters=1, tasks=results)
    infos = {
        task: TaskInfo(
            kind="test",
            main=metric.name,
            metrics=[metric_info(metric)],
            num_samples=SIZE,
            identity={"dataset": task},
            owner=task if task in models else None,
        )
        for task, metric in metrics.items()
    }
    summarise(models, infos)
    found = report({}).model_copy(update={"models": models, "tasks": infos})
    scores.metrics = {task: [metric] for task, metric in metrics.items()}
    found.comparisons = compare_contenders(found, scores)
    return found, scores


def mixed(merged: float = 2.0) -> tuple[Report, Scores]:
    return evaluated(
        {"shapes": ACCURACY, "depth": RMSE},
        _pretrained_={"shapes": 0.4, "depth": 8.0},
        shapes={"shapes": 0.9},
        depth={"depth": 1.0},
        merged={"shapes": 0.8, "depth": merged},
    )


def test_only_normalised_values_have_an_average() -> None:
    found, _ = mixed()
    merged = found.models["merged"]
    shape, depth = (merged.tasks[task].main for task in ("shapes", "depth"))
    own = found.models["depth"].tasks["depth"].main.value
    assert depth.normalized == pytest.approx(own / depth.value) and depth.normalized < 1
    assert merged.average is not None and merged.average.metrics == {}
    assert merged.average.normalized == pytest.approx((shape.normalized + depth.normalized) / 2)
    assert found.main_metric is None and task_labels(found)[1] == "depth: RMSE ↓"
    rows = {row.name: row for row in comparison(found)}
    assert rows["merged"].average is None and rows["individual"].normalized == pytest.approx(1)


def test_a_lower_error_is_better() -> None:
    found, _ = evaluated(
        {"depth": RMSE}, _pretrained_={"depth": 8.0}, depth={"depth": 1.0}, merged={"depth": 2.0}
    )
    theirs = {c.beside: c for c in found.comparisons}
    assert theirs["pretrained"].verdict == "better" and theirs["individual"].verdict == "worse"
    assert theirs["pretrained"].average.difference < 0
    sentence = comparison_sentence(found, theirs["pretrained"])
    assert re.fullmatch(
        r"merged is better than pretrained on this test set: RMSE -\d\.\d+ \(95 % interval -.*\)\.",
        sentence,
    )


def test_the_verdict_is_of_normalised_values_where_metrics_differ() -> None:
    found, _ = mixed()
    theirs = {c.beside: c for c in found.comparisons}
    assert theirs["pretrained"].metrics == {} and theirs["pretrained"].verdict == "better"
    # The pretrained model's values are shares of the own models' too.
    assert theirs["individual"].verdict == "worse"
    assert "points of normalised values" in comparison_sentence(found, theirs["individual"])


def test_what_cannot_be_normalised_has_no_average() -> None:
    found, scores = evaluated(
        {"shapes": ACCURACY, "text": PERPLEXITY},
        _pretrained_={"shapes": 0.4, "text": 3.0},
        shapes={"shapes": 0.9},
        text={"text": 1.0},
        merged={"shapes": 0.8, "text": 2.0},
    )
    merged = found.models["merged"]
    assert merged.tasks["text"].main.normalized is None
    assert merged.average is not None and merged.average.normalized is None
    (first, *_) = found.comparisons
    assert first.average is None and first.verdict is None
    assert "have no average" in comparison_sentence(found, first)
    assert "have no average" in markdown(found) and "have no average" in page(found, scores)


def test_the_page_and_the_table_show_units_and_directions() -> None:
    found, scores = mixed()
    text, shown = markdown(found), page(found, scores)
    assert "| model | shapes: accuracy, % | depth: RMSE ↓ | normalised |" in text
    assert "↓ lower is better" in text and "↓ lower is better" in shown
    assert "only normalised values have an average" in shown
    assert ">average<" not in shown
    (merged,) = (c for c in found.contenders() if c.role == "merged")
    losses = task_losses(found, merged)
    assert [loss.task for loss in losses] == ["depth", "shapes"]  # half of it is lost
    assert all(loss.gain < 0 for loss in losses) and losses[0].change > 0
    assert len(re.findall('class="num bad"', shown)) == 2


def test_the_best_merged_model_has_the_lowest_error() -> None:
    found, scores = evaluated(
        {"depth": RMSE}, depth={"depth": 1.0}, merged={"depth": 3.0}, merged02={"depth": 2.0}
    )
    shown = page(found, scores)
    star = re.search(r"<bdi>(merged\d*)</bdi>(?:(?!</tr>).)*★", shown, re.DOTALL)
    assert star is not None and star[1] == "merged02"
    assert "Of 2 merged models this is <bdi>merged02</bdi>" in shown


def job(name: str, merged: float, metrics: str) -> Job:
    found, scores = mixed(merged) if metrics == "mixed" else alone(merged)
    return Job(f"jobs/{name}", [name], found, scores)


def alone(merged: float) -> tuple[Report, Scores]:
    return evaluated({"depth": RMSE}, merged={"depth": merged})


@pytest.mark.parametrize("metrics", ["mixed", "alone"])
def test_a_leaderboard_puts_the_lowest_error_first(metrics: str) -> None:
    board = leaderboard("s", [job(n, v, metrics) for n, v in (("x", 4.0), ("y", 2.0), ("z", 3.0))])
    (table,) = board.tables
    ranked = [(line.name, line.rank) for line in table.lines if line.rank is not None]
    assert ranked == [("y", 1), ("z", 2), ("x", 3)]
    text, shown, values = board_markdown(board), board_page(board), table_of_values(board)
    header = next(line for line in text.splitlines() if line.startswith("| rank"))
    head = values.splitlines()[0].split(",")
    if metrics == "mixed":
        assert table.ranked_by == "normalized" and table.common is None
        assert header == "| rank | run | normalised, % | shapes: accuracy, % | depth: RMSE ↓ |"
        assert head[5:8] == ["normalized_value", "average", "average_stderr"]
        assert "average RMSE" not in shown
    else:
        assert table.ranked_by == "rmse" and "the lowest first" in table.sentence()
        assert header == "| rank | run | normalised, % | average RMSE ↓ | depth (held out) |"
        assert head[5:8] == ["normalized_rmse", "rmse", "rmse_stderr"]
        assert table.lines[1].difference is not None and table.lines[1].difference.low > 0


def test_relations() -> None:
    found, _ = evaluated(
        {"a": ACCURACY, "b": ACCURACY, "c": ACCURACY},
        _pretrained_=dict.fromkeys("abc", 0.3),
        a=dict.fromkeys("abc", 0.8),
        b=dict.fromkeys("abc", 0.8),
        merged=dict.fromkeys("abc", 0.7),
    )
    relations = {n: [r.relation for r in m.tasks.values()] for n, m in found.models.items()}
    assert relations == {
        "_pretrained_": ["other", "other", "held_out"],
        "a": ["own", "other", "held_out"],
        "b": ["other", "own", "held_out"],
        "merged": ["own", "own", "held_out"],
    }
    assert found.own_models() == {"a": "a", "b": "b"}
    shown = page(found, Scores())
    assert shown.count("held out</small>") == 1 and shown.count('title="its own task"') == 2
    assert isinstance(found.contenders()[0], Contender)


def test_runs_with_different_metrics_are_compared_in_the_common_ones(tmp_path: Path) -> None:
    both = {"depth": {"depth": 1.0}, "merged": {"depth": 2.0}}
    runs = {}
    for name in ("rmse", "loss"):
        metrics = [RMSE, METRICS["loss"]] if name == "rmse" else [METRICS["loss"], RMSE]
        found, scores = evaluated({"depth": metrics[0]}, **both)
        scores.metrics["depth"] = metrics
        found.tasks["depth"].metrics = [metric_info(metric) for metric in metrics]
        for model, own in scores.tasks["depth"].items():
            rows = next(iter(own.statistics.values()))
            own = SampleScores(own.samples, {m.name: rows for m in metrics})
            scores.add("depth", model, own)
            found.models[model].tasks["depth"] = TaskResult.of(own, metrics)
        found.save(tmp_path / name / "report.json")
        scores.save(tmp_path / name / "report.json")
        runs[name] = str(tmp_path / name)
    with pytest.raises(FusionBenchError) as refused:
        CompareProgram(runs).run()
    assert "depth: main metric: RMSE ↓ in 'rmse', loss, nats ↓ in 'loss'" in str(refused.value)
    found = CompareProgram(runs, strict=False).run()
    assert found is not None and found.tasks["depth"].main == "rmse"
    assert [c.average.difference for c in found.main_comparisons()] == [0]


def test_what_cannot_be_ranked_has_a_table_all_the_same() -> None:
    boards = []
    for name in "xy":
        found, scores = evaluated(
            {"shapes": ACCURACY, "depth": RMSE}, merged={"shapes": 0.8, "depth": 2.0}
        )
        boards.append(Job(f"jobs/{name}", [name], found, scores))
    board = leaderboard("s", boards)
    (table,) = board.tables
    assert [(line.name, line.rank) for line in table.lines] == [("x", None), ("y", None)]
    assert "Not ranked: the tasks have different metrics" in board_markdown(board)
    assert "<svg" not in board_page(board) and "Not ranked" in board_page(board)
    assert table_of_values(board).count("\n") == 3 and r"\downarrow" in tex(board)


def test_values_that_are_no_numbers_have_no_verdict() -> None:
    found, scores = evaluated(
        {"depth": RMSE}, _pretrained_={"depth": math.nan}, depth={"depth": 1.0}, merged={"depth": 2}
    )
    verdicts = {c.beside: c.verdict for c in found.comparisons}
    assert verdicts == {"pretrained": None, "individual": "worse"}
    assert "a value is missing" in page(found, scores)


def test_a_model_may_own_two_tasks() -> None:
    found, _ = evaluated(
        {"a": ACCURACY, "b": ACCURACY, "c": ACCURACY},
        a={"a": 0.9, "b": 0.8},
        c={"c": 0.9},
        merged=dict.fromkeys("abc", 0.7),
    )
    found.tasks["b"].owner = "a"
    summarise(found.models, found.tasks)
    assert [c.name for c in found.contenders()] == ["individual", "merged"]
