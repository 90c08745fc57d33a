r"""RAM: add what one model alone has changed, and average what several have.

An element of a task vector is active where $|\tau_t| > \varepsilon$. With $c$ active models the
result is $\theta_0 + \frac{1}{c} \sum_{t\ \mathrm{active}} \tau_t$. RAM+ adds more of what one
model alone has changed, the more so the more of its changes it shares with others.

Reinforced Agent Merging, https://arxiv.org/abs/2601.13572
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between


@dataclass(eq=False)
class RAMAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus, at each element, the mean of the changes that are not tiny.

    Args:
        epsilon: changes of at most this magnitude count as none.
    """

    needs_pretrained = True
    elementwise = True

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_between("epsilon", self.epsilon, 0, math.inf)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the mean of the active changes."""
        assert base is not None
        total, count = torch.zeros_like(base), torch.zeros_like(base)
        for tensor in tensors:
            change = tensor - base
            active = change.abs() > self.epsilon
            total += change.mul_(active)
            count += active
        return total.div_(count.clamp_(min=1)).add_(base)


@dataclass(eq=False)
class RAMPlusAlgorithm(TensorwiseAlgorithm):
    r"""RAM with larger changes where one model alone is active, tensor by tensor.

    A model's own changes are scaled by $1 + r \min(s / u, \alpha)$: of its active elements, $s$
    are shared with other models and $u$ are its own alone.

    Args:
        epsilon: changes of at most this magnitude count as none.
        r: how much the scale grows with the shared part.
        alpha: the largest ratio of shared to own elements that counts.
    """

    needs_pretrained = True

    epsilon: float = 1e-5
    r: float = 0.1
    alpha: float = 0.2

    def __post_init__(self) -> None:
        for name in ("epsilon", "r", "alpha"):
            check_between(name, getattr(self, name), 0, math.inf)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the mean of shared changes and the scaled own ones."""
        assert base is not None
        count = torch.zeros_like(base)
        for tensor in tensors:
            count += (tensor - base).abs() > self.epsilon
        alone, total = count == 1, torch.zeros_like(base)
        for tensor in tensors:
            change = tensor - base
            active = change.abs() > self.epsilon
            own = int((active & alone).sum())
            shared = int(active.sum()) - own
            ratio = min(shared / own, self.alpha) if own else 0.0
            total += change.mul_(active).mul_(torch.where(alone, 1 + self.r * ratio, 1.0))
        return total.div_(count.clamp_(min=1)).add_(base)
