"""The results below a folder: what is read, what is not, and how runs are ranked."""

import json
import os
import re
from pathlib import Path

import pytest
from fixtures_report import model, report, synthetic

from fusion_bench.problems import ConfigError
from fusion_bench.report import Report, metric_info, summarise
from fusion_bench.report.index import Index, index
from fusion_bench.report.index_page import page, save
from fusion_bench.report.leaderboard import Failure, Leaderboard
from fusion_bench.results import ACCURACY, METRICS

SCHEMA_1 = Path(__file__).parent / "schema_1"


def run(folder: Path, right: int, *, lower: bool = False, **changes: object) -> Report:
    """Write the report of a merged model with so many of 100 samples right on both tasks."""
    made = report(
        {
            "_pretrained_": model("pretrained", a=30, b=40),
            "a": model("individual", a=95),
            "b": model("individual", b=95),
            "merged": model("merged", a=right, b=right),
        }
    )
    if lower:
        for info in made.tasks.values():
            info.metrics = [metric_info(METRICS["perplexity"])]
            info.main = "perplexity"
        for own in made.models.values():
            for result in own.tasks.values():
                result.metrics = {"perplexity": result.main}
    summarise(made.models, made.tasks)
    made.run = made.run.model_copy(update=changes)
    made.save(folder / "report.json")
    return made


def ranks(found: Index, table: int = 0) -> dict[str, int | None]:
    """Return each run's rank, and that of the baselines by their names."""
    standings, runs, _ = found.tables()[table]
    names = [run.directory.name for run in runs]
    names += [line.name for line in standings.lines[len(runs) :]]
    return {name: line.rank for name, line in zip(names, standings.lines, strict=True)}


def test_comparable_runs_share_a_table_and_close_ones_a_rank(tmp_path: Path) -> None:
    # A standard error is some 2.6 points here: two runs that are 3 apart are not distinguishable.
    for name, right in {"low": 60, "best": 85, "close": 82, "lower": 58}.items():
        run(tmp_path / name, right)
    run(tmp_path / "other", 99, precision="bf16-mixed")
    found = index(tmp_path)
    assert ranks(found) == {
        "best": 1, "close": 1, "low": 3, "lower": 3, "pretrained": None, "individual": None
    }  # fmt: skip
    assert ranks(found, 1)["other"] == 1
    (standings, _, facts), (_, _, other) = found.tables()
    assert standings.ranked_by == "normalized"
    assert (facts["precision"], other["precision"]) == ("32-true", "bf16-mixed")


def test_where_lower_is_better_the_lowest_is_first(tmp_path: Path) -> None:
    for name, value in {"high": 60, "best": 20, "mid": 40}.items():
        run(tmp_path / name, value, lower=True)
    found = index(tmp_path)
    assert found.tables()[0][0].ranked_by == "perplexity"
    assert [name for name, rank in ranks(found).items() if rank] == ["best", "mid", "high"]
    text = page(found, tmp_path / "index.html")
    assert "Ranked by average perplexity, the lowest first." in text
    assert re.search(r'class="num lower">average perplexity ↓</th>', text)


def test_normalised_values_of_other_experts_do_not_rank(tmp_path: Path) -> None:
    run(tmp_path / "one", 60)
    made = run(tmp_path / "two", 70)
    made.models["a"].identity = "1" * 64
    made.save(tmp_path / "two" / "report.json")
    (standings, _, _), *others = index(tmp_path).tables()
    assert standings.ranked_by == ACCURACY.name and not others


def test_the_newest_is_first_and_too_many_are_left_out(tmp_path: Path) -> None:
    for number in range(4):
        place = tmp_path / str(number)
        run(place, 50, created_at=f"2026-01-0{number + 1}T00:00:00+00:00")
        os.utime(place / "report.json", (number, number))
    found = index(tmp_path, most=3)
    assert [run.directory.name for run in found.runs] == ["3", "2", "1"]
    assert found.left_out == 1
    assert "1 older file is left out" in page(found, tmp_path / "index.html")


def test_results_of_every_kind_are_found(tmp_path: Path) -> None:
    """Those of schema 1 too: reports, a comparison, a search and a study."""
    for name in ("small", "search", "compare", "tall", "study"):
        (tmp_path / name).symlink_to(SCHEMA_1 / name)
    assert index(tmp_path).runs == []  # a link may lead anywhere
    found = index(SCHEMA_1)
    assert {run.directory.name for run in found.runs} >= {"small", "search", "tall"}
    assert {each.kind for each in found.collections} >= {"comparison", "scaling study"}
    assert found.unreadable == []
    (study,) = (each for each in found.collections if each.kind == "scaling study")
    assert study.outcome.startswith("best held-in: ")
    searched = next(run for run in found.runs if run.directory.name == "search")
    assert any("is the best of" in remark for remark in searched.remarks)
    board = Leaderboard(
        name="sweep-1", tables=[], failures=[Failure(name="x=1", directory="x=1", message="no")]
    )
    (tmp_path / "leaderboard.json").write_text(board.model_dump_json(), encoding="utf-8")
    (sweep,) = index(tmp_path).collections
    assert (sweep.kind, sweep.number, sweep.outcome) == ("sweep", 1, "1 failed")


def test_a_run_without_evaluation_is_listed(tmp_path: Path) -> None:
    made = report({"merged": model("merged")})
    made.tasks = {}
    made.save(tmp_path / "report.json")
    (only,) = index(tmp_path).runs
    assert only.best is None and only.remarks == ["nothing was evaluated"]
    assert index(tmp_path).tables() == []
    assert "nothing was evaluated" in page(index(tmp_path), tmp_path / "index.html")


def unreadable() -> dict[str, tuple[bytes, str]]:
    """Return files that are none, and what is said of them."""
    good = synthetic({"a": 3}, samples=20)[0].model_dump_json()
    content = json.loads(good)
    return {
        "cut": (good[:300].encode(), "Invalid JSON"),
        "empty": (b"", "Invalid JSON"),
        "list": (b"[]", "Input should be an object"),
        "binary": (bytes(range(256)), "Invalid JSON"),
        "deep": (b"[" * 100_000, "recursion limit"),
        "later": (json.dumps({**content, "schema_version": 9}).encode(), "schema_version"),
        "first": (b'{"schema_version": 1, "run": 3}', "not what schema 1 has there"),
        "surrogate": (good.replace('"cpu"', '"\\ud800"').encode(), "Invalid JSON"),
        "unknown": (json.dumps({**content, "<script>": 1}).encode(), "<script>: Extra inputs"),
        "dense": (b"[" + b"[]," * 4_000_000, "values, which is implausible"),
        "huge": (b" " * (17 * 2**20), "it has 17 MiB; no more than 16 MiB are read"),
    }


def test_what_cannot_be_read_is_listed_with_the_reason(tmp_path: Path) -> None:
    expected = unreadable()
    for name, (content, _) in expected.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(content)
    for name in ("pipe", "device", "nowhere"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    (tmp_path / "device" / "report.json").symlink_to("/dev/zero")
    (tmp_path / "nowhere" / "report.json").symlink_to(tmp_path / "gone")
    run(tmp_path / "good", 50)
    found = index(tmp_path)
    reasons = {each.path.parent.name: each.reason for each in found.unreadable}
    wanted = {name: reason for name, (_, reason) in expected.items()}
    wanted |= {"pipe": "regular file", "device": "regular file", "nowhere": "No such file"}
    assert reasons.keys() == wanted.keys()
    assert all(wanted[name] in reason for name, reason in reasons.items())
    assert all(str(tmp_path) not in reason for reason in reasons.values())
    assert [each.directory.name for each in found.runs] == ["good"]
    assert "14 files could not be read." in page(found, tmp_path / "index.html")


def test_hostile_content_takes_neither_time_nor_space(tmp_path: Path) -> None:
    """Thousands of models, and texts of megabytes."""
    made = run(tmp_path, 50)
    content = json.loads(made.model_dump_json())
    merged = content["models"]["merged"]
    for result in merged["tasks"].values():
        result["relation"] = None
    content["models"] |= {f"merged{number}": merged for number in range(2000)}
    content["run"] |= {"method": "m" * 10**6, "notes": ["n" * 10**6] * 3, "seed": 10**300}
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    found = index(tmp_path)
    assert len(found.runs) == 1
    assert len(page(found, tmp_path / "index.html")) < 100_000


def test_figures_that_are_no_numbers_are_shown(tmp_path: Path) -> None:
    made = run(tmp_path, 50, lower=True)
    for result in made.models["merged"].tasks.values():
        result.main.value, result.main.stderr, result.main.normalized = float("inf"), None, None
    made.save(tmp_path / "report.json")
    text = page(index(tmp_path), tmp_path / "index.html")
    assert 'data-value="Infinity">∞' in text and 'data-score="Infinity"' in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e308, -1e308, float("inf"), float("nan")])
def test_absurd_figures_spoil_nothing(tmp_path: Path, value: float) -> None:
    run(tmp_path / "good", 50, lower=True)
    for name in ("absurd", "other"):
        made = run(tmp_path / name, 50, lower=True)
        for result in made.models["merged"].tasks.values():
            result.main.value, result.main.stderr = value, value
        made.save(tmp_path / name / "report.json")
    found = index(tmp_path)
    assert len(found.runs) + len(found.unreadable) == 3
    assert ranks(found)["good"] in (1, 3)
    assert "<tr data-run=" in page(found, tmp_path / "index.html")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("javascript:alert(1)", "javascript%3Aalert%281%29/report.html"),
        ("a'\"><script>", "a%27%22%3E%3Cscript%3E/report.html"),
        ("x=1,y=2", "x%3D1%2Cy%3D2/report.html"),
    ],
)
def test_a_link_stays_in_the_folder(tmp_path: Path, name: str, address: str) -> None:
    run(tmp_path / name, 50)
    (tmp_path / name / "report.html").touch()
    assert f'href="{address}"' in page(index(tmp_path), tmp_path / "index.html")
    assert f'href="../{tmp_path.name}/{address}"' in page(
        index(tmp_path), tmp_path.parent / "elsewhere" / "index.html"
    )


def test_a_name_that_is_not_unicode_is_shown(tmp_path: Path) -> None:
    run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")), 50)
    save(index(tmp_path), tmp_path / "index.html")
    assert r"odd\udcff" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_only_a_page_of_its_own_is_replaced(tmp_path: Path) -> None:
    run(tmp_path / "one", 50)
    file = tmp_path / "index.html"
    file.write_text("my page", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"was not written by .* add --overwrite"):
        save(index(tmp_path), file)
    assert file.read_text(encoding="utf-8") == "my page"
    save(index(tmp_path), file, overwrite=True)
    run(tmp_path / "two", 50)
    save(index(tmp_path), file)
    assert file.read_text(encoding="utf-8").count("<tr data-run=") == 2
    with pytest.raises(ConfigError, match="is a folder"):
        save(index(tmp_path), tmp_path)
