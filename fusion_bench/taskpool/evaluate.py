"""The loop that judges an image classifier: exact counts on any number of processes."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset

from fusion_bench.errors import FusionBenchError
from fusion_bench.progress import bar


@dataclass(frozen=True)
class Score:
    """How a model did on a task: plain sums, from which every figure follows.

    ``loss_sum`` is the sum over the samples of the cross entropy, in nats.
    """

    num_correct: int
    loss_sum: float
    num_samples: int


def loader_arguments(given: Mapping[str, Any] | None, fabric: Fabric) -> dict[str, Any]:
    """Return the DataLoader's arguments: those ``given``, else ones that suit the device.

    Raises:
        FusionBenchError: ``drop_last``, with which some samples would go unjudged.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arguments = {
        "batch_size": 32 if fabric.device.type == "cpu" else 128,
        "num_workers": min(8, max(1, (cores or 1) // fabric.world_size)),
        "pin_memory": fabric.device.type == "cuda",
    } | dict(given or {})
    if arguments.get("drop_last"):
        raise FusionBenchError(
            "taskpool.dataloader_kwargs.drop_last: would leave samples unjudged. Remove it."
        )
    if arguments["num_workers"] and sys.platform == "linux":
        # A worker that is spawned imports torch again, for each task of each model.
        arguments.setdefault("multiprocessing_context", "fork")
    return arguments | {"shuffle": False}


def judge(
    fabric: Fabric,
    encoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    data: Dataset[tuple[Tensor, int]],
    loader: Mapping[str, Any],
    description: str,
    num_samples: int,
) -> Score:
    """Count correct answers and sum losses over the first ``num_samples`` of ``data``.

    Each process takes every n-th sample, none twice, so that the counts do not depend on the
    number of processes. All processes return the same score.
    """
    mine = range(fabric.global_rank, num_samples, fabric.world_size)
    batches = DataLoader(Subset(data, mine), **loader)
    precision = fabric.strategy.precision
    correct, losses = [], []  # kept on the device: reading them would wait for it at every batch
    with torch.inference_mode():
        for images, labels in bar(batches, description, unit="batch"):
            images = precision.convert_input(images.to(fabric.device, non_blocking=True))
            labels = labels.to(fabric.device, non_blocking=True)
            with fabric.autocast():
                pooled = encoder(images).pooler_output
            logits = head(pooled)
            correct.append(logits.argmax(dim=-1) == labels)
            losses.append(cross_entropy(logits, labels, reduction="none"))
    # A process may have had no sample at all.
    num_correct = sum(int(right.sum()) for right in correct)
    loss_sum = sum(float(loss.cpu().double().sum()) for loss in losses)
    return Score(
        num_correct=int(_total(fabric, num_correct, torch.int64)),
        loss_sum=float(_total(fabric, loss_sum, torch.float64)),
        num_samples=num_samples,
    )


def _total(fabric: Fabric, value: float, dtype: torch.dtype) -> Tensor:
    """Add up one number over the processes, exactly for integers."""
    device = fabric.device if fabric.world_size > 1 else "cpu"  # some devices have no float64
    mine = torch.tensor(value, dtype=dtype, device=device)
    return cast(Tensor, fabric.all_reduce(mine, reduce_op="sum"))
