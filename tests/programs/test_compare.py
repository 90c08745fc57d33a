"""Runs laid side by side: differences against counts by hand, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from commandline import fusion_bench
from fixtures_report import model, report

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import CompareProgram
from fusion_bench.report import Report, Scores, TaskResult, summarise
from fusion_bench.results import ACCURACY, LOSS, SampleScores

#: What a task's identity consists of.
IDENTITY = ("dataset", "classes, prompts or text tower", "image preprocessing")


def first(right: int, samples: range = range(100)) -> SampleScores:
    """Return the scores of a model that gets so many samples right, the first ones."""
    wrong = np.arange(len(samples)) >= right
    labels, losses = np.zeros(len(samples), int), np.full(len(samples), 0.5)
    return SampleScores.classified(np.array(samples), labels, wrong.astype(int), losses)


def write(
    place: Path, merged: Mapping[str, int], tasks: tuple[str, ...] = ("a", "b"), **changes: Any
) -> Path:
    """Write the report of a run whose merged model got so many of 100 right, the first ones."""
    models = {
        "_pretrained_": model("pretrained", **dict.fromkeys(tasks, 40)),
        **{task: model("individual", **{task: 80}) for task in tasks},
        "merged": model("merged", **merged),
    }
    made = report(models)
    summarise(models, made.tasks)
    made.tasks = {task: made.tasks[task] for task in tasks}
    scores = Scores()
    for name, result in models.items():
        for task, counted in result.tasks.items():
            right = round(100 * counted.main.value)
            scores.add(task, name, first(right))
    for key, value in changes.items():
        if key in IDENTITY:
            made.tasks["a"].identity[key] = value
        else:
            setattr(made.run if key == "precision" else made.tasks["a"], key, value)
    made.save(place / "report.json")
    scores.save(place / "report.json")
    return place


def compared(*places: Path, **arguments: Any) -> Report:
    found = CompareProgram([str(place) for place in places], **arguments).run()
    assert found is not None
    return found


def test_differences_by_hand(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": 60, "b": 40})
    other = write(tmp_path / "other", {"a": 70, "b": 40})
    found = compared(one, other, output_dir=tmp_path / "out")
    assert list(found.models) == ["_pretrained_", "a", "b", "one", "other"]
    (comparison,) = found.main_comparisons()
    assert (comparison.of, comparison.beside) == ("other", "one")
    assert comparison.on("a").difference == pytest.approx(0.1)
    # Ten of a hundred samples differ, all one way: the interval is that of a binomial share.
    assert comparison.on("a").low == pytest.approx(0.04, abs=0.011)
    assert comparison.on("a").high == pytest.approx(0.16, abs=0.011)
    assert comparison.on("b").model_dump() == {"difference": 0, "interval": (0, 0)}
    assert comparison.average.difference == pytest.approx(0.05)
    assert comparison.verdict == "better"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.yaml", "report.scores.safetensors", "report.html", "report.json", "report.md")
    }
    assert Report.load(tmp_path / "out" / "report.json") == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert "other is better than one" in page and str(one / "report.json") in page


def test_a_comparison_is_a_report_that_can_be_compared(tmp_path: Path) -> None:
    one, other = (
        write(tmp_path / "one", {"a": 60, "b": 40}),
        write(tmp_path / "x", {"a": 1, "b": 1}),
    )
    compared(one, other, output_dir=tmp_path / "both")
    found = compared(tmp_path / "both", write(tmp_path / "third", {"a": 90, "b": 90}))
    assert [c.name for c in found.contenders() if c.role == "merged"] == [
        *("both one", "both x", "third")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16-true"}, "precision: 32-true in 'one', bf16-true in 'other'"),
        ({"dataset": "f"}, "a: dataset: a in 'one', f in 'other'"),
        ({"num_samples": 99}, "a: number of samples: 100 in 'one', 99 in 'other'"),
        (
            {"classes, prompts or text tower": "1" * 64},
            "a: classes, prompts or text tower: unknown in 'one', 11111111",
        ),
        ({"image preprocessing": "2" * 64}, "a: image preprocessing: unknown in 'one', 22222222"),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one = write(tmp_path / "one", {"a": 60, "b": 40})
    other = write(tmp_path / "other", {"a": 70, "b": 40}, **changes)
    with pytest.raises(FusionBenchError) as refused:
        compared(one, other, output_dir=tmp_path / "out")
    assert message in str(refused.value) and "strict=false" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert len(compared(one, other, strict=False).main_comparisons()) == 1


def test_other_samples_of_the_same_number_are_noticed(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": 60, "b": 40})
    other = write(tmp_path / "other", {"a": 60, "b": 40})
    shifted = Scores()
    for task, models in Scores.load(other / "report.json").tasks.items():
        for name, found in models.items():
            shifted.add(task, name, replace(found, samples=np.arange(50, 150)))
    shifted.save(other / "report.json")
    with pytest.raises(FusionBenchError, match="a: selection of samples"):
        compared(one, other)
    # The 50 that both have: 10 of the first run's first 60, 50 of the second's.
    (comparison,) = compared(one, other, strict=False).main_comparisons()
    assert comparison.on("a").difference == pytest.approx(50 / 50 - 10 / 50)


def test_only_common_tasks_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write(tmp_path / "one", {"a": 60, "b": 40})
    other = write(tmp_path / "other", {"a": 70}, tasks=("a",))
    found = compared(one, other)
    assert list(found.tasks) == ["a"] and "left out" in caplog.text
    average = found.models["one"].average
    assert average is not None and average.main.value == 0.6
    third = write(tmp_path / "third", {"b": 70}, tasks=("b",))
    with pytest.raises(FusionBenchError, match="no common task"):
        compared(other, third)


def test_families_stand_as_one(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {"a": 60, "b": 40}) for name in ("one", "two"))
    made, scores = Report.load(two / "report.json"), Scores.load(two / "report.json")
    made.models["merged/a"] = model("merged", a=90)
    made.models["merged/b"] = model("merged", b=90)
    del made.models["merged"]
    for task in ("a", "b"):
        scores.add(task, f"merged/{task}", first(90))
        del scores.tasks[task]["merged"]
    made.save(two / "report.json")
    scores.save(two / "report.json")
    found = compared(one, two)
    assert [c.name for c in found.contenders() if c.role == "merged"] == ["one", "two"]
    (comparison,) = found.main_comparisons()
    assert comparison.average.difference == pytest.approx(fmean([0.3, 0.5]))


def test_baselines_that_differ_are_kept_apart(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {"a": 60, "b": 40}) for name in ("one", "two"))
    made = Report.load(two / "report.json")
    made.models["a"].identity = "1" * 64
    made.save(two / "report.json")
    assert {"a", "a (two)", "b"} <= set(compared(one, two).models)


def test_names(tmp_path: Path) -> None:
    places = [write(tmp_path / d / "12-00-00", {"a": 60, "b": 40}) for d in ("day1", "day2")]
    program = CompareProgram([str(places[0]), str(places[1] / "report.json")])
    assert list(program.paths) == ["day1 12-00-00", "day2 12-00-00"]
    assert list(CompareProgram({"x": str(places[0]), "y": str(places[1])}).paths) == ["x", "y"]
    for reports, message in (
        ([str(places[0])], "at least two"),
        ([str(places[0])] * 2, "listed twice"),
        ({"a/b": str(places[0]), "c": str(places[1])}, "'a/b' has a '/'"),
    ):
        with pytest.raises(FusionBenchError, match=message):
            CompareProgram(reports)


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good", {"a": 60, "b": 40})
    bad = tmp_path / "bad" / "report.json"
    for content, message in (
        (None, "(?i)cannot read '.*bad'"),
        ("{", "is not a report of this version"),
        (
            json.dumps({"schema_version": 1}),
            "is not a report of this version: its text: it lacks 'run', which schema 1 has",
        ),
    ):
        if content is not None:
            bad.parent.mkdir(exist_ok=True)
            bad.write_text(content)
        with pytest.raises(FusionBenchError, match=message):
            compared(good, bad.parent)
    (good / "report.scores.safetensors").unlink()
    other = write(tmp_path / "other", {"a": 60, "b": 40})
    with pytest.raises(FusionBenchError, match=r"report\.scores\.safetensors' is missing"):
        compared(good, other)


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_file_that_cannot_be_read_is_named(tmp_path: Path, dry_run: bool) -> None:
    good = write(tmp_path / "good", {"a": 60, "b": 40})
    with pytest.raises(FusionBenchError) as caught:
        CompareProgram(["/no/a.json", str(good), "/no/b.json"], dry_run=dry_run).run()
    assert [problem.key for problem in caught.value.problems] == ["reports[0]", "reports[2]"]
    with pytest.raises(FusionBenchError, match=r"^reports\.x: "):
        CompareProgram({"x": "/no/a.json", "y": str(good)}, dry_run=dry_run).run()


def test_a_dry_run_reads_the_reports_and_writes_nothing(tmp_path: Path) -> None:
    runs = [str(write(tmp_path / name, {"a": 60, "b": 40})) for name in ("x", "y")]
    assert CompareProgram(runs, output_dir=tmp_path / "out", dry_run=True).run() is None
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(program_config: dict[str, Any], tmp_path: Path) -> None:
    scaled = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.9}
    for name, method in (("average", program_config["method"]), ("sum", scaled)):
        own = {"method": method, "baselines": "none", "output_dir": str(tmp_path / name)}
        instantiate({**program_config, **own}).run()
    command = ("--config-name", "compare", "hydra.run.dir=out", "reports=[average,sum]")
    done = fusion_bench(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "difference, points" in done.stdout and "sum – average" in done.stdout
    found = Report.load(tmp_path / "out" / "report.json")
    expected = [
        Report.load(tmp_path / n / "report.json").models["merged"] for n in ("average", "sum")
    ]
    assert [found.models[n].tasks for n in ("average", "sum")] == [m.tasks for m in expected]
    done = fusion_bench("--config-name", "compare", "reports=[average]", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("fusion_bench: reports: name at least")


def test_fewer_samples_are_said_and_counted(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": 60, "b": 40})
    other = write(tmp_path / "other", {"a": 60, "b": 40})
    made, scores = Report.load(other / "report.json"), Scores()
    for task, models in Scores.load(other / "report.json").tasks.items():
        made.tasks[task].num_samples = 50
        for name, found in models.items():
            half = found.at(found.samples < 50)
            made.models[name].tasks[task] = TaskResult.of(half, [ACCURACY, LOSS])
            scores.add(task, name, half)
    made.save(other / "report.json")
    scores.save(other / "report.json")
    found = compared(one, other, strict=False, output_dir=tmp_path / "out")
    assert found.tasks["a"].num_samples == 50
    # The first 50 samples: all right on a, where 60 of 100 were; 40 right on b.
    assert [found.models["one"].tasks[t].main.value for t in ("a", "b")] == [1.0, 0.8]
    assert set(found.models) == {"_pretrained_", "a", "b", "one", "other"}
    for file in ("report.md", "report.html"):
        text = (tmp_path / "out" / file).read_text()
        assert "a: number of samples: 100 in " in text and "50 in " in text
