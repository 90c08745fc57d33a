"""A scaling study merges subsets of experts, each of which is an ordinary run's merge."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from conftest import CLASSES
from fixtures_clip import write_dataset

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import FabricModelFusionProgram, ScalingStudy, scaling_study
from fusion_bench.programs.scaling_study import choices
from fusion_bench.report.scaling import Study

Config = dict[str, Any]


@pytest.fixture
def config(program_config: Config, tmp_path: Path) -> Config:
    """Return a study of three experts, with two methods."""
    modelpool, taskpool = program_config["modelpool"], program_config["taskpool"]
    write_dataset(tmp_path / "c", CLASSES["b"], splits={"test": 9}, seed=5)
    modelpool["models"]["c"] = modelpool["models"]["b"]
    taskpool["test_datasets"]["c"] = taskpool["test_datasets"]["b"] | {"path": str(tmp_path / "c")}
    sharp = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 1.5}
    return {
        "bases": {"tiny": {"modelpool": modelpool, "taskpool": taskpool}},
        "methods": ["simple_average", sharp],
        "counts": [2, 3],
        "fabric": {"accelerator": "cpu"},
    }


def run(config: Config, **changes: Any) -> Study:
    study = ScalingStudy(**config | changes).run()
    assert study is not None
    return study


def test_each_merge_is_that_of_an_ordinary_run(config: Config, tmp_path: Path) -> None:
    study = run(config, output_dir=tmp_path / "out")
    assert Study.load(tmp_path / "out" / "study.json") == study
    assert [(m.method, m.count, "".join(m.models)) for m in study.merges if m.count == 3] == [
        ("simple_average", 3, "abc"),
        ("TaskArithmeticAlgorithm", 3, "abc"),
    ]
    pairs = {"".join(m.models) for m in study.merges if m.count == 2}
    assert pairs == {"ab", "ac", "bc"} and len(study.merges) == 8
    merge = next(m for m in study.merges if m.models == ["a", "b"] and m.method != "simple_average")
    assert (merge.on("held_in"), merge.on("held_out")) == (["a", "b"], ["c"])

    tiny = config["bases"]["tiny"]
    models = {k: v for k, v in tiny["modelpool"]["models"].items() if k != "c"}
    report = FabricModelFusionProgram(
        config["methods"][1],
        tiny["modelpool"] | {"models": models},
        tiny["taskpool"] | {"cache": False},
        config["fabric"],
        similarity=False,
    ).run()
    assert report is not None
    accuracies = {task: result.main.value for task, result in merge.tasks.items()}
    assert accuracies == {t: r.main.value for t, r in report.models["merged"].tasks.items()}
    pretrained, experts = study.bases["tiny"].pretrained, study.bases["tiny"].experts
    for task, result in report.models["_pretrained_"].tasks.items():
        assert pretrained[task].main.value == result.main.value
    assert experts["b"].main.value == report.models["b"].tasks["b"].main.value
    assert list(experts) == ["a", "b", "c"]
    shares = [accuracies[task] / experts[task].main.value for task in "ab"]
    assert study.score(merge, "held_in") == pytest.approx(sum(shares) / 2)


def test_a_study_that_was_stopped_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config["methods"] = config["methods"][1:]
    fuse, done = scaling_study.fuse, []

    def interrupted(*args: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return fuse(*args)

    monkeypatch.setattr(scaling_study, "fuse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    again: list[int] = []
    monkeypatch.setattr(scaling_study, "fuse", lambda *args: again.append(1) or fuse(*args))
    resumed = run(config)
    assert len(again) == len(resumed.merges) - 3 == 1
    again.clear()
    assert run(config).merges == resumed.merges and again == []


def test_subsets_are_random_distinct_and_repeatable() -> None:
    assert sorted(choices(4, 2, 99, seed=0)) == list(combinations(range(4), 2))
    drawn = choices(12, 5, 10, seed=1)
    assert len(set(drawn)) == 10 and all(len(set(each)) == 5 for each in drawn)
    assert all(tuple(sorted(each)) == each and max(each) < 12 for each in drawn)
    assert choices(12, 5, 10, seed=1) == drawn != choices(12, 5, 10, seed=2)
    assert choices(3, 3, 5, seed=0) == [(0, 1, 2)]


def test_mistakes_give_one_clear_message(config: Config) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(FusionBenchError) as caught:
            ScalingStudy(**config | changes, dry_run=True).run()
        return str(caught.value)

    tiny = config["bases"]["tiny"]
    assert refused(counts=[2, 4]) == (
        "counts: 4 is not a number from 1 to 3, the experts of 'tiny'."
    )
    assert refused(counts=[]) == "counts: is empty. Name at least one."
    assert refused(subsets=0) == "subsets: 0 is not 1 or more."
    assert refused(held_in="experts") == "held_in: 'experts' is unknown. Did you mean 'expert'?"
    assert refused(bases={"x": {"modelpool": tiny["modelpool"]}}) == (
        "bases.x.taskpool: missing; give it as a config node."
    )
    assert refused(categories={"k": ["aa"]}).startswith("categories.k: 'tiny' has no task 'aa'.")
    assert refused(methods=["simple_average", "simple_avrage"]) == (
        "methods[1]: there is no method 'simple_avrage'. Did you mean 'simple_average'?"
    )
    assert refused(methods=["foo"]).startswith(
        "methods[0]: there is no method 'foo'. The nearest: "
    )
    assert refused(methods=[{"scaling": 1}]).endswith("neither a config's name nor a config node.")
    models = {k: v for k, v in tiny["modelpool"]["models"].items() if k != "_pretrained_"}
    pool = tiny["modelpool"] | {"models": models}
    assert refused(bases={"x": tiny | {"modelpool": pool}}, methods=["simple_average"]) == (
        "bases.x.modelpool.models: add '_pretrained_', the base."
    )
    pool = tiny["modelpool"] | {"models": tiny["modelpool"]["models"] | {"d": "nowhere"}}
    assert refused(bases={"x": tiny | {"modelpool": pool}}).startswith(
        "bases.x.modelpool.models.d: the task pool has no task with this name."
    )


def test_all_mistakes_are_told_at_once(config: Config) -> None:
    tiny = config["bases"]["tiny"]
    ties = {"_target_": "fusion_bench.method.TiesMergingAlgorithm", "threshold": 200}
    changes = {
        "bases": {"x": {"modelpool": tiny["modelpool"]}, "y": {"taskpool": tiny["taskpool"]}},
        "methods": ["foo", ties],
        "counts": ["two"],
        "subsets": 0,
        "held_in": "a",
        "held_out": "b",
        "sed": 1,
    }
    node = {"_target_": "fusion_bench.programs.ScalingStudy", "_recursive_": False}
    with pytest.raises(FusionBenchError) as caught:
        instantiate(node | config | changes | {"dry_run": True}).run()
    assert [problem.key for problem in caught.value.problems] == [
        *("sed", "counts", "held_in", "held_out", "subsets"),
        *("methods[0]", "methods[1].threshold", "bases.x.taskpool", "bases.y.modelpool"),
    ]


def test_a_dry_run_shows_the_plan(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert ScalingStudy(**config, dry_run=True).run() is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "SimpleAverageAlgorithm, TaskArithmeticAlgorithm of 2, 3 models, on cpu" in shown


def test_a_model_for_each_task_is_refused(config: Config) -> None:
    with pytest.raises(
        FusionBenchError, match=r"methods\[0\]: tall_mask/task_arithmetic returns several models"
    ):
        run(config, methods=["tall_mask/task_arithmetic"], counts=[2])


def test_the_command_line(config: Config, tmp_path: Path) -> None:
    target = {"_target_": "fusion_bench.programs.ScalingStudy", "_recursive_": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(target | config))
    done = fusion_bench(
        *("--config-path", str(tmp_path), "--config-name", "mine", "counts=[2,3]"),
        *("methods=[simple_average]", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    study = Study.load(tmp_path / "out" / "study.json")
    assert study.run.seed == 0 and len(study.merges) == 4 and study.points
    assert "held-out" in done.stdout and "held-in" in (tmp_path / "out" / "study.md").read_text()
    again = instantiate(study.run.config).run()  # the report holds all that it takes
    assert again.merges == study.merges
