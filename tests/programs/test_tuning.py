"""Programs whose method learns from data, or makes more than one plain model."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES
from fixtures_scores import loss_sum, num_right
from lightning.fabric import Fabric
from transformers import (
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from fusion_bench.instantiate import instantiate
from fusion_bench.method.ensemble import load_ensemble
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report, comparison
from fusion_bench.taskpool import CLIPVisionModelTaskPool

Config = dict[str, Any]


def method(name: str, **options: Any) -> Config:
    return {"_target_": f"fusion_bench.method.{name}", **options}


ADAMERGING = method("AdaMergingAlgorithm", max_steps=3, batch_size=2)
LEARNING = {
    "adamerging": ADAMERGING,
    "adamerging++": ADAMERGING | {"plusplus": True, "granularity": "task"},
    "greedy soup": method("GreedySoupAlgorithm", split="train"),
    "learned soup": method("LearnedSoupAlgorithm", split="train", max_steps=3, batch_size=2),
    "fisher": method("FisherMergingAlgorithm", num_fisher_examples=2),
    "regmean": method("RegMeanAlgorithm", num_regmean_examples=2),
    "regmean++": method("RegMeanAlgorithmPlusPlus", num_regmean_examples=2),
}
LABELLED = {"greedy soup", "learned soup"}
TEST_TIME = "adapted to the unlabelled data of the test split (test-time adaptation)"


def dataset(family: Path, task: str, split: str) -> Config:
    path = str(family / "datasets" / task)
    return {"_target_": "datasets.load_dataset", "path": path, "split": split}


@pytest.fixture
def config(program_config: Config, family: Path) -> Config:
    """Return a config of AdaMerging with the training data of all tasks; it evaluates no other."""
    train = {task: dataset(family, task, "train") for task in CLASSES}
    program_config["modelpool"]["train_datasets"] = train
    return program_config | {"method": ADAMERGING, "baselines": "none"}


def run(config: Config, **changes: Any) -> Report:
    report = instantiate(config | changes).run()
    assert isinstance(report, Report)
    return report


def refused(config: Config, **changes: Any) -> str:
    """Return the message with which a config is refused."""
    with pytest.raises(FusionBenchError) as caught:
        run(config, **changes)
    return str(caught.value)


def figures(report: Report, *names: str) -> dict[str, Any]:
    """Return accuracy and loss by model and task."""
    return {
        f"{name} on {task}": (
            result.main.value,
            pytest.approx(result.metrics["loss"].value, rel=1e-4),
        )
        for name, model in report.models.items()
        for task, result in model.tasks.items()
        if not names or name in names
    }


@pytest.mark.parametrize("name", LEARNING)
def test_a_method_learns_from_the_training_data(name: str, config: Config, tmp_path: Path) -> None:
    report = run(
        config,
        method=LEARNING[name],
        output_dir=tmp_path / "out",
        merged_model_save_path=str(tmp_path / "merged"),
    )
    tuning = report.run.tuning
    assert tuning is not None
    assert (tuning.split, tuning.labels) == ("train", name in LABELLED) and not tuning.test_split
    assert {task: used.num_samples for task, used in tuning.tasks.items()} == {"a": 4, "b": 4}
    evaluated = {info.identity["dataset"] for info in report.tasks.values()}
    assert not evaluated & {used.fingerprint for used in tuning.tasks.values()}
    labels = "with their labels" if name in LABELLED else "without labels"
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert f"- tuned on the train split, {labels}" in lines
    assert Report.load(tmp_path / "out" / "report.json") == report
    assert [name for name, model in report.models.items() if model.tasks] == ["merged"]

    saved = {"_target_": config["modelpool"]["_target_"], "models": {"m": str(tmp_path / "merged")}}
    plain = method("SimpleAverageAlgorithm")
    again = run(config, modelpool=saved, method=plain)
    assert again.models["merged"].identity == report.models["merged"].identity
    assert figures(again, "merged") == figures(report, "merged")
    assert again.run.tuning is None


def test_what_is_learned_depends_on_the_data_alone(config: Config, family: Path) -> None:
    learned = run(config).models["merged"].identity
    assert run(config).models["merged"].identity == learned
    fewer = {task: dataset(family, task, "train[:1]") for task in CLASSES}
    config["modelpool"]["train_datasets"] = fewer
    assert run(config).models["merged"].identity != learned


def test_without_a_step_adamerging_is_task_arithmetic(config: Config) -> None:
    found = run(config, method=ADAMERGING | {"max_steps": 0})
    plain = run(config, method=method("TaskArithmeticAlgorithm", scaling_factor=0.3))
    assert figures(found) == figures(plain)
    assert found.run.tuning is not None and plain.run.tuning is None


def test_adamerging_makes_the_answers_surer(config: Config) -> None:
    """Evaluated with what it learned from, by the loss of the answers themselves."""
    pool, tasks = instantiate(_lazy(config["modelpool"])), instantiate(_lazy(config["taskpool"]))
    fabric = Fabric(accelerator="cpu", devices=1)
    data = tasks.tuning(pool.train_datasets, fabric, ("modelpool", "train_datasets"))
    found = []
    for steps in (0, 10):
        options = {"max_steps": steps, "batch_size": 4, "lr": 3e-2}
        weights = instantiate(ADAMERGING | options).run(pool, fabric, data)
        model = pool.build_model(weights)
        total = 0.0
        for task in data.values():
            images, labels = next(task.batches(task.sample(None), 4))
            assert len(task) == len(labels) == 4
            with torch.no_grad():
                logits = task.classify(model)(images)
            total += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        found.append(total)
    assert found[1] < 0.9 * found[0]


def _lazy(section: Config) -> Config:
    return {"_recursive_": False, **section}


def test_a_greedy_soup_takes_the_best_model_first(config: Config) -> None:
    config["modelpool"]["models"]["base"] = config["modelpool"]["models"]["_pretrained_"]
    train = config["taskpool"] | {"test_datasets": config["modelpool"]["train_datasets"]}
    soup = method("GreedySoupAlgorithm", split="train")
    report = run(config, method=soup, taskpool=train, baselines="all_tasks", allow_test_split=True)
    scores = {
        name: sum(result.main.value for result in model.tasks.values())
        for name, model in report.models.items()
    }
    assert scores["merged"] >= max(scores.values())


def test_the_validation_split_has_datasets_of_its_own(config: Config, family: Path) -> None:
    validation = {task: dataset(family, task, "train[:2]") for task in CLASSES}
    config["modelpool"]["val_datasets"] = validation
    report = run(config, method=ADAMERGING | {"split": "validation"})
    assert report.run.tuning is not None and report.run.tuning.split == "validation"
    assert [used.num_samples for used in report.run.tuning.tasks.values()] == [2, 2]


@pytest.mark.parametrize("split", ["test", "test[:10]", "test[50%:]", "train+test"])
def test_the_test_split_is_refused_by_its_name(
    split: str, config: Config, family: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config["modelpool"]["train_datasets"]["b"] = dataset(family, "b", split)
    message = refused(config)
    assert message == (
        "modelpool.train_datasets.b: the models are evaluated on the same split. Choose another "
        "(method.split=train or validation), or set allow_test_split=true; the report will say so."
    )
    report = run(config, allow_test_split=True)
    assert report.run.tuning is not None and report.run.tuning.test_split
    assert report.run.config["allow_test_split"] is True
    assert f"The merged model was {TEST_TIME}." in caplog.messages


def test_the_evaluated_images_are_refused_under_any_name(config: Config) -> None:
    evaluated = config["modelpool"]["train_datasets"]
    taskpool = config["taskpool"] | {"test_datasets": evaluated}
    message = refused(config, taskpool=taskpool)
    assert message.startswith(
        "modelpool.train_datasets.a: the models are evaluated on the same spl"
    )
    report = run(config, taskpool=taskpool, allow_test_split=True)
    assert report.run.tuning is not None and report.run.tuning.test_split


def test_the_report_owns_up_to_the_test_split(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapting = ADAMERGING | {"split": "test"}
    assert refused(config, method=adapting).startswith("taskpool.test_datasets.a: the models are")
    for name, learning, sentence in (
        ("adapted", adapting, TEST_TIME),
        (
            "tuned",
            LEARNING["learned soup"] | {"split": "test"},
            "tuned on the test split with its labels: the figures do not apply to new data",
        ),
    ):
        caplog.clear()
        out = tmp_path / name
        report = run(config, method=learning, allow_test_split=True, output_dir=out)
        assert f"- {sentence}" in (out / "report.md").read_text().splitlines()
        warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert warnings == [f"The merged model was {sentence}."]
        tuning = Report.load(out / "report.json").run.tuning
        assert tuning is not None and tuning == report.run.tuning
        assert tuning.test_split and tuning.split == "test" and tuning.labels == (name == "tuned")
        for task, used in tuning.tasks.items():
            assert (used.num_samples, used.fingerprint) == (
                23,
                report.tasks[task].identity["dataset"],
            )


def test_names_match_whatever_the_spelling(config: Config) -> None:
    expected = run(config).models["merged"].identity
    models, train = config["modelpool"]["models"], config["modelpool"]["train_datasets"]
    evaluated = config["taskpool"]["test_datasets"]
    models["My_Task"], train["my-task"], evaluated["MY_TASK"] = (
        section.pop("a") for section in (models, train, evaluated)
    )
    for section in (models, train, evaluated):
        section["b"] = section.pop("b")
    assert run(config).models["merged"].identity == expected


def test_mistakes_give_one_clear_message(config: Config, family: Path) -> None:
    assert refused(config, taskpool=None) == (
        "taskpool: AdaMergingAlgorithm learns from data. Set the task pool that provides its "
        "classifiers."
    )
    train = config["modelpool"]["train_datasets"]

    def with_data(datasets: Any) -> Config:
        return config | {"modelpool": config["modelpool"] | {"train_datasets": datasets}}

    nothing: list[Any] = [None, {}]
    for missing in nothing:
        assert refused(with_data(missing)) == (
            "modelpool.train_datasets: missing; AdaMergingAlgorithm learns from the train split. "
            "Name a dataset for each model there, or choose another method.split."
        )
    assert refused(config, method=LEARNING["greedy soup"] | {"split": "validation"}) == (
        "modelpool.val_datasets: missing; GreedySoupAlgorithm learns from the validation split. "
        "Name a dataset for each model there, or choose another method.split."
    )
    assert refused(with_data({"a": train["a"]})) == (
        "modelpool.train_datasets: There is no data for the model 'b'. Add a dataset with this "
        "name; there are datasets for: a."
    )
    assert refused(with_data(train | {"c": train["a"]})) == (
        "modelpool.train_datasets.c: the task pool has no such task. Known: a, b."
    )
    assert refused(with_data(train | {"b": train["a"]})) == (
        "modelpool.train_datasets.b: its classes are not those of 'b'. It alone has 'abbey', "
        "'airplane cabin', 'beach'. It lacks 'cat', 'dog', 'emu' … (5)."
    )
    whole = {k: v for k, v in train["b"].items() if k != "split"}
    assert refused(with_data(train | {"b": whole})) == (
        "modelpool.train_datasets.b: names no split. Add 'split: …', one of: train, test."
    )
    nowhere = train["b"] | {"path": str(family / "nowhere")}
    assert str(family / "nowhere") in refused(with_data(train | {"b": nowhere}))
    with pytest.raises(FusionBenchError, match=r"method\.split: 'trian' is unknown\. Did you mean"):
        run(config, method=ADAMERGING | {"split": "trian"})


def test_a_method_without_data_needs_none(config: Config) -> None:
    config["modelpool"]["train_datasets"] = {
        "nobody": {"_target_": "datasets.load_dataset", "path": "never/looked-at"}
    }
    assert run(config, method=method("SimpleAverageAlgorithm")).run.tuning is None


@pytest.mark.processes
@pytest.mark.parametrize("name", ["adamerging", "learned soup", "greedy soup"])
def test_two_processes_learn_the_same(name: str, config: Config) -> None:
    config["taskpool"] = config["taskpool"] | {"cache": False}
    alone = run(config, method=LEARNING[name])
    together = run(config, method=LEARNING[name], fabric={"accelerator": "cpu", "devices": 2})
    assert together.run.world_size == 2
    assert figures(together) == figures(alone)
    assert together.run.tuning == alone.run.tuning


FAMILIES = {
    "TALL masks": method("TallMaskTaskArithmeticAlgorithm"),
    "EMR": method("EMRMerging"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_model_for_each_task(
    name: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "family"
    report = run(
        config,
        method=FAMILIES[name],
        baselines="own_task",
        merged_model_save_path=str(place),
        output_dir=tmp_path / "out",
    )
    assert list(report.models) == ["_pretrained_", "a", "b", "merged/a", "merged/b"]
    for task in CLASSES:
        model = report.models[f"merged/{task}"]
        assert model.role == "merged" and list(model.tasks) == [task]
        own = report.models[task].tasks[task].main.value
        found = model.tasks[task]
        assert found.main.normalized == (pytest.approx(found.main.value / own) if own else None)
    assert [row.name for row in comparison(report)] == ["pretrained", "individual", "merged"]
    shown = [capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()]
    for text in shown:
        rows = re.findall(r"^[\s|]*merged[\s|]+\d", text, re.MULTILINE)
        assert len(rows) == 1 and "merged/" not in text

    assert sorted(file.name for file in place.iterdir()) == ["a", "b"]
    for task in CLASSES:
        saved = CLIPVisionModelPool({"m": str(place / task)}).weights("m")
        merged = report.models[f"merged/{task}"]
        evaluated = run(
            config,
            modelpool={
                "_target_": config["modelpool"]["_target_"],
                "models": {"m": str(place / task)},
            },
            method=method("SimpleAverageAlgorithm"),
            baselines="none",
        ).models["merged"]
        assert len(saved) and evaluated.identity == merged.identity
        assert evaluated.tasks[task].metrics["loss"].value == pytest.approx(
            merged.tasks[task].metrics["loss"].value
        )


def test_a_family_may_be_evaluated_on_all_tasks(config: Config) -> None:
    report = run(config, method=FAMILIES["EMR"], baselines="all_tasks")
    for model in report.models.values():
        assert list(model.tasks) == ["a", "b"]
    names = [row.name for row in comparison(report)]
    assert names == ["pretrained", "a", "b", "merged/a", "merged/b"]
    alone = run(config, method=FAMILIES["EMR"], baselines="none")
    assert [n for n, m in alone.models.items() if m.tasks] == ["merged/a", "merged/b"]
    for task in CLASSES:
        assert list(alone.models[f"merged/{task}"].tasks) == [task]
        found, expected = (
            r.models[f"merged/{task}"].tasks[task].metrics["loss"].value for r in (alone, report)
        )
        assert found == expected


def test_a_family_with_odd_names(config: Config, tmp_path: Path) -> None:
    models = config["modelpool"]["models"]
    models["Other/../one"] = models.pop("b")
    place = tmp_path / "family"
    report = run(config, method=FAMILIES["EMR"], merged_model_save_path=str(place), taskpool=None)
    assert "merged/Other/../one" in report.models
    assert sorted(file.name for file in place.iterdir()) == ["Other%2F..%2Fone", "a"]
    # one that bears no task's name is evaluated on all
    report = run(config, method=FAMILIES["EMR"])
    assert list(report.models["merged/Other/../one"].tasks) == ["a", "b"]
    assert list(report.models["merged/a"].tasks) == ["a"]


def test_a_task_without_a_model_is_not_evaluated_by_a_family(config: Config) -> None:
    del config["modelpool"]["models"]["b"]
    report = run(config, method=FAMILIES["EMR"], baselines="none")
    assert [n for n, m in report.models.items() if m.tasks] == ["merged/a"]
    assert list(report.tasks) == ["a"]


def test_a_family_takes_the_place_of_what_was_there(config: Config, tmp_path: Path) -> None:
    place = tmp_path / "models"
    save = {"merged_model_save_path": str(place), "taskpool": None, "overwrite": True}
    run(config, method=method("SimpleAverageAlgorithm"), **save)
    assert (place / "model.safetensors").exists()
    run(config, method=FAMILIES["EMR"], **save)
    assert sorted(file.name for file in place.iterdir()) == ["a", "b"]
    del config["modelpool"]["models"]["b"]
    run(config, method=FAMILIES["EMR"], **save)
    assert [file.name for file in place.iterdir()] == ["a"]


def test_a_method_without_a_seed_of_its_own_takes_the_program_s(config: Config) -> None:
    dare = method("DareTaskArithmetic")
    one, other, again, own = (
        run(config, method=node, seed=seed, baselines="none").models["merged"].identity
        for node, seed in ((dare, 1), (dare, 2), (dare, 1), (dare | {"seed": 1}, 2))
    )
    assert one == again == own != other


ENSEMBLES = {
    "features": method("SimpleEnsembleAlgorithm"),
    "probabilities": method("WeightedEnsembleAlgorithm", weights=[1, 3], of="probabilities"),
    "maximum": method("MaxModelPredictorAlgorithm"),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_is_evaluated_and_saved_and_loaded_back(
    name: str, config: Config, tmp_path: Path
) -> None:
    place = tmp_path / "ensemble"
    report = run(config, method=ENSEMBLES[name], merged_model_save_path=str(place))
    model = report.models["merged"]
    assert list(report.models) == ["_pretrained_", "a", "b", "merged"]
    assert list(model.tasks) == ["a", "b"]
    members = [report.models[task].num_parameters for task in CLASSES]
    assert model.num_parameters == sum(members)

    pool = CLIPVisionModelPool({task: str(place / task) for task in CLASSES})
    ensemble = load_ensemble(place, {task: pool.load_model(task) for task in CLASSES})
    arguments = {k: v for k, v in config["taskpool"].items() if k != "_target_"}
    scores = CLIPVisionModelTaskPool(**arguments).evaluate(
        ensemble, Fabric(accelerator="cpu", devices=1)
    )
    for task, score in scores.items():
        assert num_right(score) / 23 == model.tasks[task].main.value
        assert loss_sum(score) / 23 == model.tasks[task].metrics["loss"].value


def test_an_ensemble_of_one_answers_as_that_model(config: Config) -> None:
    del config["modelpool"]["models"]["b"]
    for kind, of in (
        *(("Simple", "outputs"), ("Simple", "probabilities")),
        *(("Weighted", "logits"), ("Weighted", "log_probabilities")),
    ):
        one = method(f"{kind}EnsembleAlgorithm", of=of)
        report = run(config, method=one, baselines="all_tasks")
        for task, result in report.models["merged"].tasks.items():
            alone = report.models["a"].tasks[task]
            assert result.main.value == alone.main.value
            assert result.metrics["loss"].value == pytest.approx(
                alone.metrics["loss"].value, rel=1e-5
            )


def test_an_ensemble_needs_no_task_pool_to_be_saved(config: Config, tmp_path: Path) -> None:
    place = tmp_path / "ensemble"
    report = run(
        config, method=ENSEMBLES["maximum"], merged_model_save_path=str(place), taskpool=None
    )
    assert report.models["merged"].num_parameters > 0 and not report.models["merged"].tasks
    assert sorted(file.name for file in place.iterdir()) == ["a", "b", "ensemble.json"]


@pytest.mark.processes
def test_two_processes_evaluate_an_ensemble_as_one(config: Config) -> None:
    config["taskpool"] = config["taskpool"] | {"cache": False}
    alone = run(config, method=ENSEMBLES["probabilities"])
    two = {"accelerator": "cpu", "devices": 2}
    together = run(config, method=ENSEMBLES["probabilities"], fabric=two)
    assert figures(together) == figures(alone)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Write classifiers with heads and running statistics; return their places by name."""
    place, named = tmp_path_factory.mktemp("heads"), {}
    for seed, (task, names) in enumerate(CLASSES.items()):
        labels = dict(enumerate(names))
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = ResNetForImageClassification(
                ResNetConfig(layer_type="basic", id2label=labels, **sizes)
            )
        for key, value in model.state_dict().items():
            if "running_mean" in key:
                value += seed
        named[task] = str(place / task)
        model.save_pretrained(named[task])
        ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(named[task])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ResNetModel(model.config).save_pretrained(place / "base")
    return {"_pretrained_": str(place / "base"), **named}


@pytest.fixture
def with_heads(config: Config, heads: Config) -> Config:
    """Return a config of these classifiers."""
    return config | {
        "modelpool": {
            "_target_": "fusion_bench.modelpool.HFModelPool",
            "models": heads,
            "train_datasets": config["modelpool"]["train_datasets"],
        },
        "taskpool": {
            "_target_": "fusion_bench.taskpool.ImageClassificationTaskPool",
            "test_datasets": config["taskpool"]["test_datasets"],
            "classifiers": {task: heads[task] for task in CLASSES},
        },
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_models_with_heads_learn_in_every_precision(precision: str, with_heads: Config) -> None:
    fabric = {"accelerator": "cpu", "precision": precision}
    report = run(with_heads, method=LEARNING["learned soup"], fabric=fabric)
    assert list(report.models["merged"].tasks) == ["a", "b"]

    pool = instantiate(_lazy(with_heads["modelpool"]))
    tasks = instantiate(_lazy(with_heads["taskpool"]))
    data = tasks.tuning(pool.train_datasets, Fabric(**fabric), ("modelpool", "train_datasets"))
    for name, node in LEARNING.items():
        learned = instantiate(node).run(pool, Fabric(**fabric), data)
        assert learned.keys() == pool.weights("_pretrained_").keys(), name
        assert all(torch.isfinite(value).all() for value in learned.values()), name


def test_running_statistics_are_the_bases_or_averaged(with_heads: Config) -> None:
    pool = instantiate(_lazy(with_heads["modelpool"]))
    tasks = instantiate(_lazy(with_heads["taskpool"]))
    fabric = Fabric(accelerator="cpu", devices=1)
    data = tasks.tuning(pool.train_datasets, fabric, ("modelpool", "train_datasets"))
    key = "embedder.embedder.normalization.running_mean"
    soup, adapted = (
        instantiate(LEARNING[name]).run(pool, fabric, data)
        for name in ("learned soup", "adamerging")
    )
    assert (pool.weights("b")[key] == 1).all()
    assert ((soup[key] > 0.2) & (soup[key] < 0.8)).all() and (adapted[key] == 0).all()


def test_heads_make_an_ensemble_of_logits(with_heads: Config) -> None:
    report = run(with_heads, method=ENSEMBLES["probabilities"])
    assert list(report.models["merged"].tasks) == ["a", "b"]
    message = refused(with_heads, method=ENSEMBLES["features"])
    assert "its backbone is a ResNetModel, that of 'merged' a Ensemble" in message
