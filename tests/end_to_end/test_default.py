"""`fusion_bench`, with no arguments, in an empty directory, with no network."""

import re
import shlex
from pathlib import Path
from statistics import fmean

import nbformat
import pytest
from commandline import REPOSITORY, fusion_bench
from fixtures_notebook import NOTEBOOK, executed
from hub import client_environment, closed_endpoint

from fusion_bench.report import Report

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.timeout(1500),
]  # the build takes minutes, and more on a busy machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run the default twice, over one cache; return the runs' directories.

    The first test that asks for it takes minutes: the zoo is built as a user's first run builds it.
    """
    root = tmp_path_factory.mktemp("default")
    env = client_environment(closed_endpoint(), root / "hf")
    env["FUSION_BENCH_CACHE"] = str(root / "cache")
    for name in ("first", "second"):
        (root / name).mkdir()
        done = fusion_bench(cwd=root / name, env=env, timeout=1200, at_once=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert ("Building the zoo" in done.stdout) == (name == "first")
        for word in ("pretrained", "individual", "merged", "average", "normalised"):
            assert word in done.stdout
    return {name: root / name for name in ("first", "second")}


def test_what_the_pages_show_in_python_runs(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(runs["first"].parent / "cache"))
    shown = [
        code
        for page in sorted((REPOSITORY / "docs").rglob("*.md"))
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        if "outputs/" in code or "zoo" in code
    ]
    assert len(shown) >= 2
    (out,) = runs["first"].glob("outputs/*/*")
    for code in shown:  # the pages name a run of their own
        exec(re.sub(r"outputs/[\d-]+/[\d-]+", str(out), code), {})


# It takes a quarter of a minute: a real kernel runs each cell.
def test_the_notebook_runs(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(runs["first"].parent / "cache"))
    notebook = executed(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    html = [data["text/html"] for data in shown if "text/html" in data]
    assert any("<svg" in text for text in html) and any("dataframe" in text for text in html)
    assert any("image/png" in data for data in shown)
    assert list(tmp_path.iterdir()) == []


def report(run: Path) -> Report:
    (path,) = run.glob("outputs/*/*/report.json")
    return Report.load(path)


def test_it_is_a_fair_miniature(runs: dict[str, Path]) -> None:
    models = report(runs["first"]).models
    pretrained, merged = models.pop("_pretrained_"), models.pop("merged")
    own = {task: r.main.value for m in models.values() for task, r in m.tasks.items()}
    assert len(own) >= 4 and list(own) == list(merged.tasks) == list(pretrained.tasks)
    assert all(own[task] > result.main.value + 0.1 for task, result in pretrained.tasks.items())
    assert fmean(own.values()) > 0.85
    assert pretrained.average is not None and merged.average is not None
    assert pretrained.average.main.value + 0.02 < merged.average.main.value
    assert merged.average.main.value < fmean(own.values()) - 0.02


def test_the_second_run_says_the_same(runs: dict[str, Path]) -> None:
    first, second = report(runs["first"]), report(runs["second"])
    assert second.models == first.models and second.tasks == first.tasks


def test_a_run_leaves_its_output_directory_and_nothing_else(runs: dict[str, Path]) -> None:
    for run in runs.values():
        assert [path.name for path in run.iterdir()] == ["outputs"]
        (out,) = run.glob("outputs/*/*")
        assert {p.name for p in out.iterdir()} == {
            *(".hydra", "cli.log", "config.yaml"),
            *("report.scores.safetensors", "report.html", "report.json", "report.md"),
        }


def test_the_figures_that_the_package_holds_are_found_again(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(runs["first"].parent / "cache"))
    rows = "methods=[pretrained,individual,simple_average,task_arithmetic,iso_c]"
    done = fusion_bench("--config-name", "reproduce", rows, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "35 of 35 figures are within their tolerance." in done.stdout


def shown_command(page: str, start: str) -> list[str]:
    """Return the words of a command on a page, by its beginning."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return shlex.split(line)[1:]


def test_the_metric_of_ones_own(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(runs["first"].parent / "cache"))
    words = shown_command("metrics.md", "fusion_bench --plugins examples/own_metric.py")
    words[1] = str(REPOSITORY / words[1])
    done = fusion_bench(*words, "taskpool.save_predictions=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy, %" in done.stdout
    for model, result in report(tmp_path).models.items():
        assert f"'{model}' was evaluated before" in done.stdout
        for value in result.tasks.values():
            balanced, accuracy, _ = value.metrics.values()
            assert balanced.value == pytest.approx(accuracy.value, abs=0.02)
            # smaller, as the classes differ: their numbers are part of the value
            assert 0.5 < balanced.stderr / accuracy.stderr < 1.05
    refused = fusion_bench(*words[2:], cwd=tmp_path)
    assert refused.returncode == 2
    assert "--allow own_metric" in refused.stderr


def test_the_owner_that_the_page_names(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(runs["first"].parent / "cache"))
    words = shown_command("metrics.md", "fusion_bench modelpool.models.numbers=")
    done = fusion_bench(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, same = report(tmp_path), report(runs["first"])
    assert found.tasks["digits"].owner == "numbers"
    assert found.models["numbers"].tasks == same.models["digits"].tasks
    assert found.models["merged"].tasks["digits"].relation == "own"
    share = same.models["merged"].average.normalized
    assert found.models["merged"].average.normalized == pytest.approx(share, abs=1e-3)


@pytest.fixture(scope="module")
def dense(runs: dict[str, Path]) -> dict[str, Report]:
    """Merge the dense family in two ways; it is built first, which takes a minute."""
    root, found = runs["first"].parent, {}
    env = client_environment(closed_endpoint(), root / "hf")
    env["FUSION_BENCH_CACHE"] = str(root / "cache")
    before = sorted(path.name for path in (root / "cache" / "zoo").iterdir() if path.is_dir())
    assert len(before) == 1
    for method in ("simple_average", "task_arithmetic"):
        place = root / f"dense_{method}"
        place.mkdir()
        words = ("--config-name", "demo_dense", f"method={method}")
        done = fusion_bench(*words, cwd=place, env=env, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        built = "Built the zoo's dense tasks" in done.stdout
        assert built == (method == "simple_average")
        for word in ("mean IoU", "RMSE", "mean angle", "normalised"):
            assert word in done.stdout
        found[method] = report(place)
    return found


# Takes two minutes: the family is built as people build it. Smaller ones are in tests/zoo/dense.
@pytest.mark.exhaustive(only=True)
@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic"])
def test_a_merge_lies_between_the_pretrained_encoder_and_the_dense_experts(
    dense: dict[str, Report], method: str
) -> None:
    models, tasks = dense[method].models, dense[method].tasks
    clearly = {"segmentation": 0.15, "depth": -0.08, "normals": -1.5}
    assert list(tasks) == list(clearly)
    for task, gain in clearly.items():
        before, merged, own = (
            models[name].tasks[task].metrics[tasks[task].main].value
            for name in ("_pretrained_", "merged", task)
        )
        sign = 1 if gain > 0 else -1
        assert (own - before) * sign > abs(gain)
        assert before * sign < merged * sign < own * sign
    shares = [models[name].average.normalized for name in ("_pretrained_", "merged")]
    assert 0.5 < shares[0] < shares[1] - 0.03 < 0.97
