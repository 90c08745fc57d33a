r"""Multi-SLERP: a weighted mean of directions on the sphere, in one step.

With $u_t = \theta_t / \|\theta_t\|$ and $m$ the direction of $\sum_t w_t u_t$, the parts of the
$u_t$ orthogonal to $m$ are averaged to $v$, and the result is
$\bigl(m \cos\|v\| + \frac{v}{\|v\|} \sin\|v\|\bigr) \sum_t w_t \|\theta_t\|$.

Goddard, Multi-SLERP, 2024, as published with mergekit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.errors import FusionBenchError
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.weights import Inputs


class MultiSlerpAlgorithm(TensorwiseAlgorithm):
    """A mean of any number of models that keeps their norms, tensor by tensor.

    With a pretrained model its task vectors are averaged and added to it.

    Args:
        weights: one a model, in the pool's order; equal where not given.
        normalize_weights: divide the weights by their sum.
        eps: what counts as no length.
        show_pbar: show a progress bar.
        inplace: write to the first module, of modules given as a dict.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        eps: float = 1e-8,
        show_pbar: bool = True,
        inplace: bool = False,
    ):
        self.weights = None if weights is None else list(weights)
        self.normalize_weights = normalize_weights
        self.eps = eps
        self.show_pbar = show_pbar
        self.inplace = inplace

    def check(self, inputs: Inputs) -> None:
        """Refuse weights that do not fit the models."""
        models = inputs.names
        if self.weights is not None and len(self.weights) != len(models):
            raise FusionBenchError(
                f"method.weights: {len(self.weights)} weights for {len(models)} models "
                f"({', '.join(models)}). Give one for each."
            )
        if self.weights is not None and self.normalize_weights and sum(self.weights) == 0:
            raise FusionBenchError("method.weights: they add up to zero.")

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the mean on the sphere, of the tensors or of the task vectors."""
        vectors = torch.stack([t if base is None else t - base for t in tensors]).double()
        flat = vectors.view(len(vectors), -1)
        weights = torch.tensor(self.weights or [1.0] * len(flat), dtype=torch.float64)
        weights = weights.to(flat.device)
        if self.normalize_weights:
            weights = weights / weights.sum()
        norms = flat.norm(dim=1)
        units = flat / (norms + self.eps)[:, None]
        mean = weights @ units
        length = mean.norm()
        if length < self.eps:
            if len(flat) > 2 and norms.any():
                raise FusionBenchError(
                    f"Multi-SLERP: the models' directions cancel out in '{key}'. Use other weights."
                )
            merged = weights @ flat
        else:
            middle = mean / length
            tangent = weights @ (units - (units @ middle)[:, None] * middle)
            angle = tangent.norm() + self.eps
            turned = middle * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
            merged = turned * (weights @ norms)
        merged = merged.view(vectors.shape[1:]).to(tensors[0].dtype)
        return merged if base is None else base + merged
