"""The loop that evaluates an image classifier: the same answers on any number of processes."""

import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_bench.memory import out_of_memory
from fusion_bench.problems import EnvironmentProblem, FusionBenchError, did_you_mean
from fusion_bench.progress import bar
from fusion_bench.taskpool.pixels import PreparedImages
from fusion_bench.taskpool.results import Score

log = logging.getLogger(__name__)

#: Arguments of torch's DataLoader that mean something here, and those that need not.
_USED = ("batch_size", "num_workers", "prefetch_factor", "pin_memory")
_IGNORED = (
    "shuffle",
    "persistent_workers",
    "timeout",
    "multiprocessing_context",
    "pin_memory_device",
    "drop_last",
    "sampler",
    "batch_sampler",
    "collate_fn",
    "worker_init_fn",
    "generator",
    "in_order",
)


@dataclass(frozen=True)
class Loading:
    """How images come to the model.

    Attributes:
        batch_size: images a batch.
        workers: threads that decode images.
        ahead: batches that are prepared while the model works on another.
        pin_memory: whether batches lie where a GPU copies from by itself.
        full_batches: fill up the last batch, for a compiled model compiles each size anew.
    """

    batch_size: int
    workers: int
    ahead: int
    pin_memory: bool
    full_batches: bool = False

    @classmethod
    def for_device(cls, given: Mapping[str, Any] | None, fabric: Fabric) -> "Loading":
        """Return what ``given``, arguments of a ``DataLoader``, asks for, else what suits.

        On a CPU images are decoded between batches, not beside them: model and decoder would only
        take the cores from each other.

        Raises:
            FusionBenchError: as ``check_loading``.
        """
        given = dict(given or {})
        check_loading(given)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        on_cpu = fabric.device.type == "cpu"
        if on_cpu:  # where several jobs share a machine each has so many threads
            cores = min(cores or 1, torch.get_num_threads())
        workers = given.get("num_workers", min(16, max(1, (cores or 1) // fabric.world_size)))
        ahead = given.get("prefetch_factor") or 2
        batch_size = given.get("batch_size", 32 if on_cpu else 128)
        return cls(
            batch_size=batch_size,
            workers=max(1, workers),
            ahead=0 if on_cpu else ahead,
            pin_memory=given.get("pin_memory", True) and fabric.device.type == "cuda",
        )


def check_loading(given: Mapping[str, Any]) -> None:
    """Refuse what cannot be asked of the loading of images; ``given`` is as in ``Loading``.

    Raises:
        FusionBenchError: an unknown argument, an impossible number, or ``drop_last``, which would
            leave samples out.
    """
    for name in given:
        if name not in (*_USED, *_IGNORED):
            raise FusionBenchError(
                "there is no such argument.",
                did_you_mean(name, (*_USED, *_IGNORED)),
                place=("dataloader_kwargs", name),
            )
    if given.get("drop_last"):
        raise FusionBenchError(
            "would leave samples out. Remove it.", place=("dataloader_kwargs", "drop_last")
        )
    for name, least in {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1}.items():
        value = given.get(name, least)
        if name == "prefetch_factor" and value is None:
            continue
        if type(value) is not int or value < least:
            raise FusionBenchError(
                f"'{value}' is not {least} or more.", place=("dataloader_kwargs", name)
            )


class BatchLimit:
    """How many images fit into memory at once: fewer, each time that it runs out.

    Attributes:
        most: as many, as far as is known; ``None`` where memory never ran out.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def size(self, wanted: int) -> int:
        """Return how many of ``wanted`` images to take at once."""
        return wanted if self.most is None else min(wanted, self.most)

    def halve(self, tried: int, description: str) -> None:
        """Take half as many as did not fit.

        Raises:
            EnvironmentProblem: it was a single one.
        """
        if tried == 1:
            raise EnvironmentProblem(
                f"Out of memory while {description}, one image at a time. Choose another device "
                "(fabric.accelerator=cpu) or a smaller number format "
                "(fabric.precision=bf16-true), or end what else uses it."
            )
        self.most = tried // 2
        log.warning("Out of memory while %s: now %d images at a time.", description, self.most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def agree(self, fabric: Fabric) -> None:
        """Let all processes use the smallest limit among them; each must call this."""
        if fabric.world_size > 1:
            own = torch.tensor(self.most or 2**31, device=fabric.device)
            least = int(cast(Tensor, fabric.all_reduce(own, reduce_op="min")))
            self.most = None if least == 2**31 else least


def evaluate(
    fabric: Fabric,
    classify: Callable[[Tensor], Tensor],
    images: PreparedImages,
    samples: NDArray[np.int64],
    loading: Loading,
    description: str,
    batch_limit: BatchLimit | None = None,
) -> Score:
    """Return the answers of ``classify``, images to logits, on some of the samples.

    Each process takes every n-th sample, none twice, and the answers are put together by their
    place: the counts do not depend on the number of processes, and the losses only in their last
    bits, in which a batch's composition may show. All return the same score.

    Raises:
        EnvironmentProblem: there is not even memory for one image.
    """
    batch_limit = batch_limit or BatchLimit()
    labels = images.labels[samples]
    mine = np.arange(fabric.global_rank, len(samples), fabric.world_size)
    predictions = torch.zeros(len(samples), dtype=torch.int64, device=fabric.device)
    losses = torch.zeros(len(samples), dtype=torch.float32, device=fabric.device)
    targets = torch.from_numpy(labels).to(fabric.device)
    steps = [mine[i : i + loading.batch_size] for i in range(0, len(mine), loading.batch_size)]
    loaded = batches(images, [samples[step] for step in steps], loading)

    def logits_of(pixels: Tensor) -> Tensor:
        count = len(pixels)
        pixels = images.preprocessor.finish(pixels.to(fabric.device, non_blocking=True))
        pixels = fabric.strategy.precision.convert_input(pixels)
        if loading.full_batches:
            pixels = _filled(pixels, batch_limit.size(loading.batch_size))
        with fabric.autocast():
            return classify(pixels).float()[:count]

    with torch.inference_mode(), closing(loaded):
        shown = bar(loaded, description, total=len(steps), unit="batch")
        for step, pixels in zip(steps, shown, strict=True):
            done = 0
            while done < len(step):
                part = step[done : done + batch_limit.size(loading.batch_size)]
                logits = None
                try:
                    logits = logits_of(pixels[done : done + len(part)])
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                if logits is None:  # only here nothing holds on to what the model had computed
                    batch_limit.halve(len(part), description)
                    continue
                # Nothing is read back here: that would wait for the device at every batch.
                rows = torch.from_numpy(part).to(fabric.device, non_blocking=True)
                predictions[rows] = logits.argmax(dim=-1)
                losses[rows] = cross_entropy(logits, targets[rows], reduction="none")
                done += len(part)
    batch_limit.agree(fabric)
    return Score(
        samples=samples,
        labels=labels,
        predictions=_gathered(fabric, predictions).cpu().numpy(),
        losses=_gathered(fabric, losses).cpu().numpy(),
    )


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
