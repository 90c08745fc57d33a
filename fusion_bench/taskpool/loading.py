"""How samples come to a model, and how many at once."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fusion_bench.problems import EnvironmentProblem, FusionBenchError, did_you_mean

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
                f"Out of memory while {description}, one sample at a time. Choose another device "
                "(fabric.accelerator=cpu) or a smaller number format "
                "(fabric.precision=bf16-true), or end what else uses it."
            )
        self.most = tried // 2
        log.warning("Out of memory while %s: now %d samples at a time.", description, self.most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def agree(self, fabric: Fabric) -> None:
        """Let all processes use the smallest limit among them; each must call this."""
        if fabric.world_size > 1:
            own = torch.tensor(self.most or 2**31, device=fabric.device)
            least = int(cast(Tensor, fabric.all_reduce(own, reduce_op="min")))
            self.most = None if least == 2**31 else least
