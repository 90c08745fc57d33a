"""What the program makes of a task pool's answers, and what it need not do again."""

from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import CLASSES
from datasets import load_dataset

from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report
from fusion_bench.taskpool.images import task as base
from fusion_bench.taskpool.images.labelled import LabelledImages


def run(config: dict[str, Any], taskpool: dict[str, Any] | None = None, **changes: Any) -> Report:
    section = config["taskpool"] | (taskpool or {})
    report = instantiate(config | {"taskpool": section} | changes).run()
    assert isinstance(report, Report)
    return report


def answers(out: Path) -> dict[str, Any]:
    """Return each table of predictions by model and task."""
    return {
        f"{file.parent.name}/{file.stem}": pandas.read_parquet(file)
        for file in (out / "predictions").rglob("*.parquet")
    }


def test_neither_batches_nor_processes_change_the_figures(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    plain = {"cache": False, "save_predictions": True}
    program_config["baselines"] = "none"
    alone = run(program_config, plain, output_dir=tmp_path / "alone")
    tables = answers(tmp_path / "alone")
    assert len(tables) == 2
    for devices, batch_size in ((1, 1), (2, 64), (3, 7)):
        out = tmp_path / f"{devices}x{batch_size}"
        fabric = {"accelerator": "cpu", "devices": devices}
        batches = {**plain, "dataloader_kwargs": {"batch_size": batch_size}}
        other = run(program_config, batches, fabric=fabric, output_dir=out)
        assert other.run.world_size == devices
        for name, model in alone.models.items():
            for task, result in model.tasks.items():
                found = other.models[name].tasks[task]
                assert (found.main.value, found.num_samples) == (result.main.value, 23)
                assert found.metrics["loss"].value == pytest.approx(
                    result.metrics["loss"].value, rel=1e-6
                )
        for key, table in answers(out).items():
            assert table["sample"].tolist() == list(range(23))
            assert table["prediction"].equals(tables[key]["prediction"])
            assert table["loss"].tolist() == pytest.approx(tables[key]["loss"].tolist(), rel=1e-4)


def test_more_processes_than_samples(program_config: dict[str, Any]) -> None:
    program_config["baselines"] = "none"
    fabric = {"accelerator": "cpu", "devices": 3}
    report = run(program_config, {"max_samples": 1}, fabric=fabric)
    alone = run(program_config, {"max_samples": 1, "cache": False})
    for task in CLASSES:
        found, expected = (r.models["merged"].tasks[task] for r in (report, alone))
        assert found.num_samples == 1
        assert found.metrics["loss"].value == pytest.approx(
            expected.metrics["loss"].value, rel=1e-5
        )


@pytest.mark.processes
def test_processes_share_one_cache(program_config: dict[str, Any]) -> None:
    together = run(program_config, fabric={"accelerator": "cpu", "devices": 2})
    assert run(program_config).models == together.models


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count what costs time."""
    counts = {"evaluate": 0, "image": 0, "load_model": 0, "build_model": 0}

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(base, "evaluate")
    count(LabelledImages, "image")
    count(CLIPVisionModelPool, "load_model")
    count(CLIPVisionModelPool, "build_model")
    return counts


def test_the_same_run_again_does_nothing(
    program_config: dict[str, Any], work: dict[str, int]
) -> None:
    first = run(program_config)
    assert work["evaluate"] == 6 and work["image"] == 2 * 23
    assert work["load_model"] == 3 and work["build_model"] >= 1
    work.update(dict.fromkeys(work, 0))
    second = run(program_config)
    assert work == dict.fromkeys(work, 0)
    assert second.models == first.models and second.tasks == first.tasks


def test_another_method_evaluates_its_own_model_alone(
    program_config: dict[str, Any], work: dict[str, int]
) -> None:
    first = run(program_config)
    work.update(dict.fromkeys(work, 0))
    other = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.3}
    second = run(program_config, method=other)
    assert (work["evaluate"], work["load_model"]) == (2, 0)
    assert work["image"] == 2  # one a task, to see that the processor still does the same
    for name in ("_pretrained_", "a", "b"):
        assert second.models[name] == first.models[name]


def test_accuracy_by_class(program_config: dict[str, Any], tmp_path: Path) -> None:
    settings = {"per_class": True, "save_predictions": True}
    run(program_config, settings, output_dir=tmp_path, baselines="none")
    report = Report.load(tmp_path / "report.json")
    assert report.tasks["a"].classes == ["abbey", "airplane cabin", "beach"]
    for key, table in answers(tmp_path).items():
        model, task = key.split("/")
        expected = []
        for label in range(len(CLASSES[task])):
            own = table[table["label"] == label]
            expected.append((own["prediction"] == label).sum() / len(own) if len(own) else None)
        assert report.models[model].tasks[task].per_class == expected


def test_without_it_the_report_says_nothing_of_classes(program_config: dict[str, Any]) -> None:
    report = run(program_config)
    assert report.tasks["a"].classes is None
    assert report.models["merged"].tasks["a"].per_class is None


def test_predictions_are_those_of_the_report(
    program_config: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    for out in ("first", "cached"):
        report = run(program_config, {"save_predictions": True}, output_dir=tmp_path / out)
        tables = answers(tmp_path / out)
        assert set(tables) == {
            *("_pretrained_/a", "_pretrained_/b", "a/a", "b/b", "merged/a", "merged/b")
        }
        for key, table in tables.items():
            model, task = key.split("/")
            result = report.models[model].tasks[task]
            data = load_dataset(str(family / "datasets" / task), split="test")
            assert list(table.columns) == ["sample", "label", "prediction", "accuracy", "loss"]
            assert table["label"].tolist() == data["label"][:]
            assert (table["label"] == table["prediction"]).mean() == result.main.value
            assert table["loss"].astype("float64").sum() / 23 == pytest.approx(
                result.metrics["loss"].value
            )


def test_predictions_of_a_subset_name_their_samples(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    program_config["baselines"] = "none"
    run(program_config, {"save_predictions": True}, output_dir=tmp_path / "all")
    settings = {"save_predictions": True, "max_samples": 5}
    report = run(program_config, settings, output_dir=tmp_path / "some")
    assert report.tasks["a"].num_samples == 5
    whole = answers(tmp_path / "all")
    for key, table in answers(tmp_path / "some").items():
        same = whole[key].iloc[table["sample"]]
        assert table["prediction"].tolist() == same["prediction"].tolist()


def test_predictions_need_a_place(program_config: dict[str, Any]) -> None:
    with pytest.raises(FusionBenchError, match=r"save_predictions: needs an output_dir"):
        run(program_config, {"save_predictions": True})
