"""Models of one weight, to merge by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BASE = "_pretrained_"


def module(values: Any) -> nn.Module:
    """Return a module whose parameter `weight` has these values."""
    result = nn.Module()
    result.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))
    return result


def merged(method: Any, models: Mapping[str, Any] | Sequence[Any], base: Any = None) -> Tensor:
    """Merge models given by their values; return the merged `weight`."""
    named = models if isinstance(models, Mapping) else dict(zip("abcdefgh", models, strict=False))
    pool = {name: module(values) for name, values in named.items()}
    if base is not None:
        pool = {BASE: module(base), **pool}
    result: Tensor = method.run(pool)["weight"]
    return result
