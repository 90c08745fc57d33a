"""A search finds a method's options on the validation split, and evaluates the winner once."""

import logging
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from commandline import fusion_bench
from conftest import CLASSES
from fixtures_clip import write_dataset
from fixtures_report import result

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Candidate, Report, Search
from fusion_bench.report.figures import search_sentence
from fusion_bench.taskpool.images import task as base

Config = dict[str, Any]
FACTORS = [-1.0, 0.3, 1.5, 0.3]


def method(name: str, **options: Any) -> Config:
    return {"_target_": f"fusion_bench.method.{name}", **options}


def grid(**arguments: Any) -> Config:
    return {"_target_": "fusion_bench.programs.GridSearch", **arguments}


def datasets(root: Path, split: str) -> Config:
    return {
        task: {"_target_": "datasets.load_dataset", "path": str(root / task), "split": split}
        for task in CLASSES
    }


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a validation split of its own for each task; 31 samples."""
    root = tmp_path_factory.mktemp("validation")
    for seed, (task, names) in enumerate(CLASSES.items(), start=7):
        write_dataset(root / task, names, splits={"validation": 31, "train": 6}, seed=seed)
    return root


@pytest.fixture
def config(program_config: Config, validation: Path) -> Config:
    """Return a search for task arithmetic's scaling factor."""
    program_config["modelpool"] |= {
        "val_datasets": datasets(validation, "validation"),
        "train_datasets": datasets(validation, "train"),
    }
    return program_config | {
        "method": method("TaskArithmeticAlgorithm"),
        "similarity": False,
        "search": grid(space={"scaling_factor": FACTORS}),
    }


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


def evaluated_by_hand(config: Config, factor: float, datasets: Config) -> Report:
    """Run one setting as an ordinary run whose task pool has other datasets."""
    return run(
        config,
        method=config["method"] | {"scaling_factor": factor},
        taskpool=config["taskpool"] | {"test_datasets": datasets, "cache": False},
        search=None,
    )


def test_each_setting_has_the_figures_of_an_ordinary_run(config: Config) -> None:
    report = run(config)
    found = search(report)
    assert [c.options["scaling_factor"] for c in found.candidates] == FACTORS
    assert (found.split, found.metric, found.test_split) == (
        "validation",
        "normalized",
        False,
    )
    for candidate in found.candidates[:2]:
        alone = evaluated_by_hand(
            config, candidate.options["scaling_factor"], config["modelpool"]["val_datasets"]
        ).models
        merged = alone["merged"]
        assert {t: r.main.value for t, r in candidate.tasks.items()} == {
            t: r.main.value for t, r in merged.tasks.items()
        }
        assert merged.average is not None
        assert candidate.score == merged.average.normalized
        errors = [
            merged.tasks[task].main.stderr / alone[task].tasks[task].main.value for task in CLASSES
        ]
        assert candidate.score_stderr == pytest.approx(math.hypot(*errors) / 2)
    assert {t: used.num_samples for t, used in found.tasks.items()} == {"a": 31, "b": 31}

    scores = [candidate.score for candidate in found.candidates]
    assert len(set(scores)) > 2 and scores[1] == scores[3]  # one value stands there twice
    assert found.winner == scores.index(max(scores))
    best = found.best.options["scaling_factor"]
    assert found.method == config["method"] | {"scaling_factor": best}
    by_hand = evaluated_by_hand(config, best, config["taskpool"]["test_datasets"])
    assert report.models == by_hand.models and report.tasks == by_hand.tasks
    assert report.objective == max(scores) and by_hand.objective is None


def test_the_grid_is_the_full_product_and_the_first_of_equals_wins(config: Config) -> None:
    space = {"scaling_factor": [0.0, 1.0], "threshold": [20, 50, 100]}
    config["baselines"] = "none"
    report = run(config, method=method("TiesMergingAlgorithm"), search=grid(space=space))
    found = search(report)
    assert [tuple(c.options.values()) for c in found.candidates] == [
        (factor, threshold) for factor in (0.0, 1.0) for threshold in (20, 50, 100)
    ]
    first, second, third, *_ = (c.score for c in found.candidates)
    assert first == second == third  # the base, whatever the threshold
    scores = [candidate.score for candidate in found.candidates]
    assert found.winner == scores.index(max(scores))


def test_the_winner_alone_is_evaluated_on_the_test_split(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate = base.evaluate

    def counted(fabric: Any, classify: Any, images: Any, *more: Any) -> Any:
        seen.append((len(images.data), more[2]))
        return evaluate(fabric, classify, images, *more)

    monkeypatch.setattr(base, "evaluate", counted)
    run(config)
    tested = [what for size, what in seen if size == 23]
    assert sum(what.startswith("evaluating merged") for what in tested) == len(CLASSES)
    searched = [what for size, what in seen if size == 31]
    # Equal weights are evaluated once, and each individual model once.
    assert len(searched) == 2 * len(set(FACTORS)) + 2
    seen.clear()
    assert len(search(run(config, seed=5)).candidates) == len(FACTORS)
    assert seen == []  # all of it is known


def test_a_search_that_was_interrupted_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate, done = base.evaluate, []

    def interrupted(*args: Any) -> Any:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(1)
        return evaluate(*args)

    monkeypatch.setattr(base, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again: list[int] = []
    monkeypatch.setattr(base, "evaluate", lambda *args: again.append(1) or evaluate(*args))
    resumed = run(config, output_dir=tmp_path / "out")
    # Three different settings and two individual models, each on its split; then the test split.
    assert len(again) == (2 * 3 + 2) + (2 + 2 + 2) - 7
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "empty"))
    whole = run(config)
    assert search(resumed) == search(whole) and resumed.models == whole.models


def test_it_is_told_where_people_look(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report = run(config, output_dir=tmp_path / "out", merged_model_save_path=str(tmp_path / "m"))
    best = search(report).best
    sentence = (
        f"scaling_factor={best.options['scaling_factor']} is the best of 4 settings on the "
        f"validation split (normalised value {100 * best.score:.1f} ± "
        f"{100 * best.score_stderr:.1f}); only this setting was evaluated on the test split, once"
    )
    assert f"Search: {sentence}." in caplog.messages
    assert f"- search: {sentence}" in (tmp_path / "out" / "report.md").read_text().splitlines()
    page = (tmp_path / "out" / "report.html").read_text()
    assert sentence in page and page.count("<small>winner</small>") == 1
    assert Report.load(tmp_path / "out" / "report.json") == report
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["search"]["space"]
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"scaling_factor: {best.options['scaling_factor']}" in card  # what was run


def test_the_test_split_is_refused_and_owned_up_to(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    on_test = grid(space={"scaling_factor": [0.1, 0.2]}, split="test")
    fix = (
        "the models are evaluated on the same split. Choose another (search.split=train or "
        "validation), or set allow_test_split=true; the report will say so."
    )
    lines = [f"taskpool.test_datasets.{task}: {fix}" for task in ("a", "b")]
    assert refused(config, search=on_test) == "\n".join(lines)
    config["modelpool"]["val_datasets"]["b"] = config["taskpool"]["test_datasets"]["b"]
    assert refused(config) == f"modelpool.val_datasets.b: {fix}"
    for changes in ({"search": on_test}, {}):
        caplog.clear()
        report = run(config, allow_test_split=True, baselines="none", **changes)
        assert search(report).test_split
        (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert warning.endswith("the figures do not apply to new data.")


def test_a_method_may_learn_from_another_split(config: Config) -> None:
    learning = method("RegMeanAlgorithm", num_regmean_examples=4, split="train")
    ratios = {"reduce_non_diagonal_ratio": [0.0, 0.9]}
    config["baselines"] = "none"
    report = run(config, method=learning, search=grid(space=ratios))
    tuning, found = report.run.tuning, search(report)
    assert tuning is not None and tuning.split == "train" and not tuning.test_split
    by_hand = run(config, method=found.method, search=None)
    assert by_hand.models == report.models
    assert refused(
        config, method=learning | {"split": "validation"}, search=grid(space=ratios)
    ) == (
        "search.split: RegMeanAlgorithm learns from the validation split itself, so this "
        "split cannot evaluate the options. Choose another method.split or another search.split."
    )


def test_a_model_for_each_task_is_evaluated_on_its_own(config: Config) -> None:
    tall = method("TallMaskTaskArithmeticAlgorithm")
    report = run(config, method=tall, search=grid(space={"tall_mask_lambda": [0.1, 0.9]}))
    for candidate in search(report).candidates:
        assert list(candidate.tasks) == ["a", "b"]
        normal = [r.main.normalized or 0 for r in candidate.tasks.values()]
        assert candidate.score == pytest.approx(fmean(normal))


def test_without_individual_models_accuracy_is_the_metric(config: Config) -> None:
    found = search(run(config, baselines="none"))
    assert found.metric == "accuracy"
    for candidate in found.candidates:
        assert candidate.score == fmean(r.main.value for r in candidate.tasks.values())
    space = {"scaling_factor": [0.1]}
    config["modelpool"]["models"] = {
        {"a": "alpha"}.get(name, name): model
        for name, model in config["modelpool"]["models"].items()
    }
    normal = grid(space=space, metric="normalized_accuracy")
    assert refused(config, search=normal) == (
        "search.metric: there is no normalised value on 'a': its own model was not evaluated, or "
        "has a value of 0 there. Give search.metric=accuracy."
    )
    assert search(run(config)).metric == "accuracy"


def test_without_the_test_split_nothing_else_is_evaluated(config: Config, tmp_path: Path) -> None:
    alone = grid(space={}, judge_test=False)
    report = run(config, search=alone, output_dir=tmp_path / "out")
    assert report.tasks == {} and not any(m.tasks for m in report.models.values())
    (candidate,) = search(report).candidates
    assert candidate.options == {} and report.objective == candidate.score
    assert "the test split was not used" in (tmp_path / "out" / "report.md").read_text()
    same = run(config, search=grid(space={"scaling_factor": [0.3]}))
    assert search(same).best.score == candidate.score


def test_a_result_stands_until_the_validation_data_changes(config: Config, tmp_path: Path) -> None:
    config["baselines"] = "none"
    first = run(config, output_dir=tmp_path / "out")
    assert run(config, output_dir=tmp_path / "out") == first
    place = tmp_path / "other"
    write_dataset(place / "a", CLASSES["a"], splits={"validation": 5}, seed=1)
    moved = tmp_path / "a"
    config["modelpool"]["val_datasets"]["a"]["path"] = str(moved)
    moved.symlink_to(config["modelpool"]["train_datasets"]["a"]["path"])
    first = run(config, output_dir=tmp_path / "moved")
    moved.unlink()
    moved.symlink_to(place / "a")
    second = run(config, output_dir=tmp_path / "moved")
    assert first.run.config == second.run.config
    assert search(second).tasks["a"].num_samples == 5 and search(first).tasks["a"].num_samples == 31


def test_mistakes_give_one_clear_message_and_load_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "dataset" in refused(
        config, modelpool=config["modelpool"] | {"val_datasets": {"a": {"_target_": "x.y"}}}
    )

    def message(**arguments: Any) -> str:
        with pytest.raises(FusionBenchError) as caught:
            instantiate(config | {"search": grid(**arguments)}).run()
        return str(caught.value)

    assert message(space={"scaling_facto": [1]}) == (
        "search.space.scaling_facto: TaskArithmeticAlgorithm takes no such key. Did you mean "
        "'scaling_factor'? To remove it: '~search.space.scaling_facto'."
    )
    assert message(space={"scaling_factor": []}) == (
        "search.space.scaling_factor: the list is empty. Add a value, or remove the option: "
        "'~search.space.scaling_factor'."
    )
    assert message(space={"scaling_factor": 0.5}) == (
        "search.space.scaling_factor: '0.5' is not a list. Write it like '[0.1, 0.2]'."
    )
    assert message(space={"scaling_factor": [0.5, "much"]}) == (
        "search.space.scaling_factor[1]: 'much' is not a number."
    )
    assert message(space={"scaling_factor": [1]}, split="valid") == (
        "search.split: 'valid' is unknown. Did you mean 'validation'?"
    )
    assert message(space={"scaling_factor": [1]}, metric="acuracy") == (
        "search.metric: 'acuracy' is unknown. Did you mean 'accuracy'?"
    )
    assert message(space={}, trials=3).startswith("search.trials: GridSearch takes no such key.")
    assert message(space={}) == "search.space: is empty. Name an option of the method to try."
    assert (
        refused(config, taskpool=None) == "search: needs a task pool to evaluate the settings on."
    )
    assert refused(
        config, modelpool={k: v for k, v in config["modelpool"].items() if "val" not in k}
    ) == (
        "modelpool.val_datasets: missing; the search evaluates on the validation split. Name a "
        "dataset for each model there, or choose another search.split."
    )
    made = instantiate(config["method"])
    assert refused(config, method=made).startswith("search: needs the method as a config node")


def test_all_mistakes_in_the_space_are_told_at_once(config: Config) -> None:
    ties = method("TiesMergingAlgorithm", threshold=200)
    space = {
        "scaling_factor": ["x", 0.3, "y"],
        "threshold": [10, -1, 120],
        "scaling": [1],
        "remove_keys": [],
        "merge_func": "sum",
    }
    found = refused(config, method=ties, search=grid(space=space), dry_run=True)
    assert sorted(line.split(": ")[0] for line in found.splitlines()) == [
        *("search.space.merge_func", "search.space.remove_keys", "search.space.scaling"),
        *("search.space.scaling_factor[0]", "search.space.scaling_factor[2]"),
        *("search.space.threshold[1]", "search.space.threshold[2]"),
    ]
    found = refused(config, search=grid(space=space, split="x", metric="acuracy"), dry_run=True)
    assert [line.split(": ")[0] for line in found.splitlines()] == ["search.split", "search.metric"]


def test_what_all_settings_have_is_told_once(config: Config) -> None:
    ties = method("TiesMergingAlgorithm", threshold=200)
    found = refused(config, method=ties, search=grid(space={"scaling_factor": [0.1, 0.2, 0.3]}))
    assert found == "method.threshold: 200 is not a number from 0 to 100."


def test_several_models_a_task_have_no_one_figure(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_bench.method import TaskArithmeticAlgorithm

    original = TaskArithmeticAlgorithm.run
    monkeypatch.setattr(
        TaskArithmeticAlgorithm,
        "run",
        lambda self, pool: {name: original(self, pool) for name in ("low", "high")},
    )
    assert "returns several models for each task, merged/low, merged/high," in refused(config)


@pytest.mark.processes
def test_two_processes_find_the_same(config: Config) -> None:
    config["taskpool"] = config["taskpool"] | {"cache": False}
    config["search"] |= {"judge_test": False}
    alone = run(config)
    together = run(config, fabric={"accelerator": "cpu", "devices": 2})
    assert together.run.world_size == 2
    assert search(together).winner == search(alone).winner
    assert [c.score for c in search(together).candidates] == [
        c.score for c in search(alone).candidates
    ]


def test_the_command_line(config: Config, tmp_path: Path) -> None:
    """As a person does it: over the packaged config, with a method and a space of one's own."""
    (tmp_path / "conf").mkdir()
    defaults = [{"/method": "ties_merging"}, {"/fabric": "auto"}, "_self_"]
    (tmp_path / "conf" / "mine.yaml").write_text(
        yaml.safe_dump({k: v for k, v in config.items() if k != "method"} | {"defaults": defaults})
    )
    mine = ("--config-path", str(tmp_path / "conf"), "--config-name", "mine")
    more = ("search.space.threshold=[10, 20]", "search.space.scaling_factor=[0.5]")
    done = fusion_bench(*mine, *more, "report_save_path=r.json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = Report.load(tmp_path / "r.json")
    assert len(search(report).candidates) == 2
    assert search_sentence(search(report)).split(" (")[0] in " ".join(done.stdout.split())


def test_scores_in_words() -> None:
    found = result(30, 40)
    candidate = Candidate(options={}, score=0.75, score_stderr=0.07, tasks={"a": found})
    assert candidate.text() == "as given"
