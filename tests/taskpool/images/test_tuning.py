from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from fixtures_data import CPU, clip_family
from fixtures_scores import loss_sum, losses, num_right
from lightning.fabric import Fabric
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool import CLIPVisionModelTaskPool, TuningImages


@pytest.fixture
def images(family: Path, program_config: dict[str, Any]) -> TuningImages:
    """Return the 23 samples of task `a`."""
    return clip_family(family, program_config, split="test")[2]["a"]


def model(family: Path, name: str = "a") -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(family / "models" / name).eval()


def tasks(config: dict[str, Any], **changes: Any) -> CLIPVisionModelTaskPool:
    arguments = {k: v for k, v in config["taskpool"].items() if k != "_target_"}
    return CLIPVisionModelTaskPool(**(arguments | changes))


def node(family: Path, task: str = "a", split: str = "train") -> dict[str, str]:
    path = str(family / "datasets" / task)
    return {"_target_": "datasets.load_dataset", "path": path, "split": split}


def test_a_sample_is_drawn_at_random_and_none_twice(images: TuningImages) -> None:
    drawn = images.sample(9)
    assert len(set(drawn.tolist())) == 9 and drawn.tolist() == sorted(drawn.tolist())
    assert drawn.tolist() != list(range(9))
    assert images.sample(9).tolist() == drawn.tolist()
    assert images.sample(9, seed=1).tolist() != drawn.tolist()
    seen = {index for seed in range(30) for index in images.sample(9, seed).tolist()}
    assert seen == set(range(23))


def test_all_come_in_order_where_no_more_are_there(images: TuningImages) -> None:
    for count in (None, 23, 100):
        assert images.sample(count).tolist() == list(range(23)) == list(range(len(images)))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_batches_are_what_the_processor_makes(
    family: Path, images: TuningImages, batch_size: int
) -> None:
    samples = np.array([3, 22, 0, 7, 8, 1, 1])
    rows = load_dataset(str(family / "datasets" / "a"), split="test")
    processor = CLIPImageProcessorPil.from_pretrained(family / "models" / "base")
    pictures = [rows[int(index)]["image"].convert("RGB") for index in samples]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    batches = list(images.batches(samples, batch_size))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), expected)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [rows[int(index)]["label"] for index in samples]


def test_endless_goes_round_in_a_new_order(images: TuningImages) -> None:
    def first(rounds: int, seed: int) -> list[torch.Tensor]:
        steps = rounds * 3  # of 10, 10 and 3 samples
        return [pixels for pixels, _ in islice(images.endless(10, seed), steps)]

    def known(pixels: torch.Tensor) -> list[bytes]:
        return [image.numpy().tobytes() for image in pixels]

    batches = first(rounds=2, seed=0)
    assert [len(batch) for batch in batches] == [10, 10, 3] * 2
    once, again = (known(torch.cat(batches[i : i + 3])) for i in (0, 3))
    everything = known(torch.cat([pixels for pixels, _ in images.batches(images.sample(None), 8)]))
    assert sorted(once) == sorted(again) == sorted(everything)
    assert len({tuple(once), tuple(again), tuple(everything)}) == 3
    assert all(map(torch.equal, first(1, seed=0), batches[:3]))
    assert not torch.equal(first(1, seed=1)[0], batches[0])


def test_a_classifier_follows_the_model_s_parameters(family: Path, images: TuningImages) -> None:
    encoder = model(family)
    classify = images.classify(encoder)
    pixels, labels = next(images.batches(images.sample(None), 23))
    logits = classify(pixels)
    assert logits.shape == (23, 3) and logits.dtype == torch.float32
    loss = torch.nn.functional.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        encoder.post_layernorm.weight.mul_(-1)
        assert not torch.allclose(classify(pixels), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_classifier_takes_images_as_they_come(
    family: Path, images: TuningImages, dtype: torch.dtype
) -> None:
    pixels, _ = next(images.batches(images.sample(4), 4))
    with torch.no_grad():
        exact = images.classify(model(family))(pixels)
        found = images.classify(model(family).to(dtype))(pixels)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.3)


def test_answers_are_those_that_the_task_pool_evaluates(
    family: Path, program_config: dict[str, Any], images: TuningImages
) -> None:
    expected = tasks(program_config).evaluate(model(family), CPU, ["a"])["a"]
    score = images.evaluate(model(family))
    assert (num_right(score), score.num_samples) == (num_right(expected), 23)
    assert losses(score) == losses(expected)
    pixels, labels = next(images.batches(images.sample(None), 23))
    with torch.no_grad():
        logits = images.classify(model(family))(pixels)
    assert int((logits.argmax(dim=1) == labels).sum()) == num_right(expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_evaluating_in_other_precisions(
    family: Path, program_config: dict[str, Any], images: TuningImages, precision: Any
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    data = tasks(program_config).tuning({"a": node(family, split="test")}, fabric, ("here",))
    exact = images.evaluate(model(family))
    assert loss_sum(data["a"].evaluate(model(family))) == pytest.approx(loss_sum(exact), rel=0.05)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", False),
        ("train[:2]", False),
        ("test", True),
        ("test[5:9]", True),
        ("train+test[:1]", True),
    ],
)
def test_the_test_split_is_known_by_its_name(
    family: Path, program_config: dict[str, Any], split: str, expected: bool
) -> None:
    pool = tasks(program_config)
    data = pool.tuning({"a": node(family, split=split)}, CPU, ("here",))["a"]
    assert data.split == split
    assert data.is_test is expected


def test_the_test_split_is_known_by_its_content(
    family: Path, program_config: dict[str, Any]
) -> None:
    evaluated = tasks(program_config, test_datasets={"a": node(family)})
    for split in ("train", "train[:2]", "train[1:]"):
        data = evaluated.tuning({"a": node(family, split=split)}, CPU, ("here",))["a"]
        assert data.is_test


def test_a_copy_of_the_test_split_is_known_by_its_images(
    family: Path, program_config: dict[str, Any], tmp_path: Path
) -> None:
    pool = tasks(program_config)
    pool.prepare(CPU)
    copy = tmp_path / "copy.parquet"
    pool.tasks["a"].images.dataset.select(range(3, 20)).to_parquet(copy)
    load = {"_target_": "datasets.load_dataset", "path": "parquet", "split": "train"}
    data = pool.tuning({"a": load | {"data_files": str(copy)}}, CPU, ("here",))["a"]
    assert data.split == "train" and data.is_test


def test_names_are_those_of_tasks_however_they_are_written(
    family: Path, program_config: dict[str, Any]
) -> None:
    pool = tasks(
        program_config,
        test_datasets={"stanford-cars": node(family, split="test")},
        tasks={"stanford-cars": {"class_names": ["x", "y", "z"]}},
    )
    data = pool.tuning({"stanford_cars": node(family)}, CPU, ("here",))
    assert data["stanford_cars"].task == "stanford-cars"
    assert data["stanford_cars"].data.class_names == ["x", "y", "z"]
    assert len(data["stanford_cars"]) == 4


def test_what_cannot_be_learned_from(family: Path, program_config: dict[str, Any]) -> None:
    pool, place = tasks(program_config), ("modelpool", "train_datasets")
    key = r"^modelpool\.train_datasets"
    with pytest.raises(FusionBenchError, match=rf"{key}\.aa: the task pool has no such task"):
        pool.tuning({"aa": node(family)}, CPU, place)
    with pytest.raises(FusionBenchError, match=rf"{key}\.b: its classes are not those of 'b'"):
        pool.tuning({"b": node(family, "a")}, CPU, place)
    with pytest.raises(FusionBenchError, match="no split 'validation'"):
        pool.tuning({"a": node(family, split="validation")}, CPU, place)
    with pytest.raises(FusionBenchError, match=rf"{key}\.a: names no split"):
        pool.tuning({"a": {k: v for k, v in node(family).items() if k != "split"}}, CPU, place)
