r"""Karcher mean: the point on the sphere whose mean squared distance to all models is least.

Each tensor's direction $u$ moves along $\sum_t \alpha_t \log_u(u_t)$ until it rests; its length is
the mean of the models' lengths. Karcher, Riemannian center of mass and mollifier smoothing, 1977,
https://doi.org/10.1002/cpa.3160300502
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm


class KarcherMeanAlgorithm(TensorwiseAlgorithm):
    """The mean on the sphere of any number of models, in whatever order, tensor by tensor.

    Args:
        max_iter: steps at most.
        tol: a step, an angle or a norm that counts as none.
        show_pbar: show a progress bar.
        inplace: write to the first module, of modules given as a dict.
    """

    def __init__(
        self,
        max_iter: int = 10,
        tol: float = 1e-5,
        show_pbar: bool = True,
        inplace: bool = False,
    ):
        self.max_iter = max_iter
        self.tol = tol
        self.show_pbar = show_pbar
        self.inplace = inplace

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the mean; the pretrained model is not part of it."""
        first = tensors[0]
        flat = torch.stack([tensor.double().flatten() for tensor in tensors])
        norms = flat.norm(dim=1)
        units = flat[norms > self.tol] / norms[norms > self.tol, None]
        if len(units) == 0:
            return torch.zeros_like(first)
        mean = units.mean(dim=0)
        mean = mean / mean.norm() if mean.norm() > self.tol else units[0]
        for _ in range(self.max_iter):
            cosines = (units @ mean).clamp(-1, 1)
            angles = torch.arccos(cosines)
            far = angles > self.tol
            if not far.any():
                break
            scales = angles[far] / torch.sin(angles[far])
            directions = units[far] - cosines[far, None] * mean
            step = (scales[:, None] * directions).sum(dim=0) / len(units)
            length = step.norm()
            if length < self.tol:
                break
            mean = torch.cos(length) * mean + torch.sin(length) / length * step
            mean = mean / mean.norm()
        return (mean * norms.mean()).view(first.shape).to(first.dtype)
