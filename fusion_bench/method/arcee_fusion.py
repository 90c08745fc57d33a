r"""Arcee Fusion: take over the changes that matter most, and leave the others.

The importance of an element is its change times how far the softmax $\sigma$ of its row moves,
$|\tau| \cdot \mathrm{KL}(\sigma(\theta_1) \,\|\, \sigma(\theta_0))$.
Changes whose importance is at least the median plus 1.5 times the interquartile range are kept.

Arcee AI, Arcee Fusion, 2024, as published with mergekit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.geometry import refuse_all_but_two
from fusion_bench.weights import Inputs

#: Of larger tensors the quantiles are those of so many elements, evenly spread.
_SAMPLE = 1_000_000


@dataclass(eq=False)
class ArceeFusionAlgorithm(TensorwiseAlgorithm):
    """The pretrained model with those of another model's changes that stand out, tensor by tensor.

    A row lies along the last dimension. The limit is computed of each tensor; of one with more than
    a million elements from a million of them, evenly spread.
    """

    needs_pretrained = True

    def check(self, inputs: Inputs) -> None:
        """Refuse any number of models except two."""
        refuse_all_but_two(inputs, "Arcee Fusion")

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the changes of the largest importance."""
        assert base is not None
        if base.numel() == 0:
            return base.clone()
        change = tensors[0] - base
        importance = change.abs() * _divergence(tensors[0], base)
        return base + change * (importance >= _limit(importance))


def _divergence(of: Tensor, to: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each row's softmax, to multiply with the row."""
    dimension = -1 if of.ndim else 0
    logs, others = (torch.log_softmax(tensor, dimension) for tensor in (of, to))
    return (logs.exp() * (logs - others)).sum(dimension, keepdim=bool(of.ndim))


def _limit(importance: Tensor) -> float:
    """Return the median plus 1.5 times the interquartile range."""
    values = importance.flatten()
    if values.numel() > _SAMPLE:
        places = torch.linspace(0, values.numel() - 1, _SAMPLE, dtype=torch.float64).long()
        values = values[places.to(values.device)]
    low, median, high = np.quantile(values.double().cpu().numpy(), (0.25, 0.5, 0.75))
    return float(median + 1.5 * (high - low))
