"""Published figures are checked by running what they are of."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from conftest import CLASSES

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import ReproduceProgram
from fusion_bench.report import Report
from fusion_bench.report.reference import Reference
from fusion_bench.report.reproduction import Reproduction

Config = dict[str, Any]


def percents(report: Report, model: str, own: bool = False) -> list[float]:
    """Return a model's accuracies; with ``own`` those of each task's individual model."""
    return [
        100 * report.models[task if own else model].tasks[task].main.value for task in report.tasks
    ]


@cache
def measured(written: str) -> Config:
    """Return a table's rows for the family: what ordinary runs of its config find, rounded."""
    program_config = json.loads(written)
    average = instantiate(program_config).run()
    arithmetic = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 1.5}
    sharp = instantiate(program_config | {"method": arithmetic}).run()
    rows: Config = {
        "pretrained": {"accuracy": percents(average, "_pretrained_")},
        "individual": {"accuracy": percents(average, "", own=True)},
        "average": {
            "overrides": ["method=simple_average"],
            "accuracy": percents(average, "merged"),
            "average": sum(percents(average, "merged")) / 2,
        },
        "sharp": {
            "overrides": ["method=task_arithmetic", "method.scaling_factor=1.5"],
            "average": sum(percents(sharp, "merged")) / 2,
        },
    }
    for row in rows.values():
        row |= {k: [round(v, 1) for v in row[k]] for k in row if k == "accuracy"}
        row |= {k: round(row[k], 1) for k in row if k == "average"}
    return rows


@pytest.fixture
def conf(program_config: Config, tmp_path: Path) -> Path:
    """Write the family's pools as a user's configs, and a table of true figures, rounded."""
    for group in ("modelpool", "taskpool"):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "family.yaml").write_text(
            yaml.safe_dump(program_config[group])
        )
    reference = {
        "source": "<b>Nobody</b>",
        "link": "https://example.org",
        "checkpoints": "random",
        "modelpool": "family",
        "taskpool": "family",
        "tasks": list(CLASSES),
        "tolerance": 0.1,
        "rows": measured(json.dumps(program_config)),
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(reference, sort_keys=False))
    return tmp_path


def change(conf: Path, **changes: Any) -> Config:
    """Change top keys of the reference; return the whole."""
    path = conf / "mine.yaml"
    changed = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return dict(changed)


def reproduce(conf: Path, *arguments: str, reference: str = "mine.yaml") -> Any:
    return fusion_bench(
        *("--config-dir", "conf", "--config-name", "reproduce", f"reference={reference}"),
        *("fabric.accelerator=cpu", "hydra.run.dir=out", *arguments),
        cwd=conf,
    )


def test_true_figures_are_found_again(conf: Path) -> None:
    done = reproduce(conf)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "8 of 8 figures are within their tolerance." in done.stdout
    found = Reproduction.load(conf / "out" / "reproduce.json")
    assert list(found.rows) == ["pretrained", "individual", "average", "sharp"]
    assert found.failed == [] and list(found.rows["sharp"]) == ["average"]
    published = yaml.safe_load((conf / "mine.yaml").read_text())["rows"]
    for row, figures in found.rows.items():
        for column, figure in figures.items():
            expected = published[row].get("average")
            if column != "average":
                expected = published[row]["accuracy"][list(CLASSES).index(column)]
            assert figure.published == expected
            assert figure.found == pytest.approx(expected, abs=0.051)
    assert list(found.reports) == ["average", "sharp"]
    report = Report.load(conf / "out" / found.reports["sharp"])
    assert report.run.config["method"]["scaling_factor"] == 1.5 and report.run.seed == 0
    assert "- 8 of 8 figures are within" in (conf / "out" / "reproduce.md").read_text()
    page = (conf / "out" / "reproduce.html").read_text()
    assert "&lt;b&gt;Nobody" in page and "<b>Nobody" not in page

    before = (conf / "out" / found.reports["sharp"]).read_bytes()
    again = reproduce(conf)  # goes on where it was
    assert again.returncode == 0 and again.stdout.count("This run is already done") == 2
    assert (conf / "out" / found.reports["sharp"]).read_bytes() == before


def test_a_wrong_figure_is_named_and_fails_the_process(conf: Path) -> None:
    rows = change(conf)["rows"]
    true = rows["average"]["accuracy"][1]
    rows["average"]["accuracy"][1] = 90.0
    rows["sharp"]["average"] -= 3
    rows["sharp"]["tolerance"] = 2.0
    change(conf, rows=rows)
    done = reproduce(conf)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    first, *rest = done.stderr.splitlines()
    assert first == "fusion_bench: reproduce: 6 of 8 figures are within their tolerance."
    assert rest[0] == (
        f"  average on b: published 90.0, found {true:.1f} ({true - 90:+.1f}, tolerance 0.1)"
    )
    assert rest[1].startswith("  sharp on average: published") and "tolerance 2)" in rest[1]
    result = json.loads((conf / "out" / "reproduce.json").read_text())
    assert len(result["figures"]) == 8
    assert rest[0].strip() in (conf / "out" / "reproduce.html").read_text().replace("&#43;", "+")

    assert "belongs to another run" in reproduce(conf, "methods=[pretrained,individual]").stderr
    done = reproduce(conf, "methods=[pretrained,individual]", "overwrite=true")
    assert done.returncode == 0, done.stderr
    found = Reproduction.load(conf / "out" / "reproduce.json")
    assert list(found.rows) == ["pretrained", "individual"]
    assert list(found.reports) == ["baselines"]


def refused(path: Path, changes: Config, **arguments: Any) -> str:
    path.write_text(yaml.safe_dump(changes))
    with pytest.raises(FusionBenchError) as caught:
        ReproduceProgram(str(path), dry_run=True, **arguments).run()
    return str(caught.value).replace(str(path), "FILE")


def test_mistakes_give_one_clear_message(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    good = Reference.load("zoo").model_dump()
    row = good["rows"]["simple_average"]

    def with_row(**changes: Any) -> Config:
        return good | {"rows": {"simple_average": row | changes}}

    assert refused(path, with_row(accuracy=[1.0, 2.0])) == (
        "reference: 'FILE': rows.simple_average.accuracy: 2 numbers for 6 tasks"
    )
    assert refused(path, with_row(overrides=[])) == (
        "reference: 'FILE': rows.simple_average.overrides: missing; name the method"
    )
    assert refused(path, with_row(accuracy=None, average=None)) == (
        "reference: 'FILE': rows.simple_average: it has neither 'accuracy' nor 'average'"
    )
    assert "rows.simple_average.average" in refused(path, with_row(average=120.0))
    assert "rows.simple_average.avg" in refused(path, with_row(avg=50.0))
    assert "tolerance" in refused(path, good | {"tolerance": -1})
    assert "Did you mean 'digits'?" in refused(
        path, with_row() | {"tasks": ["digit", *good["tasks"][1:]]}
    )
    assert refused(path, with_row(overrides=["method=simple_avrage"])).startswith(
        "reference.rows.simple_average: "
    )
    assert "method.scale" in refused(path, with_row(overrides=["+method.scale=1"]))
    assert refused(path, good, methods=["simple_averag"]) == (
        "methods: 'FILE' has no 'simple_averag'. Did you mean 'simple_average'?"
    )
    assert refused(path, good, methods=[]).startswith("methods: is empty.")
    path.write_text("rows: [")
    with pytest.raises(FusionBenchError, match="is not valid YAML"):
        Reference.load(str(path))
    with pytest.raises(FusionBenchError, match="Did you mean 'clip_vit_b32_ta8'"):
        Reference.load("clip_vit_b32_ta")
    with pytest.raises(FusionBenchError, match=r"there is no 'no/such\.yaml'"):
        Reference.load("no/such.yaml")


PUBLISHED = {"clip_vit_b32_ta8": (14, 10 * 9 + 4), "clip_vit_l14_ta8": (8, 8)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_whole_and_can_be_run(name: str, tmp_path: Path) -> None:
    reference = Reference.load(name)
    figures = [figure for row in reference.rows for figure in reference.figures(row)]
    assert (len(reference.rows), len(figures)) == PUBLISHED[name]
    for row in reference.rows.values():  # the averages that were published are those of the rows
        if row.accuracy is not None:
            assert row.average == pytest.approx(sum(row.accuracy) / 8, abs=0.1)
    program = ReproduceProgram(name, dry_run=True, output_dir=tmp_path)
    runs = program.prepared()
    assert [run.problems for run in runs.values()] == [[]] * len(runs)
    assert not list(tmp_path.iterdir())
    made = next(iter(runs.values()))
    assert made.taskpool is not None and made.modelpool is not None
    assert made.taskpool.task_names == reference.tasks == made.modelpool.model_names
    learned = {r for r, p in program.programs.items() if p.spec.allow_test_split}
    assert learned == {r for r in program.programs if r.startswith("adamerging")}


def test_a_dry_run_finds_the_problems_of_all_rows_once(conf: Path) -> None:
    pool = yaml.safe_load((conf / "conf" / "modelpool" / "family.yaml").read_text())
    pool["models"]["a"] = "/no/such"
    (conf / "conf" / "modelpool" / "family.yaml").write_text(yaml.safe_dump(pool))
    rows = change(conf)["rows"]
    for row, weights in (("average", "[1]"), ("sharp", "[1,2,3]")):
        rows[row]["overrides"] = ["method=linear/weighted_average", f"method.weights={weights}"]
    change(conf, rows=rows)
    done = reproduce(conf, "dry_run=true")
    assert done.returncode == 2
    told = done.stderr.removeprefix("fusion_bench: ").splitlines()
    assert [line.strip().split(": ")[0] for line in told] == [
        "reference.modelpool.models.a",
        "reference.rows.average.method.weights",
        "reference.rows.sharp.method.weights",
    ]
