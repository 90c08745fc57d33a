from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from fixtures_scores import answers as predicted
from fixtures_scores import loss_sum, losses, num_right
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.results import SampleScores
from fusion_bench.taskpool.images.evaluate import BatchLimit, Loading, evaluate
from fusion_bench.taskpool.images.labelled import LabelledImages
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.tasks import Task

CPU = Fabric(accelerator="cpu", devices=1)
LABELS = [0, 1, 2, 1, 0, 2, 2]


@pytest.fixture(scope="module")
def images() -> PreparedImages:
    """Return pictures whose red is 10 times their number."""
    pictures = [Image.new("RGB", (4, 4), (10 * i, 0, 0)) for i in range(len(LABELS))]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x", "y", "z"])})
    data = Dataset.from_dict({"image": pictures, "label": LABELS}, features=features)
    processor = ViTImageProcessorPil(
        size={"height": 4, "width": 4}, do_normalize=False, rescale_factor=0.1
    )
    return PreparedImages(LabelledImages("t", data, Task()), Preprocessor(processor), 0)


def thirds(pixels: Tensor) -> Tensor:
    """Answer with an image's number modulo 3; its logit is 2, the others are 0."""
    answer = pixels[:, 0, 0, 0].round().long() % 3
    return 2 * torch.nn.functional.one_hot(answer, 3).float()


def evaluated(
    images: PreparedImages, samples: list[int] | None = None, **loading: Any
) -> SampleScores:
    chosen = np.arange(len(LABELS)) if samples is None else np.array(samples)
    return evaluate(
        CPU,
        thirds,
        images,
        chosen,
        Loading.for_device(loading, CPU),
        "evaluating",
    )


def test_answers_by_hand(images: PreparedImages) -> None:
    score = evaluated(images)
    assert score.details["labels"].tolist() == LABELS
    assert predicted(score) == [0, 1, 2, 0, 1, 2, 0]
    assert (num_right(score), score.num_samples) == (4, 7)
    right, wrong = (float(np.log(np.exp(2) + 2) - logit) for logit in (2, 0))
    assert losses(score) == pytest.approx([right] * 3 + [wrong] * 2 + [right, wrong])
    assert loss_sum(score) == pytest.approx(4 * right + 3 * wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_answers_are_in_the_datasets_order(
    images: PreparedImages, batch_size: int, ahead: int
) -> None:
    loading = Loading(batch_size, workers=3, ahead=ahead, pin_memory=False)
    score = evaluate(CPU, thirds, images, np.arange(7), loading, "evaluating")
    assert predicted(score) == [0, 1, 2, 0, 1, 2, 0]
    assert losses(score) == losses(evaluated(images))


def test_only_the_samples_asked_for(images: PreparedImages) -> None:
    score = evaluated(images, [2, 3, 5], batch_size=2)
    assert score.samples.tolist() == [2, 3, 5]
    assert score.details["labels"].tolist() == [2, 1, 2]
    assert predicted(score) == [2, 0, 2]


def test_full_batches_are_cut_again(images: PreparedImages) -> None:
    sizes = []

    def classify(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return thirds(pixels)

    loading = Loading(4, workers=1, ahead=0, pin_memory=False, full_batches=True)
    score = evaluate(CPU, classify, images, np.arange(7), loading, "evaluating")
    assert sizes == [4, 4]
    assert predicted(score) == [0, 1, 2, 0, 1, 2, 0]


def test_what_goes_wrong_in_a_thread_is_told(
    images: PreparedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(index: int) -> Any:
        raise FusionBenchError(f"sample {index}")

    monkeypatch.setattr(images, "pixels", broken)
    with pytest.raises(FusionBenchError, match="sample 0"):
        evaluated(images)


def test_arguments_of_a_data_loader_are_accepted(images: PreparedImages) -> None:
    usual = {
        "batch_size": 5,
        "num_workers": 8,
        "pin_memory": True,
        "persistent_workers": True,
        "shuffle": True,
        "drop_last": False,
        "prefetch_factor": 4,
        "timeout": 60,
    }
    assert predicted(evaluated(images, **usual)) == [0, 1, 2, 0, 1, 2, 0]


def test_what_is_not_given_suits_the_device() -> None:
    loading = Loading.for_device(None, CPU)
    assert loading.batch_size > 1 and loading.workers >= 1 and not loading.pin_memory
    assert Loading.for_device({"num_workers": 0}, CPU).workers == 1


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("batchsize", "batch_size"), ("nun_workers", "num_workers"), ("shufle", "shuffle")],
)
def test_an_unknown_argument_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(FusionBenchError, match=f"kwargs.{wrong}: .*Did you mean '{nearest}'"):
        Loading.for_device({wrong: 1}, CPU)


@pytest.mark.parametrize("size", [0, -1, None, "many"])
def test_a_batch_size_is_a_positive_number(size: Any) -> None:
    with pytest.raises(FusionBenchError, match=r"dataloader_kwargs\.batch_size"):
        Loading.for_device({"batch_size": size}, CPU)


def test_no_sample_may_be_dropped() -> None:
    with pytest.raises(FusionBenchError, match="would leave samples out"):
        Loading.for_device({"drop_last": True}, CPU)


# --- memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("full_batches", [False, True])
def test_where_memory_runs_out_the_batch_is_halved(
    images: PreparedImages, error: Exception, full_batches: bool
) -> None:
    tried = []

    def classify(pixels: Tensor) -> Tensor:
        tried.append(len(pixels))
        if len(pixels) > 2:
            raise error
        return thirds(pixels)

    room = BatchLimit()
    loading = Loading(6, workers=1, ahead=0, pin_memory=False, full_batches=full_batches)
    score = evaluate(CPU, classify, images, np.arange(7), loading, "evaluating", room)
    assert tried == ([6, 3, 1, 1, 1, 1, 1, 1, 1])
    assert room.most == 1
    assert predicted(score) == [0, 1, 2, 0, 1, 2, 0]
    assert losses(score) == losses(evaluated(images))

    tried.clear()  # what was learnt is remembered
    room.most = 2
    evaluate(CPU, classify, images, np.arange(7), loading, "evaluating", room)
    assert tried == ([2] * 4 if full_batches else [2, 2, 2, 1])


def test_without_memory_for_one_image_it_ends(images: PreparedImages) -> None:
    def classify(pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    loading = Loading(6, workers=1, ahead=0, pin_memory=False)
    with pytest.raises(EnvironmentProblem, match="evaluating a on b, one sample at a time"):
        evaluate(CPU, classify, images, np.arange(7), loading, "evaluating a on b")


def test_another_error_is_not_taken_for_want_of_memory(images: PreparedImages) -> None:
    def classify(pixels: Tensor) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    loading = Loading(6, workers=1, ahead=0, pin_memory=False)
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(CPU, classify, images, np.arange(7), loading, "evaluating")
