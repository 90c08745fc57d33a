"""The jobs of a sweep are the settings of a search; the best of them is evaluated once."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from conftest import CLASSES

from fusion_bench.configs import CONFIG_DIR
from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import SearchWinner
from fusion_bench.report import Report
from fusion_bench.report.figures import search_sentence

Config = dict[str, Any]
FACTORS = (-1.0, 0.3, 1.5)


@pytest.fixture
def config(program_config: Config, family: Path) -> Config:
    """Return what a job of a sweep runs: one setting, evaluated on the validation split alone."""
    program_config["modelpool"]["val_datasets"] = {
        task: {
            "_target_": "datasets.load_dataset",
            "path": str(family / "datasets" / task),
            "split": "train",
        }
        for task in CLASSES
    }
    return program_config | {
        "method": {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"},
        "similarity": False,
        "search": {
            "_target_": "fusion_bench.programs.GridSearch",
            "space": {},
            "judge_test": False,
        },
    }


def sweep(config: Config, place: Path, factors: tuple[float, ...] = FACTORS) -> dict[float, float]:
    """Run the jobs; return each factor's score."""
    scores = {}
    for job, factor in enumerate(factors):
        method = config["method"] | {"scaling_factor": factor}
        report = instantiate(config | {"method": method, "output_dir": place / str(job)}).run()
        assert report.tasks == {} and report.objective is not None
        scores[factor] = report.objective
    return scores


def test_the_best_job_is_evaluated_on_the_test_split(config: Config, tmp_path: Path) -> None:
    scores = sweep(config, tmp_path / "sweep")
    best = max(scores, key=lambda factor: scores[factor])
    report = SearchWinner(str(tmp_path / "sweep"), output_dir=tmp_path / "winner").run()
    assert report is not None and report.run.search is not None
    found = report.run.search
    assert found.space == {"scaling_factor": list(FACTORS)} and found.judge_test
    assert {c.options["scaling_factor"]: c.score for c in found.candidates} == scores
    assert found.best.options == {"scaling_factor": best}
    assert "is the best of 3 settings on the validation split" in search_sentence(found)
    alone = config | {"method": config["method"] | {"scaling_factor": best}, "search": None}
    assert report.models == instantiate(alone).run().models
    assert Report.load(tmp_path / "winner" / "report.json") == report
    dry = SearchWinner(str(tmp_path / "sweep"), output_dir=tmp_path / "dry", dry_run=True)
    assert dry.run() is None and not (tmp_path / "dry").exists()


def test_what_is_no_such_sweep_is_refused(config: Config, family: Path, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    for dry_run in (False, True):
        with pytest.raises(
            FusionBenchError, match=r"sweep: there is no job with search\.judge_test=fal"
        ):
            SearchWinner(str(place), dry_run=dry_run).run()
    sweep(config, place, FACTORS[:1])
    other = config | {"baselines": "none", "output_dir": place / "other"}
    instantiate(other).run()
    with pytest.raises(FusionBenchError, match=r"differ in 'baselines', not only in the method"):
        SearchWinner(str(place)).run()


def test_changed_data_is_noticed(config: Config, family: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a"
    moved.symlink_to(family / "datasets" / "a")
    config["modelpool"]["val_datasets"]["a"]["path"] = str(moved)
    instantiate(config | {"output_dir": tmp_path / "sweep" / "0"}).run()
    moved.unlink()
    moved.mkdir()
    for file in (family / "datasets" / "a").rglob("train*"):
        (moved / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FusionBenchError, match="were evaluated on different data"):
        SearchWinner(str(tmp_path / "sweep")).run()


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs fusion_bench[optuna]"
)
def test_optuna_from_the_command_line(config: Config, tmp_path: Path) -> None:
    parts = {key: config[key] for key in ("modelpool", "taskpool", "fabric")}
    defaults = [{"/method": "task_arithmetic"}, {"override /hydra/sweeper": "optuna"}, "_self_"]
    packaged = yaml.safe_load((CONFIG_DIR / "search_optuna.yaml").read_text())
    mine = packaged | parts | {"defaults": defaults}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    done = fusion_bench(
        *("-m", "--config-path", str(tmp_path), "--config-name", "mine"),
        *("method.scaling_factor=interval(0.1,1.0)", "hydra.sweeper.n_trials=2"),
        *("hydra.sweeper.sampler.seed=1", "hydra.sweep.dir=sweep"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "sweep" / "winner" / "report.json")
    assert report.run.search is not None and len(report.run.search.candidates) == 2
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert report.objective == best["best_value"]
    assert report.models["merged"].tasks.keys() == CLASSES.keys()
