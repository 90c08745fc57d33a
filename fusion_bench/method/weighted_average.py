r"""Weighted average: $\theta = \sum_t w_t \theta_t$.

Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import FusionBenchError, check_one_each
from fusion_bench.weights import Inputs, matches


class WeightedAverageAlgorithm(TensorwiseAlgorithm):
    """The weighted sum of all models; the pretrained model is not one of them.

    Args:
        weights: one a model, in the pool's order; negative ones are allowed without ``normalize``.
        normalize: divide the weights by their sum.
        layer_weights: key pattern (``*`` stands for anything) to weights for the entries that it
            fits; the first that fits counts, and ``weights`` where none does.
        show_pbar: show a progress bar.
        inplace: write to the first module, of modules given as a dict.

    Raises:
        FusionBenchError: from ``run``: another number of weights than models, or weights whose sum
            is zero with ``normalize``.
    """

    elementwise = True
    shows_nonfinite = True

    def __init__(
        self,
        weights: Sequence[float],
        normalize: bool = True,
        layer_weights: Mapping[str, Sequence[float]] | None = None,
        show_pbar: bool = True,
        inplace: bool = False,
    ):
        self.weights = list(weights)
        self.normalize = normalize
        self.layer_weights = {key: list(own) for key, own in (layer_weights or {}).items()}
        self.show_pbar = show_pbar
        self.inplace = inplace

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that do not fit the models."""
        named = {"weights": self.weights} | {
            f"layer_weights.{key}": own for key, own in self.layer_weights.items()
        }
        for name, weights in named.items():
            check_one_each(name, weights, inputs.names)
            if self.normalize and sum(weights) == 0:
                raise FusionBenchError(
                    "the weights add up to zero and cannot be normalised.",
                    "Give {here}normalize=false.",
                    place=(name,),
                )

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the weighted sum of ``tensors``."""
        weights = next(
            (own for pattern, own in self.layer_weights.items() if matches(key, [pattern])),
            self.weights,
        )
        scale = sum(weights) if self.normalize else 1.0
        total = torch.zeros_like(tensors[0])
        for weight, tensor in zip(weights, tensors, strict=True):
            total.add_(tensor, alpha=weight / scale)
        return total
