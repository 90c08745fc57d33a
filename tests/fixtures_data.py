"""What methods learn from, at hand: tensors as a task's data, and the small CLIP family's tasks."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.checks import TrainablePool
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.results import ACCURACY, SampleScores
from fusion_bench.taskpool import CLIPVisionModelTaskPool, TuningImages
from fusion_bench.weights import in_memory

Array = NDArray[np.float64]
CPU = Fabric(accelerator="cpu", devices=1)


class Task:
    """Inputs and labels as a method sees a task's data; what a module returns are logits."""

    def __init__(self, inputs: Any, labels: Any = None):
        self.inputs = torch.as_tensor(inputs)
        self.labels = torch.zeros(len(self.inputs)) if labels is None else torch.as_tensor(labels)
        self.labels = self.labels.long()

    def classify(self, module: nn.Module) -> nn.Module:
        return module

    def __len__(self) -> int:
        return len(self.inputs)

    def sample(self, count: int | None, seed: int = 0) -> Tensor:
        if count is None or count >= len(self):
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]

    def batches(self, samples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            yield self.inputs[part], self.labels[part]

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for turn in count(seed):
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(turn))
            yield from self.batches(order, batch_size)

    metric = ACCURACY

    def evaluate(self, model: nn.Module) -> SampleScores:
        with torch.no_grad():
            answers = model(self.inputs).argmax(dim=1).numpy()
        return SampleScores.classified(np.arange(len(self)), self.labels.numpy(), answers)


def linear(weight: Any, bias: Any = None) -> nn.Linear:
    """Return a linear layer of these values, outputs first."""
    values = torch.as_tensor(weight)
    values = values if values.dtype == torch.float64 else values.float()
    layer = nn.Linear(values.shape[1], values.shape[0], bias is not None, dtype=values.dtype)
    layer.weight = nn.Parameter(values)
    if bias is not None:
        layer.bias = nn.Parameter(torch.as_tensor(bias).to(values))
    return layer


def normal(*shape: int, seed: int) -> Tensor:
    """Return random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regmean(weights: Sequence[Array], inputs: Sequence[Array], ratio: float) -> Array:
    """Return a layer's merged weight, straight from RegMean's formula, in float64."""
    left, right = np.zeros(()), np.zeros(())
    for weight, rows in zip(weights, inputs, strict=True):
        gram = rows.T @ rows / len(rows)
        reduced = ratio * gram + (1 - ratio) * np.diag(np.diag(gram))
        left, right = left + reduced, right + reduced @ weight.T
    return np.asarray(np.linalg.solve(left, right).T, np.float64)


def learned(
    method: Any, modules: Mapping[str, nn.Module], data: Mapping[str, Task]
) -> dict[str, Tensor]:
    """Return what a method that learns from data makes of modules."""
    return in_memory(method.run(TrainablePool(modules), CPU, data))


def clip_family(
    family: Path,
    config: Mapping[str, Any],
    split: str = "train",
    dtype: torch.dtype | None = None,
) -> tuple[CLIPVisionModelPool, CLIPVisionModelTaskPool, dict[str, TuningImages]]:
    """Return the small CLIP family's pools, and a split of its tasks to learn from.

    ``config`` is the fixture ``program_config``. With a ``dtype`` the models are in memory, in it.
    """
    pool = instantiate({"_recursive_": False, **config["modelpool"]})
    if dtype is not None:
        names = ["_pretrained_", *pool.model_names]
        pool = CLIPVisionModelPool({name: pool.load_model(name).to(dtype) for name in names})
    tasks = instantiate({"_recursive_": False, **config["taskpool"]})
    datasets = {
        name: {
            "_target_": "datasets.load_dataset",
            "path": str(family / "datasets" / name),
            "split": split,
        }
        for name in pool.model_names
    }
    return pool, tasks, tasks.tuning(datasets, CPU, ("modelpool", "train_datasets"))
