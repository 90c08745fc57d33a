r"""SCE: select by variance, weigh by energy, erase minority signs.

Per tensor: keep the elements whose task vectors vary most between the models, weigh each model by
the mean square of what is kept, and average where the signs agree with that of the sum.
Wan et al., FuseChat, https://arxiv.org/abs/2408.07990
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between
from fusion_bench.weights import Inputs, MergePiece, same_for_all
from fusion_bench.weights.matrices import inner_products
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import products


@dataclass(eq=False)
class SCEAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus a mean of the task vectors, weighted towards larger changes.

    Args:
        select_topk: the share of the varying elements to keep, from 0 to 1.
    """

    needs_pretrained = True

    select_topk: float = 1.0

    def __post_init__(self) -> None:
        check_between("select_topk", self.select_topk, 0, 1)
        self.elementwise = self.select_topk == 1

    def merger(self, inputs: Inputs) -> MergePiece:
        """Compute the models' weights in each entry, entry by entry if elements are selected."""
        if self.select_topk < 1:
            return same_for_all(self.merge_tensor)
        energies = {k: own.diagonal() for k, own in products(inputs, task_vectors).items()}

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            vectors = list(task_vectors(key, start, tensors, base))
            return _of_majority(vectors, energies[key]).add_(base)

        return merge

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus what the selected elements give."""
        assert base is not None
        vectors = [tensor - base for tensor in tensors]
        selected = self._selected(vectors)
        for vector in vectors:
            vector.mul_(selected)
        return _of_majority(vectors, inner_products(vectors).diagonal()).add_(base)

    def _selected(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """Return 1 where elements vary most between the models, the first of equal ones; else 0."""
        variance = torch.stack(list(task_vectors)).double().var(dim=0, correction=0).flatten()
        count = int(self.select_topk * int((variance > 0).sum()))
        kept = torch.zeros_like(task_vectors[0]).view(-1)
        kept[variance.argsort(descending=True, stable=True)[:count]] = 1
        return kept.view(task_vectors[0].shape)


def _of_majority(vectors: Sequence[Tensor], energy: Tensor) -> Tensor:
    """Return the mean, by energy, of the values that have the sum's sign; they are written to."""
    total = energy.sum()
    weights = energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))
    sign = sum(vectors[1:], vectors[0]).sign()
    sign += 1 - sign.abs()  # a sum of 0 counts as positive
    merged, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, share in zip(vectors, weights.tolist(), strict=True):
        agreeing = vector.mul_(sign).clamp_(min=0)
        merged.add_(agreeing, alpha=share)
        weight.add_(agreeing.sign_(), alpha=share)
    return merged.div_(weight.masked_fill_(weight == 0, 1)).mul_(sign)
