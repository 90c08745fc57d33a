r"""SCE: select by variance, weigh by energy, erase minority signs.

Per tensor: keep the elements whose task vectors vary most between the models, weigh each model by
the mean square of what is kept, and average where the signs agree with that of the sum.
Wan et al., FuseChat, https://arxiv.org/abs/2408.07990
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.errors import check_between
from fusion_bench.method.base import TensorwiseAlgorithm


class SCEAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus a mean of the task vectors that follows the larger changes.

    Args:
        select_topk: the share of the varying elements to keep, from 0 to 1.
        show_pbar: show a progress bar.
        inplace: write to the pretrained module, of modules given as a dict.
    """

    needs_pretrained = True

    def __init__(self, select_topk: float = 1.0, show_pbar: bool = True, inplace: bool = False):
        check_between("method.select_topk", select_topk, 0, 1)
        self.select_topk = select_topk
        self.show_pbar = show_pbar
        self.inplace = inplace

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the merged task vector."""
        assert base is not None
        task_vectors = torch.stack([tensor - base for tensor in tensors])
        if self.select_topk < 1:
            task_vectors *= self._selected(task_vectors)
        energy = task_vectors.double().square().view(len(tensors), -1).mean(dim=1)
        total = energy.sum()
        weights = energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))
        weights = weights.to(task_vectors.dtype).view(-1, *[1] * base.ndim)
        positive = task_vectors.sum(dim=0) >= 0
        agreeing = weights * torch.where(positive, task_vectors > 0, task_vectors < 0)
        weight = agreeing.sum(dim=0)
        merged = (agreeing * task_vectors).sum(dim=0)
        return base + torch.where(weight > 0, merged / weight, merged)

    def _selected(self, task_vectors: Tensor) -> Tensor:
        """Return which elements vary most between the models, the first of equal ones."""
        variance = task_vectors.double().var(dim=0, correction=0).flatten()
        count = int(self.select_topk * int((variance > 0).sum()))
        kept = torch.zeros_like(variance, dtype=torch.bool)
        kept[variance.argsort(descending=True, stable=True)[:count]] = True
        return kept.view(task_vectors.shape[1:])
