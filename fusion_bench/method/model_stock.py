r"""Model Stock: $\theta = t\,\bar\theta + (1 - t)\,\theta_0$, where $t$ depends on the angle.

For $T$ models whose task vectors have the cosine $c$: $t = \frac{T c}{(T - 1) c + 1}$.
Jang et al., Model Stock, https://arxiv.org/abs/2403.19522
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.weights import Inputs, MergePiece, matches
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import cosines_and_norms, products

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
    """

    needs_pretrained = True
    elementwise = True

    ignore_keys: Sequence[str] = ()
    average: Average = "cosine"
    clamp: bool = False

    def __post_init__(self) -> None:
        check_choice("average", self.average, Average)

    def check(self, inputs: Inputs) -> None:
        """Refuse a single model."""
        if len(inputs.names) < 2:
            raise FusionBenchError(
                "Model Stock needs at least two models in addition to '_pretrained_'."
            )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the share of the average in each entry."""
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
