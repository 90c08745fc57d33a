"""Evolution proposes options of a method, and a race compares them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLASSES
from fixtures_clip import write_dataset

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.programs import evolution
from fusion_bench.report import Report, Search

pytest.importorskip("optuna")

Config = dict[str, Any]
SPACE: Config = {
    "scaling_factor": {"low": 0.1, "high": 1},
    "where": [{"match": "*mlp*", "scaling_factor": {"low": 0.01, "high": 1, "log": True}}],
    "weights": {"a": {"low": 0, "high": 2}, "b": 1.0},
    "normalize": [False, True],
}
NAMES = ["scaling_factor", "where[0].scaling_factor", "weights.a", "normalize"]


def evolve(space: Config = SPACE, **arguments: Any) -> Config:
    own = {"trials": 8, "budget": 0.5, **arguments}
    return {"_target_": "fusion_bench.programs.EvolutionSearch", "space": space, **own}


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    for seed, (task, names) in enumerate(CLASSES.items()):
        write_dataset(root / task, names, splits={"validation": 40}, seed=seed)
    return root


@pytest.fixture
def config(program_config: Config, validation: Path) -> Config:
    """Return an evolution of task arithmetic's options."""
    program_config["modelpool"]["val_datasets"] = {
        task: {
            "_target_": "datasets.load_dataset",
            "path": str(validation / task),
            "split": "validation",
        }
        for task in CLASSES
    }
    return program_config | {
        "method": {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"},
        "similarity": False,
        "search": evolve(),
    }


def search(config: Config, **changes: Any) -> Search:
    report = instantiate(config | changes).run()
    assert isinstance(report, Report) and report.run.search is not None
    return report.run.search


def refused(config: Config, **changes: Any) -> str:
    with pytest.raises(FusionBenchError) as caught:
        instantiate(config | {"dry_run": True} | changes).run()
    return str(caught.value)


def test_trials_race_and_the_winner_runs_again(config: Config, tmp_path: Path) -> None:
    found = search(config, output_dir=tmp_path / "out")
    assert len(found.candidates) == 8 and found.race is not None
    assert found.race.num_samples <= found.race.whole / 2 == 8 * 80 / 2
    assert list(found.space) == NAMES
    assert found.space["where[0].scaling_factor"] == [0.01, 1.0]
    assert found.space["normalize"] == [False, True]
    drawn = [candidate.options for candidate in found.candidates]
    assert len({tuple(own.values()) for own in drawn}) > 4
    for own in drawn:
        assert list(own) == NAMES
        assert 0.1 <= own["scaling_factor"] <= 1 and 0.01 <= own["where[0].scaling_factor"] <= 1
        assert 0 <= own["weights.a"] <= 2 and own["normalize"] in (False, True)
        assert float(f"{own['weights.a']:.4g}") == own["weights.a"]
    best = found.best.options
    assert found.method == config["method"] | {
        "scaling_factor": best["scaling_factor"],
        "where": [{"match": "*mlp*", "scaling_factor": best["where[0].scaling_factor"]}],
        "weights": {"a": best["weights.a"], "b": 1.0},
        "normalize": best["normalize"],
    }
    taken = [candidate.num_samples or 0 for candidate in found.candidates]
    assert min(taken) == 8 * 80 // 2 // 2 // 8 and taken[found.winner] == max(taken)
    again = instantiate(yaml.safe_load((tmp_path / "out" / "winner.yaml").read_text())).run()
    assert again.models == Report.load(tmp_path / "out" / "report.json").models


@pytest.mark.parametrize("sampler", ["cmaes", "tpe"])
def test_the_seed_makes_the_trials(config: Config, sampler: str) -> None:
    config["baselines"] = "none"
    few = {"sampler": sampler, "trials": 4, "judge_test": False}
    first, second, other = (search(config, search=evolve(seed=seed, **few)) for seed in (1, 1, 2))
    assert first == second
    assert [c.options for c in first.candidates] != [c.options for c in other.candidates]


def test_the_sampler_learns_from_the_scores(config: Config) -> None:
    """TPE tries more of what is good: at a scaling factor of 0 models are the base."""
    space = {"scaling_factor": [0.3, -4.0]}
    config |= {"search": evolve(space, sampler="tpe", trials=24, judge_test=False)}
    tried = search(config, baselines="none").candidates
    drawn = [candidate.options["scaling_factor"] for candidate in tried[10:]]
    assert drawn.count(0.3) > drawn.count(-4.0)


def test_a_plan_names_what_is_searched(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    instantiate(config | {"dry_run": True}).run()
    assert "with 8 trials of 4 options on at most 50 % of the samples" in " ".join(
        capsys.readouterr().out.split()
    )


def test_mistakes_are_told_by_a_dry_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(space: Config = SPACE, **arguments: Any) -> str:
        return refused(config, search=evolve(space, **arguments))

    low = {"low": 0, "high": 1}
    assert message({"scaling_facto": low, "normalize": [True]}, sampler="tpe") == (
        "search.space.scaling_facto: TaskArithmeticAlgorithm takes no such key. Did you mean "
        "'scaling_factor'?"
    )
    assert message({"scaling_factor": low}) == (
        "search.sampler: CMA-ES needs two ranges or more. Give search.sampler=tpe."
    )
    assert message({"scaling_factor": 1}) == (
        "search.space: has nothing to choose. Write a range like '{low: 0, high: 1}', or values "
        "like '[10, 20]'."
    )
    wrong = {"where": [{"scaling_factor": {"low": 1, "high": 1}}]}
    assert message(wrong) == "search.space.where[0].scaling_factor: 1 is not below 1."
    assert message({"t": {"low": "a", "high": 1}}) == (
        "search.space.t: low and high are not both numbers."
    )
    assert message({"t": {**low, "log": True}}).startswith("search.space.t: log is true or false")
    assert message({"weights": {"a": low, "z": low}}).startswith("search.space.weights")
    assert message({"normalize": [True, "maybe"]}, sampler="tpe").startswith(
        "search.space.normalize: "
    )
    assert message(trials=1) == "search.trials: 1 is not a number from 2 to 10000."
    assert message(sampler="cma").startswith("search.sampler: 'cma' is unknown. Did you mean")
    monkeypatch.setattr(evolution, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'fusion_bench\[optuna\]'"):
        instantiate(config).run()
