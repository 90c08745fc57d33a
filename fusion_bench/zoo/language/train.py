"""What both kinds of training share: batches, optimizers and steps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from fusion_bench.zoo.language.models import matrices
from fusion_bench.zoo.train import _rates, _step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
"""What a model is called with: token ids, attention mask and labels, a row for each sample."""

IGNORED = -100
"""The label of what the loss does not count."""


def some(samples: Batch, count: int, generator: torch.Generator) -> Batch:
    """Return samples drawn with replacement, without the columns that are padding in all."""
    mask = samples["attention_mask"]
    rows = torch.randint(len(mask), (count,), generator=generator)
    used = int(mask[rows].sum(dim=1).max())
    return {
        # a decoder's labels have a length of their own
        name: values[rows][:, :used] if values.shape == mask.shape else values[rows]
        for name, values in samples.items()
    }


def optimizers(model: "PreTrainedModel", rate: float) -> list[Optimizer]:
    """Return what pretrains a model: Muon for the layers' matrices, AdamW for the rest.

    T5 divides no product of queries and keys by a root of the width, so its queries take smaller
    steps. What it knows of positions are single numbers, which have a long way to go.
    """
    layers = matrices(model)
    rest = {name: value for name, value in model.named_parameters() if name not in layers}
    queries = [layers.pop(name) for name in list(layers) if name.endswith(".q.weight")]
    biases = [rest.pop(name) for name in list(rest) if "relative_attention_bias" in name]
    found: list[Optimizer] = [
        Muon(list(layers.values()), lr=0.02, weight_decay=0.01),
        AdamW(list(rest.values()), lr=rate, weight_decay=0),
    ]
    if queries:
        found += [Muon(queries, lr=0.004, weight_decay=0.01), AdamW(biases, lr=0.3, weight_decay=0)]
    return found


def fit(optimizers: Sequence[Optimizer], steps: int, loss: Callable[[], Tensor]) -> None:
    """Take steps along the gradients of ``loss``, which draws its own batches."""
    for rate in _rates(steps):
        _step(optimizers, loss(), rate)
