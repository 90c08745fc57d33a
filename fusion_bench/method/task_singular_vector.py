r"""TSV-Merge: $\tau = U_\perp \Sigma V_\perp^\top$ from the task vectors' largest singular values.

From each of $T$ task vectors, the largest $1/T$ of the singular triplets are kept. The concatenated
vectors of all tasks are made orthonormal, so tasks no longer interfere. Gargiulo et al., Task
singular vectors, https://arxiv.org/abs/2412.00081
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.weights import Inputs, MergePiece, same_for_all
from fusion_bench.weights.matrices import is_matrix, orthogonal_product, svd
from fusion_bench.weights.ops import add_scaled, task_vectors


@dataclass(eq=False)
class TaskSingularVectorMerging(TensorwiseAlgorithm):
    """The pretrained model plus the main directions of the task vectors, made orthogonal.

    Entries that are not matrices, or too small for one direction per model, get the mean task
    vector.

    Args:
        alpha: scaling factor of the change; a list, or a mapping of names, has a factor for each
            model's task vector.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
        return_single_task_models: also return each model with only those directions of its task
            vector that are in ``merged``.
    """

    needs_pretrained = True
    heavy = True

    alpha: PerModel | None = 1.0
    exclude_keys: Sequence[str] | None = None
    return_single_task_models: bool = False

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Return what merges, or by name also what truncates each model."""
        factors = of_each(self.alpha, inputs.names)
        merge = same_for_all(partial(self._merged, factors))
        if not self.return_single_task_models:
            return merge
        singles = {
            name: same_for_all(partial(self._truncated, model))
            for model, name in enumerate(inputs.names)
        }
        return {"merged": merge, **singles}

    def _merged(
        self, factors: Sequence[float], key: str, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return ``base`` plus the merged task vector."""
        assert base is not None
        vectors = (
            vector.mul_(factor)
            for vector, factor in zip(task_vectors(key, 0, tensors, base), factors, strict=True)
        )
        rank = self._rank(key, tensors, base)
        if rank == 0:
            return add_scaled(base, vectors, 1 / len(tensors))
        u, s, vh = zip(*(svd(vector, rank) for vector in vectors), strict=True)
        return base + orthogonal_product(torch.cat(u, 1), torch.cat(s), torch.cat(vh)).to(base)

    def _rank(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> int:
        """Return how many directions each model has in the entry."""
        return (
            min(base.shape) // len(tensors)
            if is_matrix(key, base.shape, self.exclude_keys or ())
            else 0
        )

    def _truncated(
        self, model: int, key: str, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return one model's entry, its task vector reduced to the directions that it has."""
        assert base is not None
        rank = self._rank(key, tensors, base)
        if rank == 0:
            return tensors[model].clone()
        u, s, vh = svd(tensors[model] - base, rank)
        return base + ((u * s) @ vh).to(base)
