"""The loop over a dataset's images: the same scores on any number of processes."""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_bench.memory import out_of_memory
from fusion_bench.progress import bar
from fusion_bench.results import SampleScores
from fusion_bench.taskpool.images.labelled import LabelledImages
from fusion_bench.taskpool.images.pixels import PreparedImages
from fusion_bench.taskpool.loading import BatchLimit, Loading

#: The name of what is measured, to its shape for one sample and its dtype.
Measured = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def evaluate(
    fabric: Fabric,
    classify: Callable[[Tensor], Tensor],
    images: PreparedImages,
    samples: NDArray[np.int64],
    loading: Loading,
    description: str,
    batch_limit: BatchLimit | None = None,
) -> SampleScores:
    """Return the scores of ``classify``, images to logits, on some of the samples.

    Args:
        fabric: gives device, precision and processes.
        classify: the classifier.
        images: the images.
        samples: which of them are evaluated, in ascending order.
        loading: how they come to the model.
        description: what is being done, for messages.
        batch_limit: how many images fit into memory at once.

    Raises:
        EnvironmentProblem: there is not even memory for one image.
    """
    assert isinstance(images.data, LabelledImages)
    labels = images.data.labels[samples]
    targets = torch.from_numpy(labels).to(fabric.device)

    def measure(logits: Tensor, places: Tensor) -> dict[str, Tensor]:
        losses = cross_entropy(logits, targets[places], reduction="none")
        return {"predictions": logits.argmax(dim=-1), "losses": losses}

    wanted: Measured = {"predictions": ((), torch.int64), "losses": ((), torch.float32)}
    found = measured(
        fabric, classify, measure, wanted, images, samples, loading, description, batch_limit
    )
    return SampleScores.classified(samples, labels, **found)


def measured(
    fabric: Fabric,
    predict: Callable[[Tensor], Tensor],
    measure: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    wanted: Measured,
    images: PreparedImages,
    samples: NDArray[np.int64],
    loading: Loading,
    description: str,
    batch_limit: BatchLimit | None = None,
) -> dict[str, NDArray[Any]]:
    """Return what is measured of a model's outputs for each of some samples.

    Each process takes every n-th sample, none twice, and the values are put together by their
    place: counts do not depend on the number of processes, and losses only in their last bits, in
    which a batch's composition may show. All return the same.

    Args:
        fabric: gives device, precision and processes.
        predict: images to outputs, which become float32.
        measure: a batch's outputs, and the places of its samples in ``samples``, to what is wanted.
        wanted: what is measured.
        images: the images.
        samples: which of them are evaluated.
        loading: how they come to the model.
        description: what is being done, for messages.
        batch_limit: how many images fit into memory at once.

    Raises:
        EnvironmentProblem: there is not even memory for one image.
    """
    batch_limit = batch_limit or BatchLimit()
    mine = np.arange(fabric.global_rank, len(samples), fabric.world_size)
    values = {
        name: torch.zeros(len(samples), *shape, dtype=dtype, device=fabric.device)
        for name, (shape, dtype) in wanted.items()
    }
    steps = [mine[i : i + loading.batch_size] for i in range(0, len(mine), loading.batch_size)]
    loaded = batches(images, [samples[step] for step in steps], loading)

    def of(pixels: Tensor, places: Tensor) -> Mapping[str, Tensor]:
        count = len(pixels)
        pixels = images.preprocessor.finish(pixels.to(fabric.device, non_blocking=True))
        pixels = fabric.strategy.precision.convert_input(pixels)
        if loading.full_batches:
            pixels = _filled(pixels, batch_limit.size(loading.batch_size))
        with fabric.autocast():
            outputs = predict(pixels).float()[:count]
        return measure(outputs, places)

    with torch.inference_mode(), closing(loaded):
        shown = bar(loaded, "", total=len(steps), unit="batches")
        for step, pixels in zip(steps, shown, strict=True):
            done = 0
            while done < len(step):
                part = step[done : done + batch_limit.size(loading.batch_size)]
                rows = torch.from_numpy(part).to(fabric.device, non_blocking=True)
                found = None
                try:
                    found = of(pixels[done : done + len(part)], rows)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                if found is None:  # only here nothing holds on to what the model had computed
                    batch_limit.halve(len(part), description)
                    continue
                # Nothing is read back here: that would wait for the device at every batch.
                for name, own in found.items():
                    values[name][rows] = own
                done += len(part)
    batch_limit.agree(fabric)
    return {name: _gathered(fabric, own).cpu().numpy() for name, own in values.items()}


def _filled(pixels: Tensor, size: int) -> Tensor:
    return torch.cat([pixels, pixels[:1].expand(size - len(pixels), *pixels.shape[1:])])


def _gathered(fabric: Fabric, values: Tensor) -> Tensor:
    """Put the processes' values together; where one has a value all others have zero."""
    total = fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def batches(
    images: PreparedImages, steps: Sequence[NDArray[np.int64]], loading: Loading
) -> Generator[Tensor, None, None]:
    """Yield the pixels of each batch, prepared by threads; Pillow lets them run side by side."""
    with ThreadPoolExecutor(loading.workers, thread_name_prefix="decode") as pool:

        def read(part: NDArray[np.int64]) -> list[NDArray[Any]]:
            return [images.pixels(int(index)) for index in part]

        def begin(step: NDArray[np.int64]) -> list[Future[list[NDArray[Any]]]]:
            # An image that is known is read faster than it is handed to a thread alone.
            return [pool.submit(read, part) for part in np.array_split(step, loading.workers)]

        try:
            waiting = [begin(step) for step in steps[: loading.ahead]]
            for step in steps[loading.ahead :]:
                waiting.append(begin(step))
                yield _collated(waiting.pop(0), loading.pin_memory)
            for batch in waiting:
                yield _collated(batch, loading.pin_memory)
        finally:
            pool.shutdown(cancel_futures=True)


def _collated(futures: list[Future[list[NDArray[Any]]]], pin_memory: bool) -> Tensor:
    batch = torch.from_numpy(np.stack([pixels for part in futures for pixels in part.result()]))
    return batch.pin_memory() if pin_memory else batch
