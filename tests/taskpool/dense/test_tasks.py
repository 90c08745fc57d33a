"""Tasks with an answer for each pixel, on the small CLIP family and images made here."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, Dataset, Features, Image, Value
from fixtures_clip import IMAGE_SIZE as SIZE
from lightning.fabric import Fabric
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import CLIPVisionModel

from fusion_bench.method.ensemble import ensemble_of
from fusion_bench.patch_head import PatchHead
from fusion_bench.problems import FusionBenchError
from fusion_bench.results import SampleScores
from fusion_bench.taskpool import (
    DepthTask,
    LearningData,
    NormalsTask,
    SegmentationTask,
    Task,
    TaskPool,
)

CPU = Fabric(accelerator="cpu", devices=1)
COUNT = 7
CLASSES = 3


def png(pixels: Any) -> dict[str, Any]:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    normals = random.normal(size=(COUNT, 3, SIZE, SIZE)).astype(np.float32)
    normals[:, :, :3] = 0
    depth = random.uniform(1, 5, size=(COUNT, SIZE, SIZE)).astype(np.float32)
    depth[:, 4:9] = 0
    mask = random.integers(0, CLASSES, size=(COUNT, SIZE, SIZE)).astype(np.uint8)
    mask[:, :, :5] = 255
    images = random.integers(0, 256, size=(COUNT, SIZE, SIZE, 3)).astype(np.uint8)
    return {"image": images, "segmentation": mask, "depth": depth, "normals": normals}


@pytest.fixture(scope="module")
def data() -> Dataset:
    made = rows()
    columns = {
        "image": [png(own) for own in made["image"]],
        "segmentation": [png(own) for own in made["segmentation"]],
        "depth": list(made["depth"]),
        "normals": list(made["normals"]),
        "about": ["text"] * COUNT,
    }
    features = Features(
        {
            "image": Image(),
            "segmentation": Image(),
            "depth": Array2D((SIZE, SIZE), "float32"),
            "normals": Array3D((3, SIZE, SIZE), "float32"),
            "about": Value("string"),
        }
    )
    return Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def heads(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a head for each task, with the image processor of the family."""
    config = CLIPVisionModel.from_pretrained(family / "models" / "a").config
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for task, channels in {"segmentation": CLASSES, "depth": 1, "normals": 3}.items():
            found[task] = tmp_path_factory.mktemp(task)
            PatchHead(config.hidden_size, channels, config.patch_size).save(found[task])
            name = "preprocessor_config.json"
            content = (family / "models" / "base" / name).read_bytes()
            (found[task] / name).write_bytes(content)
    return found


@pytest.fixture(scope="module")
def model(family: Path) -> nn.Module:
    return CLIPVisionModel.from_pretrained(family / "models" / "a").eval()


def test_it_is_a_task(data: Dataset, heads: dict[str, Path], model: nn.Module) -> None:
    """As mypy sees it, too; and another of its datasets evaluates the same."""
    task: Task = SegmentationTask(data, str(heads["segmentation"]), cache_size=0, name="t")
    tasks = TaskPool({"t": task}, cache=False)
    learned: LearningData = tasks.tuning({"t": data.select(range(3))}, CPU, ("here",))["t"]
    assert (learned.task, len(learned), learned.metric.name) == ("t", 3, "mean_iou")
    whole = tasks.evaluate(model, CPU)["t"]
    same(whole.at(whole.samples < 3), learned.evaluate(model))
    same(learned.evaluate(model), tasks.evaluating({"t": learned}).evaluate(model, CPU)["t"])
    assert learned.is_test  # its images are evaluated, too
    images, targets = next(learned.batches(learned.sample(2), 2))
    assert images.shape == (2, 3, SIZE, SIZE) and targets.shape == (2, SIZE, SIZE)
    with pytest.raises(FusionBenchError, match="an answer for each pixel") as caught:
        learned.placed("taskpool").classify(model)
    assert caught.value.problems[0].key == "taskpool.tasks.t"


def test_a_dry_run_tells_what_is_wrong(heads: dict[str, Path], tmp_path: Path) -> None:
    def saved(name: str) -> dict[str, str]:
        place = str(tmp_path / name)
        Dataset.from_dict({name: [1], "depth": [[[1.0]]]}).save_to_disk(place)
        return {"_target_": "datasets.load_from_disk", "dataset_path": place}

    node, other = saved("image"), saved("picture")
    depth, normals = str(heads["depth"]), str(heads["normals"])
    kind = "fusion_bench.taskpool.DepthTask"
    tasks = {
        "a": {"_target_": kind, "dataset": node, "head": depth, "image_column": "picture"},
        "b": {"_target_": kind, "dataset": node, "head": depth, "target_column": "far"},
        "c": {"_target_": kind, "dataset": node, "head": normals},
        "d": {"_target_": kind, "dataset": other, "head": str(tmp_path), "processor": depth},
    }
    plan = TaskPool(tasks).plan()
    assert [str(problem) for problem in plan.problems] == [
        "tasks.a.image_column: the dataset has no column 'picture'. Known: depth, image.",
        "tasks.b.target_column: the dataset has no column 'far'. Known: depth, image.",
        "tasks.c.head: it gives 3 values a pixel, the task needs 1. Name the head of this task.",
        "tasks.d.dataset: no image columns among: picture, depth. Name the one to use in the "
        "task's 'image_column'.",
        f"tasks.d.head: '{tmp_path}' has no head: it lacks 'head.json'. Write one there with "
        "fusion_bench.taskpool.PatchHead, or name another folder.",
    ]


def pool(data: Any, heads: dict[str, Path], **arguments: Any) -> TaskPool:
    kinds = {"segmentation": SegmentationTask, "depth": DepthTask, "normals": NormalsTask}
    tasks = {
        name: kind(data, str(heads[name]), cache_size=0, name=name) for name, kind in kinds.items()
    }
    return TaskPool(tasks, cache=False, **arguments)


def predicted(model: nn.Module, head: Path) -> Tensor:
    """Return the head's values for all images, computed without the task pool."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = torch.from_numpy(rows()["image"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        state = model(pixel_values=(pixels - mean) / std).last_hidden_state[:, 1:]
        side = round(state.shape[1] ** 0.5)
        return PatchHead.read(head)(state.movedim(1, -1).unflatten(2, (side, side)))


def test_figures_are_those_of_plain_numpy(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    scores, true = pool(data, heads).evaluate(model, CPU), rows()
    tasks = pool(data, heads).tasks
    values = {
        task: [own.value(metric) for metric in tasks[task].metrics]  # type: ignore[attr-defined]
        for task, own in scores.items()
    }

    said = predicted(model, heads["segmentation"]).argmax(dim=1).numpy()
    counted = true["segmentation"] != 255
    both = [(((said == c) & (true["segmentation"] == c) & counted).sum()) for c in range(CLASSES)]
    either = [(((said == c) | (true["segmentation"] == c)) & counted).sum() for c in range(CLASSES)]
    expected = [np.mean(np.divide(both, either)), sum(both) / counted.sum()]
    assert values["segmentation"] == pytest.approx(expected, abs=1e-3)

    off = predicted(model, heads["depth"])[:, 0].double().numpy() - true["depth"]
    known = true["depth"] > 0
    relative = (np.abs(off)[known] / true["depth"][known]).mean()
    expected = [np.sqrt(np.square(off[known]).mean()), relative]
    assert values["depth"] == pytest.approx(expected, rel=1e-5)

    found = predicted(model, heads["normals"]).double().numpy()
    cosine = (found * true["normals"]).sum(axis=1) / np.linalg.norm(found, axis=1)
    lengths = np.linalg.norm(true["normals"], axis=1)
    known = lengths > 0
    angle = np.degrees(np.arccos(np.clip(cosine[known] / lengths[known], -1, 1)))
    assert values["normals"] == pytest.approx([angle.mean(), (angle < 11.25).mean()], rel=1e-4)


def same(one: SampleScores, other: SampleScores) -> None:
    assert one.samples.tolist() == other.samples.tolist()
    for name, own in one.statistics.items():
        np.testing.assert_allclose(own, other.statistics[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_number_of_samples_at_once_does_not_matter(
    data: Dataset, heads: dict[str, Path], model: nn.Module, batch_size: int
) -> None:
    expected = pool(data, heads).evaluate(model, CPU)
    loading = {"batch_size": batch_size}
    found = pool(data, heads, dataloader_kwargs=loading).evaluate(model, CPU)
    for task in expected:
        same(expected[task], found[task])


def test_a_part_of_the_samples_is_a_part_of_the_rows(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    whole = pool(data, heads).evaluate(model, CPU)
    part = pool(data, heads, max_samples=4).evaluate(model, CPU)
    for task, own in part.items():
        assert own.num_samples == 4
        same(whole[task].at(np.isin(whole[task].samples, own.samples)), own)


def test_what_it_counts_are_whole_numbers(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    found = pool(data, heads).evaluate(model, CPU)["segmentation"].statistics
    assert all((own == own.astype(np.int64)).all() for own in found.values())
    assert found["pixel_accuracy"][:, 1].tolist() == [SIZE * (SIZE - 5)] * COUNT


def test_a_description_tells_metrics_and_what_they_depend_on(
    data: Dataset, heads: dict[str, Path]
) -> None:
    tasks = pool(data, heads)
    tasks.prepare(CPU)
    about = tasks.describe("segmentation")
    assert (about.kind, about.num_classes) == ("segmentation", CLASSES)
    assert [metric.name for metric in about.metrics] == ["mean_iou", "pixel_accuracy"]
    assert set(about.identity) == {"dataset", "targets", "head", "image preprocessing"}
    assert tasks.describe("depth").main.name == "rmse"
    assert tasks.describe("normals").main.name == "mean_angle"


def keys(task: Any) -> Any:
    task.prepare(CPU)
    return task.key()


def test_what_figures_depend_on_is_in_the_key(
    data: Dataset, heads: dict[str, Path], tmp_path: Path
) -> None:
    head = str(heads["depth"])
    first = keys(DepthTask(data, head))
    assert keys(DepthTask(data, head, name="other", owner="x", cache_size=0)) == first
    with torch.random.fork_rng():
        PatchHead(**PatchHead.read(head).config).save(tmp_path)
    processor = head
    changed = data.map(lambda row: {"depth": np.asarray(row["depth"]) + 1})
    others = [
        keys(DepthTask(data, head, scale=0.5)),
        keys(DepthTask(data, str(tmp_path), processor=processor)),
        keys(DepthTask(changed, head)),
        keys(DepthTask(data, head, image_column="segmentation")),
    ]
    assert all(own != first for own in others)
    assert changed._fingerprint != data._fingerprint
    assert others[2]["targets"] != first["targets"]

    def masks(ignored: int | None) -> SegmentationTask:
        return SegmentationTask(data, str(many), processor=head, ignore_index=ignored)

    many = tmp_path / "many"
    PatchHead(4, 256, 2).save(many)
    assert keys(masks(255)) != keys(masks(None))


def test_results_are_kept_and_found(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    def evaluated(made: Any) -> dict[str, SampleScores]:
        tasks = pool(data, heads).tasks
        return TaskPool(tasks).evaluate(made, CPU, weights_sha256="w")

    first = evaluated(model)
    second = evaluated(lambda: pytest.fail("it is known"))
    for task in first:
        same(first[task], second[task])


@pytest.mark.parametrize("kind", [SegmentationTask, DepthTask, NormalsTask])
def test_a_head_may_be_any_module(
    data: Dataset, model: nn.Module, heads: dict[str, Path], kind: Any
) -> None:
    class Head(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, features: Tensor) -> Tensor:
            return features[:, : self.channels]  # of patches; they are resized

    more = {"num_classes": CLASSES} if kind is SegmentationTask else {}
    channels = 1 if kind is DepthTask else 3
    task = kind(data, Head(channels), processor=str(heads["depth"]), **more)
    assert TaskPool({"t": task}).evaluate(model, CPU)["t"].num_samples == COUNT


def refused(task: Any, model: nn.Module | None = None) -> str:
    with pytest.raises(FusionBenchError) as caught:
        tasks = TaskPool({"t": task()}, cache=False)
        tasks.prepare(CPU)
        tasks.evaluate(model or nn.Identity(), CPU)
    (problem,) = caught.value.problems
    return str(problem)


def test_what_cannot_be_is_told_with_its_key(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    mask, depth = str(heads["segmentation"]), str(heads["depth"])
    few = "tasks.t.dataset: sample 0: 'segmentation' has the class 255; there are 3, from 0."
    seen = refused(lambda: SegmentationTask(data, mask, ignore_index=None, name="t"))
    assert seen.startswith(few) and "'tasks.t.ignore_index'" in seen
    seen = refused(lambda: SegmentationTask(data, mask, target_column="depth", name="t"))
    assert "'depth' holds numbers that are not whole" in seen
    seen = refused(lambda: DepthTask(data, depth, target_column="normals", name="t"))
    assert "has the shape (3, 32, 32); expected is one number for each pixel" in seen
    seen = refused(lambda: NormalsTask(data, str(heads["normals"]), "depth", name="t"))
    assert "has the shape (32, 32); expected is three numbers" in seen
    seen = refused(lambda: DepthTask(data, depth, target_column="about", name="t"))
    assert "'about' is no array" in seen
    seen = refused(lambda: DepthTask(data, depth, "dept", name="t"))
    assert seen.startswith("tasks.t.target_column: the dataset has no column 'dept'.")
    seen = refused(lambda: DepthTask(data, mask, name="t"), model)
    assert seen.startswith("tasks.t.head: it gives 3 values a pixel, the task needs 1.")
    seen = refused(lambda: DepthTask(data, nn.Identity(), name="t"))
    assert seen.startswith("tasks.t.processor: missing")
    seen = refused(lambda: SegmentationTask(data, nn.Identity(), processor=mask, name="t"))
    assert seen.startswith("tasks.t.num_classes: missing")
    seen = refused(lambda: DepthTask(data.select([]), depth, name="t"))
    assert seen == "tasks.t.dataset: the split holds no samples."
    seen = refused(lambda: DepthTask(data, depth, scale=0.0, name="t"))
    assert "scale" in seen


def test_a_model_that_does_not_fit_is_told(
    data: Dataset, heads: dict[str, Path], tmp_path: Path, model: nn.Module
) -> None:
    depth = str(heads["depth"])
    PatchHead(5, 1, 2).save(tmp_path)
    seen = refused(lambda: DepthTask(data, str(tmp_path), processor=depth, name="t"), model)
    assert seen.startswith("tasks.t.head: it is for 5 features, 'model' has")

    class Pooled(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.mean(dim=(2, 3))

    seen = refused(lambda: DepthTask(data, depth, name="t"), Pooled())
    assert "'model', a Pooled, gives no features of patches" in seen


def test_an_ensemble_of_logits_has_classes_of_pixels(
    data: Dataset, heads: dict[str, Path], model: nn.Module
) -> None:
    two = ensemble_of({"a": model, "b": model}, [0.5, 0.5], "probabilities")
    alone = pool(data, heads).evaluate(model, CPU, ["segmentation"])["segmentation"]
    found = pool(data, heads).evaluate(two, CPU, ["segmentation"])["segmentation"]
    same(alone, found)
    seen = refused(lambda: DepthTask(data, str(heads["depth"]), name="t"), two)
    assert seen.startswith("tasks.t: it has no classes") and "method.of=outputs" in seen
    outputs = ensemble_of({"a": model, "b": model}, [0.5, 0.5], "outputs")
    depth = pool(data, heads).evaluate(model, CPU, ["depth"])["depth"]
    same(depth, pool(data, heads).evaluate(outputs, CPU, ["depth"])["depth"])


def test_the_image_is_resized_as_a_whole(heads: dict[str, Path], model: nn.Module) -> None:
    """The processor would cut off the sides of a wide image, whose pixels have targets."""
    wide = np.zeros((SIZE, 2 * SIZE, 3), dtype=np.uint8)
    wide[:, : SIZE // 2] = 255
    target = np.ones((SIZE, 2 * SIZE), dtype=np.float32)
    features = Features({"image": Image(), "depth": Array2D(target.shape, "float32")})
    data = Dataset.from_dict({"image": [png(wide)], "depth": [target]}, features=features)
    task = DepthTask(data, str(heads["depth"]), cache_size=0)
    task.prepare(CPU)
    pixels = task.preprocessor.pixels(task.images.image(0))
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels[:, :, 0].min() == 255 and pixels[:, :, -1].max() == 0
    found = TaskPool({"t": task}, cache=False).evaluate(model, CPU)["t"]
    assert found.statistics["rmse"][0, 1] == target.size


def test_images_and_targets_may_be_arrays(heads: dict[str, Path], model: nn.Module) -> None:
    """As of a dataset of NYUv2: channels first, numbers from 0 to 1, -1 for no class."""
    made = rows()
    images = np.moveaxis(made["image"], -1, 1).astype(np.float32) / 255
    mask = made["segmentation"].astype(np.int64)
    mask[mask == 255] = -1
    depth = made["depth"][:, None]
    features = Features(
        {
            "image": Array3D((3, SIZE, SIZE), "float32"),
            "segmentation": Array2D((SIZE, SIZE), "int64"),
            "depth": Array3D((1, SIZE, SIZE), "float32"),
        }
    )
    columns = {"image": list(images), "segmentation": list(mask), "depth": list(depth)}
    arrays = Dataset.from_dict(columns, features=features)
    pictures = {"image": [png(own) for own in made["image"]]}
    masks = {"segmentation": [png(own) for own in made["segmentation"]], "depth": list(depth)}
    types = Features({**features, "image": Image(), "segmentation": Image()})
    plain = Dataset.from_dict(pictures | masks, features=types)

    def scores(data: Dataset, ignored: int) -> list[SampleScores]:
        mask, depth = str(heads["segmentation"]), str(heads["depth"])
        tasks = {
            "s": SegmentationTask(data, mask, image_column="image", ignore_index=ignored),
            "d": DepthTask(data, depth, image_column="image"),
        }
        return list(TaskPool(tasks, cache=False).evaluate(model, CPU).values())

    for one, other in zip(scores(plain, 255), scores(arrays, -1), strict=True):
        same(one, other)


def test_a_depth_may_be_a_picture_of_16_bits(heads: dict[str, Path]) -> None:
    millimetres = np.array([[0, 1500], [65535, 7]], dtype=np.uint16)
    features = Features({"image": Image(), "depth": Image()})
    columns = {"image": [png(np.zeros((4, 4, 3), np.uint8))], "depth": [png(millimetres)]}
    task = DepthTask(
        Dataset.from_dict(columns, features=features), str(heads["depth"]), scale=0.001
    )
    task.prepare(CPU)
    assert task.target(task.images, 0).tolist() == [[0, 1.5], [65.535, 0.007]]


def test_a_palette_s_indices_are_the_classes(heads: dict[str, Path]) -> None:
    picture = PILImage.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    picture.putdata([2, 1])
    file = io.BytesIO()
    picture.save(file, format="PNG")
    columns = {
        "image": [png(np.zeros((4, 4, 3), np.uint8))],
        "segmentation": [{"bytes": file.getvalue(), "path": None}],
    }
    data = Dataset.from_dict(
        columns, features=Features({"image": Image(), "segmentation": Image()})
    )
    task = SegmentationTask(data, str(heads["segmentation"]))
    task.prepare(CPU)
    assert task.target(task.images, 0).tolist() == [[2, 1]]


def test_normals_may_be_bytes(heads: dict[str, Path]) -> None:
    stored = np.array([[[255, 0, 0], [0, 0, 0]]], dtype=np.uint8)
    columns = {"image": [png(np.zeros((4, 4, 3), np.uint8))], "normals": [png(stored)]}
    features = Features({"image": Image(), "normals": Image()})
    data = Dataset.from_dict(columns, features=features)
    task = NormalsTask(data, str(heads["normals"]), image_column="image")
    task.prepare(CPU)
    found = task.target(task.images, 0)
    assert found[:, 0, 0].tolist() == [1, -1, -1]
    assert found[:, 0, 1].tolist() == [0, 0, 0]
