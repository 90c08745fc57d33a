r"""Weighted average: $\theta = \sum_t w_t \theta_t$.

Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs, MergePiece, matches


@dataclass(eq=False)
class WeightedAverageAlgorithm(TensorwiseAlgorithm):
    """The weighted sum of all models, without the pretrained model.

    Args:
        weights: one for each model by name, or a list in the pool's order; they may be negative.
        normalize: divide the weights by their sum.
        layer_weights: maps key patterns (``*`` matches anything) to weights for matching entries;
            the first match is used, or ``weights`` without a match.

    Raises:
        FusionBenchError: from ``run``: another number of weights than models, or weights whose sum
            is zero with ``normalize``.
    """

    elementwise = True
    shows_nonfinite = True

    weights: PerModel
    normalize: bool = True
    layer_weights: Mapping[str, Mapping[str, float] | Sequence[float]] | None = None

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that do not fit the models."""
        named = {"weights": self.weights} | {
            f"layer_weights.{key}": own for key, own in (self.layer_weights or {}).items()
        }
        for name, weights in named.items():
            if sum(of_each(weights, inputs.names, name)) == 0 and self.normalize:
                raise FusionBenchError(
                    "the weights sum to zero and cannot be normalised.",
                    "Give {here}normalize=false.",
                    place=(name,),
                )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that sums the models."""
        layers = self.layer_weights or {}
        weights = of_each(self.weights, inputs.names)
        own = {pattern: of_each(layers[pattern], inputs.names) for pattern in layers}

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            found = next((own[p] for p in own if matches(key, [p])), weights)
            scale = sum(found) if self.normalize else 1.0
            total = torch.zeros_like(tensors[0])
            for weight, tensor in zip(found, tensors, strict=True):
                total.add_(tensor, alpha=weight / scale)
            return total

        return merge
