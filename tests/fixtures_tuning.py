"""Images few enough to learn from by hand, and models that answer them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.method.checks import BASE, TrainablePool
from fusion_bench.results import ACCURACY, SampleScores
from fusion_bench.weights import Weights, in_memory

CPU = Fabric(accelerator="cpu", devices=1)
Classify = Callable[[nn.Module], Callable[[Tensor], Tensor]]


class Images:
    """Images and labels as a method sees a task's data; ``drawn`` counts its batches."""

    def __init__(
        self, images: Any, labels: Any, classify: Classify = lambda module: module
    ) -> None:
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        self.classify = classify
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, count: int | None, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self), generator=random)[:count]

    def batches(self, samples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in samples.split(batch_size):
            self.drawn += 1
            yield self.images[part], self.labels[part]

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for turn in count():
            yield from self.batches(self.sample(None, 1000 * seed + turn), batch_size)

    metric = ACCURACY

    def evaluate(self, model: nn.Module) -> SampleScores:
        with torch.no_grad():
            answers = self.classify(model)(self.images).argmax(dim=-1).numpy()
        return SampleScores.classified(np.arange(len(self)), self.labels.numpy(), answers)


def linear(seed: int, inputs: int = 4, classes: int = 3) -> nn.Module:
    """Return a linear classifier with weights of a normal distribution."""
    random = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, classes)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    return module


def linear_models(names: str = "ab") -> dict[str, nn.Module]:
    """Return a base and models."""
    return {BASE: linear(0)} | {name: linear(ord(name)) for name in names}


def linear_data(names: str = "ab", size: int = 12) -> dict[str, Images]:
    """Return images for each of ``linear_models``."""
    data = {}
    for name in names:
        random = torch.Generator().manual_seed(ord(name))
        labels = torch.randint(0, 3, (size,), generator=random)
        data[name] = Images(torch.randn(size, 4, generator=random), labels)
    return data


def fused(method: Any, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the entries of the model that a method makes without data."""
    return dict(method.run(models))


def learned(
    method: Any, models: Mapping[str, nn.Module], data: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the entries of the model that a method makes."""
    result = method.run(TrainablePool(models), CPU, data)
    assert isinstance(result, Weights)
    return in_memory(result)
