r"""TALL masks: $\theta_t = \theta_0 + m_t \odot \tau$ with $\tau = \sum_t \tau_t$.

The mask $m_t$ is 1 where $|\tau_t| > \lambda |\tau - \tau_t|$: where the task's own change
outweighs the others'. Consensus merging keeps in one model what several tasks need,
$\theta = \theta_0 + \alpha\,[\sum_t m_t \ge k] \odot \tau$.
Wang et al., Localizing task information, https://arxiv.org/abs/2405.07813
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.problems import FusionBenchError, check_between
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.ops import task_vectors


@dataclass(eq=False)
class TallMaskTaskArithmeticAlgorithm(TensorwiseAlgorithm):
    """A model for each task: the pretrained model plus the masked sum of all task vectors.

    Args:
        tall_mask_lambda: a larger value keeps fewer elements in a mask: one for all, one for each
            model by name, or a list in the pool's order.
        debug: no effect; kept because configs of FusionBench have it.
        verbose: no effect.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    tall_mask_lambda: PerModel = 0.6
    debug: int = 0
    verbose: int = 0

    def __post_init__(self) -> None:
        check_each_between("tall_mask_lambda", self.tall_mask_lambda, 0, math.inf)

    def merger(self, inputs: Inputs) -> Mapping[str, MergePiece]:
        """Return the merge function of each task's model by name."""
        factors = of_each(self.tall_mask_lambda, inputs.names)
        tasks = zip(inputs.names, range(len(factors)), factors, strict=True)
        return {name: partial(_merge, task, factor) for name, task, factor in tasks}


@dataclass(eq=False)
class ConsensusTaskArithmetic(TensorwiseAlgorithm):
    """Task arithmetic on elements in several tasks' masks; elsewhere the pretrained model.

    Args:
        scaling_factor: scaling factor of the change.
        tall_mask_lambda: a larger value keeps fewer elements in a task's mask, in the same forms.
        k: how many tasks must keep an element; 0 keeps all, as task arithmetic does.

    Raises:
        FusionBenchError: from ``run``: a ``k`` larger than the number of models.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    scaling_factor: float = 0.3
    tall_mask_lambda: PerModel = 0.6
    k: int = 2

    def __post_init__(self) -> None:
        check_each_between("tall_mask_lambda", self.tall_mask_lambda, 0, math.inf)
        check_between("k", self.k, 0, math.inf)
        self.k = math.ceil(self.k)

    def check(self, inputs: Inputs) -> None:
        """Refuse a consensus of more tasks than there are."""
        if self.k > len(inputs.names):
            raise FusionBenchError(
                f"{self.k} is more than the number of models, {len(inputs.names)}. Add models or "
                "choose a smaller k.",
                place=("k",),
            )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds the sum of the changes where enough masks agree."""
        factors = of_each(self.tall_mask_lambda, inputs.names)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            total = _total(tensors, base)
            surplus = torch.full_like(base, 1 - self.k)
            vectors = task_vectors(key, start, tensors, base)
            for vector, factor in zip(vectors, factors, strict=True):
                surplus.add_(_tall_mask(vector, total, factor))
            return surplus.clamp_(0, 1).mul_(total).mul_(self.scaling_factor).add_(base)

        return merge


def _merge(
    task: int,
    factor: float,
    key: str,
    start: int,
    tensors: Sequence[Tensor],
    base: Tensor | None,
) -> Tensor:
    assert base is not None
    total = _total(tensors, base)
    return _tall_mask(tensors[task] - base, total, factor).mul_(total).add_(base)


def _total(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    total = torch.zeros_like(base)
    for vector in task_vectors("", 0, tensors, base):
        total.add_(vector)
    return total


def _tall_mask(vector: Tensor, total: Tensor, weight: float) -> Tensor:
    """Return 1 where ``vector`` outweighs the rest of ``total``, else 0; ``vector`` is used up."""
    others = (total - vector).abs_().mul_(weight)
    return vector.abs_().sub_(others).sign_().clamp_(min=0)
