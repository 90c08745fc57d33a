r"""Weighted average: $\theta = \sum_t w_t \theta_t$.

Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import FusionBenchError, check_one_each
from fusion_bench.weights import Inputs, matches


@dataclass(eq=False)
class WeightedAverageAlgorithm(TensorwiseAlgorithm):
    """The weighted sum of all models, without the pretrained model.

    Args:
        weights: one per model, in the pool's order; negative values are allowed without
            ``normalize``.
        normalize: divide the weights by their sum.
        layer_weights: maps key patterns (``*`` matches anything) to weights for matching entries;
            the first match is used, or ``weights`` without a match.

    Raises:
        FusionBenchError: from ``run``: another number of weights than models, or weights whose sum
            is zero with ``normalize``.
    """

    elementwise = True
    shows_nonfinite = True

    weights: Sequence[float]
    normalize: bool = True
    layer_weights: Mapping[str, Sequence[float]] | None = None

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that do not fit the models."""
        named = {"weights": self.weights} | {
            f"layer_weights.{key}": own for key, own in (self.layer_weights or {}).items()
        }
        for name, weights in named.items():
            check_one_each(name, weights, inputs.names)
            if self.normalize and sum(weights) == 0:
                raise FusionBenchError(
                    "the weights sum to zero and cannot be normalised.",
                    "Give {here}normalize=false.",
                    place=(name,),
                )

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the weighted sum of ``tensors``."""
        weights = next(
            (own for pattern, own in (self.layer_weights or {}).items() if matches(key, [pattern])),
            self.weights,
        )
        scale = sum(weights) if self.normalize else 1.0
        total = torch.zeros_like(tensors[0])
        for weight, tensor in zip(weights, tensors, strict=True):
            total.add_(tensor, alpha=weight / scale)
        return total
