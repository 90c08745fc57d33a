r"""Model Stock: $\theta = t\,\bar\theta + (1 - t)\,\theta_0$, where $t$ depends on the angle.

For $T$ models whose task vectors have the cosine $c$: $t = \frac{T c}{(T - 1) c + 1}$.
Jang et al., Model Stock, https://arxiv.org/abs/2403.19522
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.weights import Inputs, MergePiece, matches, same_for_all
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import cosines_and_norms, products
from fusion_bench.weights.stream import PIECE

log = logging.getLogger(__name__)

Average = Literal["cosine", "angle"]


@dataclass(eq=False)
class ModelStock(TensorwiseAlgorithm):
    """A point between the pretrained model and the average, tensor by tensor.

    Entries with a single value are averaged.

    Args:
        ignore_keys: keys or key patterns of entries that are averaged.
        average: of more than two models, average the ``cosine`` or the ``angle`` between pairs.
        clamp: keep the share of the average between 0 and 1; without it, task vectors that point
            away from each other may give any number.
        filter_wise: find a share for each row, along the last dimension, instead of for each entry.
    """

    needs_pretrained = True
    elementwise = True

    ignore_keys: Sequence[str] = ()
    average: Average = "cosine"
    clamp: bool = False
    filter_wise: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("average", self.average, Average)
        self.elementwise = not self.filter_wise

    def check(self, inputs: Inputs) -> None:
        """Refuse a single model."""
        if len(inputs.names) < 2:
            raise FusionBenchError(
                "Model Stock needs at least two models in addition to '_pretrained_'."
            )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the share of the average in each entry."""
        if self.filter_wise:
            return same_for_all(self.merge_tensor)
        shares = {
            key: self._share_of(own)
            for key, own in products(inputs, task_vectors).items()
            # Between single numbers there are no angles.
            if inputs.merged(key) > 1 and not matches(key, self.ignore_keys)
        }
        if any(not 0 <= share <= 1 for share in shares.values()):
            log.warning(
                "Model Stock: some task vectors have negative cosines, and the result is outside "
                "the models or far away. Set clamp=true to keep it between them."
            )

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            mean = sum(tensors[1:], tensors[0].clone()).div_(len(tensors))
            share = shares.get(key)
            return mean if share is None else mean.sub_(base).mul_(share).add_(base)

        return merge

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return each row's own point between ``base`` and the mean."""
        assert base is not None
        mean = sum(tensors[1:], tensors[0].clone()).div_(len(tensors))
        if base.numel() < 2 or matches(key, self.ignore_keys):
            return mean
        shares = torch.empty_like(base[..., :1]).view(-1)
        vectors = [(t - base).reshape(-1, base.shape[-1]) for t in tensors]
        step = max(1, PIECE // base.shape[-1])
        for start in range(0, len(shares), step):
            rows = [vector[start : start + step].double() for vector in vectors]
            shares[start : start + step] = self._share_of_rows(rows)
        return mean.sub_(base).mul_(shares.view(*base.shape[:-1], 1)).add_(base)

    def _share_of_rows(self, vectors: Sequence[Tensor]) -> Tensor:
        pairs = [cosine_similarity(a, b, dim=-1, eps=1e-150) for a, b in combinations(vectors, 2)]
        found = torch.stack(pairs).clamp_(-1, 1)
        cos = found.mean(0) if self.average == "cosine" else found.arccos().mean(0).cos()
        share = len(vectors) * cos / ((len(vectors) - 1) * cos + 1)
        share = share.nan_to_num(0, posinf=0, neginf=0)
        return share.clamp_(0, 1) if self.clamp else share

    def _share_of(self, products: Tensor) -> float:
        found, _ = cosines_and_norms(products)
        pairs = [float(found[i, j]) for i, j in combinations(range(len(found)), 2)]
        cos = fmean(pairs) if self.average == "cosine" else math.cos(fmean(map(math.acos, pairs)))
        return self._share(cos, len(found))

    def _share(self, cos: float, models: int) -> float:
        denominator = (models - 1) * cos + 1
        # Task vectors that cancel out have no angle to speak of, and nothing to add.
        share = models * cos / denominator if denominator else 0.0
        return max(0.0, min(1.0, share)) if self.clamp else share
