r"""Weighted average: $\theta = \sum_t w_t \theta_t$.

Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.method.rules import Given, unmatched
from fusion_bench.method.where import Resolved
from fusion_bench.problems import FusionBenchError, Problems
from fusion_bench.weights import Inputs, MergePiece, matches


@dataclass(eq=False)
class WeightedAverageAlgorithm(TensorwiseAlgorithm):
    """The weighted sum of all models, without the pretrained model.

    Args:
        weights: one for each model by name, or a list in the pool's order; they may be negative.
        normalize: divide the weights by their sum.
        layer_weights: maps key patterns (``*`` matches anything) to weights for matching entries;
            the first match is used, or ``weights`` without a match. It cannot be combined with
            ``weights`` in rules of ``where``.

    Raises:
        FusionBenchError: from ``run``: another number of weights than models, weights whose sum is
            zero with ``normalize``, or a pattern that matches nothing.
    """

    elementwise = True
    shows_nonfinite = True

    weights: PerModel = 1.0
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
        keys, problems = [*inputs, *inputs.aligned.elsewhere], Problems()
        for pattern in (self.layer_weights or {}) if list(inputs) else ():
            if not any(matches(key, [pattern]) for key in keys):
                problems.add([unmatched(pattern, keys).inside(f"layer_weights.{pattern}")])
        problems.raise_all()

    def resolved(self, inputs: Inputs) -> Resolved:
        """Return the options of each entry, with the weights that ``layer_weights`` gives."""
        for index, rule in enumerate(self.where):
            if not isinstance(rule, Mapping):
                continue  # it is told with the rules
            if rule.get("layer_weights"):
                raise FusionBenchError(
                    "a rule has a pattern itself.",
                    "Give 'match' and 'weights' in place of it.",
                    place=("where", index, "layer_weights"),
                )
            if "weights" in rule and self.layer_weights:
                raise FusionBenchError(
                    "'layer_weights' decides on weights too.",
                    "Make each of its patterns a rule, {match: PATTERN, weights: …}, and remove "
                    "'layer_weights'.",
                    place=("where", index, "weights"),
                )
        found = super().resolved(inputs)
        if not self.layer_weights:
            return found
        keys = [key for key in inputs if inputs.tied_to(key) == key and inputs.merged(key)]
        layers, weights = self._by_pattern(inputs), of_each(self.weights, inputs.names)
        own = {key: tuple(map(Given, _first(layers, key, weights))) for key in keys}
        return replace(found, given={**found.given, "weights": own})

    def _by_pattern(self, inputs: Inputs) -> dict[str, list[float]]:
        layers = self.layer_weights or {}
        return {pattern: of_each(own, inputs.names) for pattern, own in layers.items()}

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that sums the models."""
        layers, weights = self._by_pattern(inputs), of_each(self.weights, inputs.names)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            found = _first(layers, key, weights)
            scale = sum(found) if self.normalize else 1.0
            total = torch.zeros_like(tensors[0])
            for weight, tensor in zip(found, tensors, strict=True):
                total.add_(tensor, alpha=weight / scale)
            return total

        return merge


def _first(layers: Mapping[str, list[float]], key: str, weights: list[float]) -> list[float]:
    """Return the weights of the first pattern that matches an entry, or else ``weights``."""
    return next((own for pattern, own in layers.items() if matches(key, [pattern])), weights)
