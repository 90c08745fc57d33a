import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset,
    load_from_disk,
)
from fixtures_scores import answers as predicted
from fixtures_scores import details, losses
from lightning.fabric import Fabric
from PIL import Image as PILImage
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.progress import SAMPLES, step
from fusion_bench.results import SampleScores, store
from fusion_bench.storage import cache_dir
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images import task as base

CPU = Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def data(family: Path) -> Dataset:
    """Return task `a` with a second picture and a second label a sample."""
    rows = load_dataset(str(family / "datasets" / "a"), split="test")
    turned = rows["label"][::-1]
    rows = rows.add_column("second", turned, feature=ClassLabel(names=["x", "y", "z"]))
    files = rows.cast_column("image", Image(decode=False))["image"]
    return rows.add_column("picture", files[::-1], feature=Image())


class Evaluator:
    """Evaluates model `a`, and counts how often it is built."""

    def __init__(self, family: Path, config: dict[str, Any], data: Dataset):
        self._path = family / "models" / "a"
        arguments = {k: v for k, v in config["taskpool"].items() if k != "_target_"}
        own = {"image_column": "image", "label_column": "label"}
        self._arguments = {**arguments, "test_datasets": {"a": data}, "tasks": {"a": own}}
        self.built = 0

    def build(self) -> nn.Module:
        self.built += 1
        return CLIPVisionModel.from_pretrained(self._path)

    def pool(self, task: dict[str, Any] | None = None, **changes: Any) -> CLIPVisionModelTaskPool:
        arguments = self._arguments | changes
        arguments["tasks"] = {"a": arguments["tasks"]["a"] | (task or {})}
        return CLIPVisionModelTaskPool(**arguments)

    def __call__(
        self,
        weights: str | None = "w",
        precision: str | None = None,
        fast_dev_run: bool = False,
        task: dict[str, Any] | None = None,
        **changes: Any,
    ) -> SampleScores:
        pool = self.pool(task, **changes)
        fabric = (
            CPU if precision is None else Fabric(accelerator="cpu", devices=1, precision=precision)
        )
        return pool.evaluate(self.build, fabric, fast_dev_run=fast_dev_run, weights_sha256=weights)[
            "a"
        ]


@pytest.fixture
def evaluate(family: Path, program_config: dict[str, Any], data: Dataset) -> Evaluator:
    return Evaluator(family, program_config, data)


def answers(score: SampleScores) -> list[Any]:
    return details(score)


def kept(kind: str) -> dict[Path, bytes]:
    files = (cache_dir() / kind).rglob("*")
    return {file: file.read_bytes() for file in files if file.is_file()}


def test_what_was_evaluated_is_not_evaluated_again(
    evaluate: Evaluator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = evaluate()
    second = evaluate()
    assert evaluate.built == 1
    assert answers(first) == answers(second) == answers(evaluate(cache=False))
    assert "'model' was evaluated before on a" in caplog.text


def test_parts_are_kept_sample_by_sample_and_are_no_whole(
    evaluate: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = evaluate.pool()
    asked: list[list[int]] = []
    plain = base.evaluate

    def counted(fabric: Any, classify: Any, images: Any, samples: Any, *more: Any) -> Any:
        asked.append(samples.tolist())
        return plain(fabric, classify, images, samples, *more)

    monkeypatch.setattr(base, "evaluate", counted)

    def part(*samples: int) -> SampleScores:
        own = pool.part({"a": np.array(samples)})
        return own.evaluate(evaluate.build, CPU, weights_sha256="w")["a"]

    assert part(2, 5, 9).samples.tolist() == [2, 5, 9]
    assert part(2, 7).samples.tolist() == [2, 7]
    assert part(2, 5, 7, 9).samples.tolist() == [2, 5, 7, 9]
    assert asked == [[2, 5, 9], [7]] and evaluate.built == 2
    whole = evaluate()  # a part is not mistaken for it
    assert whole.num_samples == 23 and asked[2:] == [list(range(23))]
    for samples in ([2, 5, 7, 9], [0, 22]):  # what the whole says is not evaluated again
        found = part(*samples)
        at = whole.at(np.isin(whole.samples, samples))
        assert answers(found)[:3] == answers(at)[:3]
    assert len(asked) == 3
    (cache_dir() / "scores").rename(cache_dir() / "gone")
    assert part(1, 2).samples.tolist() == [1, 2] and asked[3:] == [[1, 2]]
    assert pool.samples("a", CPU).tolist() == list(range(23))
    assert pool.samples("a", CPU, fast_dev_run=True).tolist() == list(range(23))[: len(asked[2])]


def test_progress_counts_samples_and_tells_known_ones_apart(
    evaluate: Evaluator, data: Dataset
) -> None:
    for skipped in (0, len(data)):
        with step("evaluating", 1000, SAMPLES) as work:
            evaluate()
            assert (work.done, work.skipped) == (len(data), skipped)


@pytest.mark.parametrize(
    "same",
    [
        {"dataloader_kwargs": {"batch_size": 3, "num_workers": 2}},
        {"per_class": True, "save_predictions": True},
        {"cache_size": "1MB"},
        {"max_samples": 23},
        {"max_samples": 1000},
    ],
)
def test_what_changes_no_figure_is_no_reason_to_evaluate(
    evaluate: Evaluator, same: dict[str, Any]
) -> None:
    evaluate()
    evaluate(**same)
    assert evaluate.built == 1


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"weights": None},
        {"task": {"label_column": "second"}},
        {"task": {"image_column": "picture"}},
        {"task": {"templates": ["a drawing of a {}."]}},
        {"task": {"class_names": ["abbey", "airplane", "beach"]}},
        {"max_samples": 5},
        {"fast_dev_run": True, "dataloader_kwargs": {"batch_size": 4}},
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_what_changes_a_figure_is_evaluated(evaluate: Evaluator, change: dict[str, Any]) -> None:
    plain = answers(evaluate())
    changed = answers(evaluate(**change))
    assert evaluate.built == 2
    assert changed == answers(evaluate(**change, cache=False))
    assert (changed != plain) == (change.get("weights", "") == "")
    evaluate()
    evaluate(**change)
    assert evaluate.built == (4 if "weights" in change and change["weights"] is None else 3)


def test_other_preprocessing_is_evaluated(evaluate: Evaluator, family: Path) -> None:
    evaluate()
    processor = CLIPImageProcessorPil.from_pretrained(family / "models" / "base")
    evaluate(data_processor=processor)
    assert evaluate.built == 1
    evaluate(data_processor=CLIPImageProcessorPil(**(processor.to_dict() | {"resample": 2})))
    assert evaluate.built == 2


def test_another_dataset_is_evaluated(evaluate: Evaluator, data: Dataset) -> None:
    evaluate()
    evaluate(test_datasets={"a": data.select(range(22))})
    evaluate(test_datasets={"a": data.select([1, 0, *range(2, 23)])})
    assert evaluate.built == 3


def test_other_weights_in_the_text_tower_are_evaluated(
    evaluate: Evaluator, family: Path, data: Dataset
) -> None:
    from transformers import CLIPModel

    evaluate()
    clip = CLIPModel.from_pretrained(family / "models" / "base")
    with torch.no_grad():
        clip.logit_scale += 1
    evaluate(clip_model=clip)
    assert evaluate.built == 2


def test_a_newer_evaluation_evaluates_anew(
    evaluate: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate()
    monkeypatch.setattr(store, "EVALUATION_VERSION", store.EVALUATION_VERSION + 1)
    evaluate()
    assert evaluate.built == 2


def test_without_the_cache_nothing_is_read_or_written(evaluate: Evaluator) -> None:
    evaluate(cache=False)
    for kind in ("scores", "images", "heads"):
        assert not (cache_dir() / kind).exists()
    evaluate()
    before = kept("scores")
    evaluate(cache=False)
    assert evaluate.built == 3 and kept("scores") == before


@pytest.mark.parametrize(
    "damage", [lambda c: c[:50], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b""]
)
def test_a_damaged_result_is_evaluated_again(evaluate: Evaluator, damage: Any) -> None:
    first = evaluate()
    ((file, content),) = kept("scores").items()
    file.write_bytes(damage(content))
    assert answers(evaluate()) == answers(first)
    assert evaluate.built == 2 and kept("scores") == {file: content}


def test_the_model_is_built_once_for_the_tasks_that_need_it(
    evaluate: Evaluator, data: Dataset
) -> None:
    first = evaluate()
    three = {"a": data, "b": data.select(range(7)), "c": data.select(range(9))}
    pool = CLIPVisionModelTaskPool(**(evaluate._arguments | {"test_datasets": three}))
    for _ in range(2):
        scores = pool.evaluate(evaluate.build, CPU, weights_sha256="w")
        assert evaluate.built == 2
        assert [score.num_samples for score in scores.values()] == [23, 7, 9]
        assert answers(scores["a"]) == answers(first)
        assert predicted(scores["b"]) == first.details["predictions"][:7].tolist()


def test_what_cannot_be_prepared_is_refused_each_time(evaluate: Evaluator, family: Path) -> None:
    arguments = evaluate._arguments | {"clip_model": str(family / "models" / "a")}
    pool = CLIPVisionModelTaskPool(**arguments)
    for _ in range(2):
        with pytest.raises(FusionBenchError, match="not a full CLIP model"):
            pool.prepare(CPU)


def test_samples_are_drawn_once_for_all_runs(evaluate: Evaluator) -> None:
    some = evaluate(max_samples=6)
    assert some.num_samples == 6
    assert some.samples.tolist() == sorted(set(some.samples.tolist()))
    assert some.samples.tolist() != list(range(6))
    assert answers(evaluate(max_samples=6, cache=False)) == answers(some)
    whole = evaluate()
    assert predicted(some) == whole.details["predictions"][some.samples].tolist()


def test_max_samples_holds_for_each_task(family: Path, program_config: dict[str, Any]) -> None:
    arguments = {k: v for k, v in program_config["taskpool"].items() if k != "_target_"}
    pool = CLIPVisionModelTaskPool(**arguments, max_samples=4)
    model = CLIPVisionModel.from_pretrained(family / "models" / "a")
    assert [score.num_samples for score in pool.evaluate(model, CPU).values()] == [4, 4]


def test_a_fast_run_takes_the_first_of_the_samples(evaluate: Evaluator) -> None:
    settings = {"max_samples": 6, "dataloader_kwargs": {"batch_size": 2}}
    fast = evaluate(fast_dev_run=True, **settings)
    assert fast.samples.tolist() == evaluate(**settings).samples[:2].tolist()


@pytest.mark.parametrize("number", [0, -1])
def test_max_samples_is_positive(evaluate: Evaluator, number: int) -> None:
    with pytest.raises(FusionBenchError, match=r"max_samples"):
        evaluate(max_samples=number)


@pytest.mark.parametrize("size", ["50 GB", "50GB", "1.5tb", "700", 1000, "0", 0])
def test_sizes(evaluate: Evaluator, size: int | str) -> None:
    evaluate(cache_size=size, weights=None)
    assert (cache_dir() / "images").exists() == (size not in ("0", 0))


def test_what_is_no_size(evaluate: Evaluator) -> None:
    with pytest.raises(FusionBenchError, match=r"cache_size: 'much' is not a size"):
        evaluate(cache_size="much")


def test_a_compiled_model_is_evaluated_in_full_batches(
    evaluate: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate()
    compiled = []
    # To compile in earnest takes half a minute.
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    score = evaluate(compile=True, dataloader_kwargs={"batch_size": 5})
    assert compiled == [CLIPVisionModel] and evaluate.built == 2
    assert predicted(score) == predicted(plain)
    assert losses(score) == pytest.approx(losses(plain), rel=1e-4)


def planned(evaluate: Evaluator, node: dict[str, Any], **task: Any) -> list[str]:
    arguments = evaluate._arguments | {"test_datasets": {"a": node}, "tasks": {"a": task}}
    return [str(problem) for problem in CLIPVisionModelTaskPool(**arguments).plan().problems]


def prepared(evaluate: Evaluator, node: dict[str, Any], **task: Any) -> str:
    arguments = evaluate._arguments | {"test_datasets": {"a": node}, "tasks": {"a": task}}
    with pytest.raises(FusionBenchError) as error:
        CLIPVisionModelTaskPool(**arguments).prepare(CPU)
    return str(error.value)


@pytest.fixture
def forms(data: Dataset, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Return nodes of task `a` as a folder, a parquet file by split, and as saved to disk."""
    rows = data.select_columns(["image", "label"])
    names = rows.features["label"].names
    for number, row in enumerate(rows):
        place = tmp_path / "folder" / "test" / names[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{number}.png")
    plain = rows.cast_column("label", Value("int64"))
    text = plain.map(
        lambda row: {"label": names[row["label"]]}, features=TEXT, remove_columns="label"
    )
    nodes: dict[str, dict[str, Any]] = {"folder": {"path": str(tmp_path / "folder")}}
    for form, content in {"classes": rows, "numbers": plain, "text": text}.items():
        content.to_parquet(tmp_path / f"{form}.parquet")
        DatasetDict(test=content).save_to_disk(tmp_path / form)
        nodes[form] = {"path": "parquet", "data_files": {"test": str(tmp_path / f"{form}.parquet")}}
        nodes[f"{form} on disk"] = {
            "_target_": "datasets.load_from_disk",
            "dataset_path": str(tmp_path / form),
        }
    call = {"_target_": "datasets.load_dataset", "split": "test"}
    return {form: call | node for form, node in nodes.items()}


TEXT = Features({"image": Image(), "label": Value("string")})


FORMS = [f"{kind}{where}" for kind in ("classes", "numbers", "text") for where in ("", " on disk")]


@pytest.mark.parametrize("form", ["folder", *FORMS])
def test_a_plan_refuses_what_a_run_refuses(
    evaluate: Evaluator, forms: dict[str, dict[str, Any]], form: str
) -> None:
    """Fewer class names than the data have classes."""
    names = ["abbey", "airplane cabin", "beach"]
    assert planned(evaluate, forms[form], class_names=names) == []
    (problem,) = planned(evaluate, forms[form], class_names=names[:2])
    assert problem == prepared(evaluate, forms[form], class_names=names[:2])
    assert "tasks.a.class_names" in problem


def test_the_same_data_in_any_form_give_the_same_answers(
    evaluate: Evaluator, forms: dict[str, dict[str, Any]]
) -> None:
    def found(node: Any, names: list[str]) -> dict[str, tuple[int, int]]:
        """Return of each class, by name, how many samples there are, and how many are right."""
        told = {"a": {"class_names": names}}
        arguments = evaluate._arguments | {"test_datasets": {"a": node}, "tasks": told}
        pool = CLIPVisionModelTaskPool(**arguments)
        score = pool.evaluate(evaluate.build, CPU)["a"]
        right = score.details["predictions"] == score.details["labels"]
        return {
            name: (
                int((score.details["labels"] == label).sum()),
                int(right[score.details["labels"] == label].sum()),
            )
            for label, name in enumerate(pool.tasks["a"].images.class_names)
        }

    names = ["abbey", "airplane cabin", "beach"]
    expected = found(forms["classes"], names)
    for form in ("folder", "text", "text on disk", "numbers on disk"):
        assert found(forms[form], names) == expected, form
    assert found(forms["folder"], names[::-1]) == expected
    assert found(forms["text"], names[::-1]) == expected


def test_tuning_data_of_other_classes_say_which(
    evaluate: Evaluator, forms: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    rows = load_from_disk(tmp_path / "text")["test"]
    rows.filter(lambda row: row["label"] != "beach").to_parquet(tmp_path / "few.parquet")
    few = forms["text"] | {"data_files": {"test": str(tmp_path / "few.parquet")}}
    arguments = evaluate._arguments | {"test_datasets": {"a": forms["text"]}, "tasks": {}}
    pool = CLIPVisionModelTaskPool(**arguments)
    assert pool.plan().problems == []
    (problem,) = pool.plan_tuning({"a": few}, ("method", "data")).problems
    assert str(problem) == (
        "method.data.a: its classes are not those of 'a'. It lacks 'beach'. If labels are "
        "text, list all in the task pool's 'tasks.a.class_names'."
    )


def grey(data: Dataset, make: Any, kind: str) -> Dataset:
    """Return the pictures in grey, as ``make`` has their values."""
    rows = []
    for row in data.select_columns(["image", "label"]):
        file = io.BytesIO()
        values = make(np.asarray(row["image"].convert("L")))
        PILImage.fromarray(values).save(file, format=kind)
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": row["label"]})
    features = Features({"image": Image(), "label": data.features["label"]})
    return Dataset.from_list(rows, features=features)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda shades: shades.astype(np.uint16) * 257, "PNG"),
        (lambda shades: shades.astype(np.uint16) * 257, "TIFF"),
        (lambda shades: shades.astype(np.int32) * 257, "TIFF"),
        (lambda shades: shades.astype(np.int32), "TIFF"),
        (lambda shades: (shades / 255).astype(np.float32), "TIFF"),
    ],
)
def test_deep_pictures_are_answered_like_others(
    evaluate: Evaluator, data: Dataset, make: Any, kind: str
) -> None:
    plain = evaluate(test_datasets={"a": grey(data, lambda shades: shades, "PNG")})
    deep = evaluate(test_datasets={"a": grey(data, make, kind)})
    assert answers(deep) == answers(plain) and evaluate.built == 2


def test_a_picture_that_is_none_ends_the_evaluation(evaluate: Evaluator, data: Dataset) -> None:
    rows = data.select_columns(["image", "label"]).cast_column("image", Image(decode=False))
    content = [*rows.select(range(5)), {"image": {"bytes": b"%!PS-Adobe-3.0", "path": "a.eps"}}]
    content[-1]["label"] = 0
    features = Features({"image": Image(), "label": data.features["label"]})
    with pytest.raises(FusionBenchError, match=r"datasets\.a: sample 5, 'a\.eps', holds") as error:
        evaluate(test_datasets={"a": Dataset.from_list(content, features=features)})
    assert error.value.exit_code == 2


def test_a_whole_config_may_give_a_saved_data_set_a_split(
    program_config: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    DatasetDict(test=data.select_columns(["image", "label"])).save_to_disk(tmp_path / "saved")
    node = {"_target_": "datasets.load_from_disk", "dataset_path": str(tmp_path / "saved")}
    program_config["taskpool"]["test_datasets"]["a"] = node
    program = {**program_config, "dry_run": True}
    with pytest.raises(FusionBenchError, match=r"names no split\. Add 'split: …', one of: test"):
        instantiate(program).run()
    node["split"] = "test"
    assert instantiate(program).run() is None
    node["splitt"] = "test"
    with pytest.raises(FusionBenchError, match="takes no such key"):
        instantiate(program).run()
