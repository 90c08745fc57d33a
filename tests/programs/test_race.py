"""A race finds a method's options on growing parts of the validation split."""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import CLASSES
from fixtures_clip import write_dataset

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report, Search
from fusion_bench.report.racing import leaving, race_picture
from fusion_bench.taskpool.images import task as base

Config = dict[str, Any]
FACTORS = [-1.0, 0.3, 0.4, 1.5, 3.0]
ARITHMETIC = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a validation split for each task, of 40 and 24 samples."""
    root = tmp_path_factory.mktemp("validation")
    for seed, (size, (task, names)) in enumerate(zip((40, 24), CLASSES.items(), strict=True)):
        write_dataset(root / task, names, splits={"validation": size}, seed=seed)
    return root


@pytest.fixture
def config(program_config: Config, validation: Path) -> Config:
    """Return a race of task arithmetic's scaling factors."""
    program_config["modelpool"]["val_datasets"] = {
        task: {
            "_target_": "datasets.load_dataset",
            "path": str(validation / task),
            "split": "validation",
        }
        for task in CLASSES
    }
    return program_config | {
        "method": ARITHMETIC,
        "similarity": False,
        "search": race(space={"scaling_factor": FACTORS}, budget=0.5),
    }


def race(**arguments: Any) -> Config:
    return {"_target_": "fusion_bench.programs.RaceSearch", **arguments}


def run(config: Config, **changes: Any) -> Report:
    report = instantiate(config | changes).run()
    assert isinstance(report, Report)
    return report


def search(report: Report) -> Search:
    assert report.run.search is not None
    return report.run.search


def refused(config: Config, **changes: Any) -> str:
    with pytest.raises(FusionBenchError) as caught:
        instantiate(config | changes).run()
    return str(caught.value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list of what is evaluated: what messages call it, and on how many samples."""
    found: list[tuple[str, int]] = []
    plain = base.evaluate

    def counted(fabric: Any, classify: Any, images: Any, samples: Any, *more: Any) -> Any:
        found.append((more[1], len(samples)))
        return plain(fabric, classify, images, samples, *more)

    monkeypatch.setattr(base, "evaluate", counted)
    return found


def test_a_race_takes_its_budget_and_the_same_race_evaluates_nothing(
    config: Config, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    report = run(config, output_dir=tmp_path / "out")
    found = search(report)
    assert found.race is not None
    assert (found.race.whole, found.race.budget, found.race.alpha) == (5 * 64, 0.5, 0.05)
    taken = [candidate.num_samples or 0 for candidate in found.candidates]
    assert found.race.num_samples == sum(taken) <= 5 * 32
    assert taken[found.winner] == max(taken) > min(taken)
    assert found.best.left is None and found.best.led_by is None
    for candidate in found.candidates:
        assert candidate.num_samples == sum(r.num_samples for r in candidate.tasks.values())
        shares = [r.main.normalized or 0 for r in candidate.tasks.values()]
        assert candidate.score == pytest.approx(fmean(shares))
        if candidate is not found.best:
            assert candidate.led_by is not None and candidate.behind is not None
            assert candidate.behind >= 0 and leaving(found, candidate)
    # On the validation split no more than that, and the individual models.
    on_validation = [n for what, n in asked if what.startswith("evaluating")]
    whole = sum(r.num_samples for m in report.models.values() for r in m.tasks.values())
    assert sum(on_validation) == sum(taken) + 64 + whole
    asked.clear()
    assert search(run(config)) == found and asked == []


def test_scores_are_those_of_the_whole_split_on_the_same_samples(config: Config) -> None:
    """Without a limit the best one is that of the full search, whose scores a race takes."""
    space, untested = {"scaling_factor": FACTORS}, {"judge_test": False}
    grid = {"_target_": "fusion_bench.programs.GridSearch", "space": space}
    full = search(run(config, search=grid | untested))
    found = search(run(config, search=race(space=space, budget=None, **untested)))
    assert found.winner == full.winner and found.method == full.method
    for mine, theirs in zip(found.candidates, full.candidates, strict=True):
        if mine.num_samples == 64:
            assert (mine.score, mine.tasks) == (theirs.score, theirs.tasks)
        assert mine.left != "behind"


def test_after_a_full_search_a_race_evaluates_nothing(
    config: Config, asked: list[tuple[str, int]]
) -> None:
    grid = {**config["search"], "_target_": "fusion_bench.programs.GridSearch"}
    del grid["budget"]
    run(config, search=grid | {"judge_test": False})
    asked.clear()
    found = search(run(config, search=config["search"] | {"judge_test": False}))
    assert asked == [] and found.race is not None and found.race.num_samples > 0
    # And after a race no part stands for the whole.
    other = {"scaling_factor": [0.35, 0.45, 0.55]}
    run(config, search=race(space=other, budget=0.4, judge_test=False))
    asked.clear()
    run(config, search={"_target_": grid["_target_"], "space": other, "judge_test": False})
    assert sum(n for _, n in asked) == 3 * 64


def test_another_seed_takes_other_samples(config: Config) -> None:
    found = [
        search(
            run(
                config,
                search=config["search"] | {"seed": seed, "judge_test": False},
                baselines="none",
            )
        )
        for seed in (0, 1)
    ]
    assert found[0].candidates != found[1].candidates


def test_it_is_told_where_people_look(config: Config, tmp_path: Path) -> None:
    report = run(config, output_dir=tmp_path / "out")
    found = search(report)
    assert found.race is not None
    text = (tmp_path / "out" / "report.md").read_text()
    best = found.best.options["scaling_factor"]
    assert (
        f"search: scaling_factor={best} won the race of 5 settings on the validation split" in text
    )
    assert f"{found.race.num_samples} samples in all" in text
    assert "| samples | end |" in text and "behind the best when samples were short |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How far each setting came" in page and '<th scope="col">end</th>' in page
    picture = race_picture(found)
    assert "winner" in picture and "samples taken" in picture
    assert Report.load(tmp_path / "out" / "report.json") == report
    winner = yaml.safe_load((tmp_path / "out" / "winner.yaml").read_text())
    assert winner["method"] == ARITHMETIC | {"scaling_factor": best} and winner["search"] is None
    assert run(winner).models == report.models


def test_a_plan_says_the_most_samples(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    instantiate(config | {"dry_run": True}).run()
    assert "with 5 settings on at most 50 % of the samples" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_metric_of_all_tasks_needs_no_individual_models(config: Config) -> None:
    found = search(run(config, baselines="none"))
    assert found.metric == "accuracy"
    for candidate in found.candidates:
        assert candidate.score == pytest.approx(
            fmean(r.main.value for r in candidate.tasks.values())
        )


def test_a_model_for_each_task_races_on_its_own(config: Config) -> None:
    tall = {"_target_": "fusion_bench.method.TallMaskTaskArithmeticAlgorithm"}
    own = race(space={"tall_mask_lambda": [0.1, 0.9]}, budget=None, judge_test=False)
    found = search(run(config, method=tall, search=own))
    assert all(list(candidate.tasks) == ["a", "b"] for candidate in found.candidates)


def test_processes_agree(config: Config) -> None:
    config["search"] |= {"judge_test": False}
    alone = search(run(config))
    fabric = {"accelerator": "cpu", "devices": 2}
    cold = config["taskpool"] | {"cache": False}
    both = search(run(config, fabric=fabric, taskpool=cold))
    assert both.winner == alone.winner
    assert [c.num_samples for c in both.candidates] == [c.num_samples for c in alone.candidates]
    np.testing.assert_allclose(
        [c.score for c in both.candidates], [c.score for c in alone.candidates]
    )


def test_mistakes_give_one_clear_message(config: Config) -> None:
    def message(**arguments: Any) -> str:
        return refused(config, search=race(space={"scaling_factor": FACTORS}) | arguments)

    assert message(budget=2) == "search.budget: 2 is not a number from 1e-06 to 1."
    assert message(alpha=0).startswith("search.alpha: 0 is not a number from 1e-06 to")
    assert message(seed=-1).startswith("search.seed: -1 is not a number from 0 to")
    assert message(split="valid") == "search.split: 'valid' is unknown. Did you mean 'validation'?"
    assert message(space={"scaling": [1]}).startswith("search.space.scaling: ")
    assert message(budget=0.01) == (
        "search.budget: 3 samples are too few for a race of 5 settings. Give at least "
        "search.budget=0.1."
    )
    loss = config["taskpool"] | {"metrics": ["loss", "accuracy"]}
    assert refused(config, taskpool=loss) == (
        "search: 'loss' on 'a' is not a mean over samples of values from 0 to 100 %, which a race "
        "needs. Use fusion_bench.programs.GridSearch."
    )
