r"""TSV-Merge: $\tau = U_\perp \Sigma V_\perp^\top$ from the task vectors' largest singular values.

From each of $T$ task vectors, the largest $1/T$ of the singular triplets are kept. The concatenated
vectors of all tasks are made orthonormal, so tasks no longer interfere. Gargiulo et al., Task
singular vectors, https://arxiv.org/abs/2412.00081
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.entries import cut_of_matrices, right_factors, right_product
from fusion_bench.weights.matrices import is_matrix, orthogonal_product, side_by_side, svd, wide
from fusion_bench.weights.ops import add_scaled


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

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that of large tall matrices, such as embeddings, only rows stay whole."""
        return cut_of_matrices(key, shape, self.exclude_keys or ())

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Return what merges, or by name also what truncates each model."""
        if isinstance(self.alpha, Mapping):
            return replace(self, alpha=of_each(self.alpha, inputs.names)).merger(inputs)
        factors = inputs.each(self._tall_factors)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            if self.cut(key, inputs.spec(key).shape) != "rows":
                return self.merge_tensor(key, tensors, base)
            assert base is not None
            inner, outer = factors(key)
            return base + (self._left(inner, key, tensors, base) @ outer).to(base)

        if not self.return_single_task_models:
            return merge
        names = enumerate(inputs.names)
        return {"merged": merge, **{name: self._truncating(inputs, model) for model, name in names}}

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return ``base`` plus the merged task vector."""
        assert base is not None
        vectors = self._scaled(key, tensors, base)
        rank = self._rank(key, tensors, base)
        if rank == 0:
            return add_scaled(base, vectors, 1 / len(tensors))
        parts = (svd(vector, rank) for vector in vectors)
        merged = orthogonal_product(*side_by_side(parts, base.shape, rank * len(tensors)))
        return merged.to(base).add_(base)

    def _scaled(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> Iterator[Tensor]:
        """Yield the task vectors times their factors."""
        for model in range(len(tensors)):
            yield self._vector(model, key, 0, tensors, base)

    def _vector(
        self, model: int, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return one model's task vector times its factor."""
        assert base is not None
        factor = of_each(self.alpha, [""] * len(tensors))[model]
        return (tensors[model] - base).mul_(factor)

    def _tall_factors(self, entry: Inputs) -> tuple[list[Tensor], Tensor]:
        """Return what rows of the task vectors are multiplied by, and then, side by side, all."""
        (key,) = entry
        models = range(len(entry.names))
        rank = entry.spec(key).shape[1] // len(models)
        found = [right_factors(entry, partial(self._vector, model), rank) for model in models]
        inner = [v / s for s, v in found]

        def left(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            return self._left(inner, key, tensors, base)

        values, right = zip(*found, strict=True)
        return inner, right_product(entry, left, torch.cat(values), torch.cat(right, 1).mT)

    def _left(
        self, inner: Sequence[Tensor], key: str, tensors: Sequence[Tensor], base: Tensor
    ) -> Tensor:
        """Return rows of the left singular vectors of all models, side by side."""
        vectors = self._scaled(key, tensors, base)
        return torch.cat([wide(v) @ own for v, own in zip(vectors, inner, strict=True)], 1)

    def _rank(self, key: str, tensors: Sequence[Tensor], base: Tensor) -> int:
        """Return how many directions each model has in the entry."""
        return (
            min(base.shape) // len(tensors)
            if is_matrix(key, base.shape, self.exclude_keys or ())
            else 0
        )

    def _truncating(self, inputs: Inputs, model: int) -> MergePiece:
        """Return what makes one model's entry, its task vector reduced to its directions."""

        def vector(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            return tensors[model] - base

        def projection(entry: Inputs) -> Tensor:
            (key,) = entry
            _, v = right_factors(entry, vector, entry.spec(key).shape[1] // len(entry.names))
            return v @ v.mT

        projections = inputs.each(projection)

        def truncate(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Tensor:
            assert base is not None
            if self.cut(key, inputs.spec(key).shape) == "rows":
                return base + (wide(vector(key, start, tensors, base)) @ projections(key)).to(base)
            rank = self._rank(key, tensors, base)
            if rank == 0:
                return tensors[model].clone()
            u, s, vh = svd(tensors[model] - base, rank)
            return base + ((u * s) @ vh).to(base)

        return truncate
