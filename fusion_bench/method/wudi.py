r"""WUDI: the merged task vector with the least interference between tasks.

$\tau = \arg\min_\tau \sum_t \|(\tau - \tau_t)\,\tau_t^\top\|^2 / \|\tau_t\|^2$, matrix by matrix.
Cheng et al., Whoever started the interference should end it, https://arxiv.org/abs/2503.08099
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between, check_choice
from fusion_bench.threads import suited_threads
from fusion_bench.weights import Cut, Inputs, MergePiece
from fusion_bench.weights.entries import cut_of_matrices, folded
from fusion_bench.weights.lapack import eigenvectors
from fusion_bench.weights.matrices import is_matrix, wide
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.stream import threads_for

Solver = Literal["adam", "lstsq"]
Divisor = Literal["squared", "norm"]
Rest = Literal["mean", "base"]

#: The paper's step size.
_LEARNING_RATE = 1e-5


@dataclass(eq=False)
class WUDIMerging(TensorwiseAlgorithm):
    """The pretrained model plus a task vector that is fitted to all models, for each matrix.

    Args:
        iter_num: steps of ``adam``.
        exclude_keys: keys or key patterns of matrices that are merged like other entries.
        solver: ``adam`` goes from the sum of the task vectors towards the minimum, by 1e-5 a step
            at most; ``lstsq`` goes all the way, in closed form.
        divisor: a model's part of the sum is divided by the ``squared`` norm of its task vector,
            as in the paper, or by the ``norm``, as in the code that the authors published.
        rest: other entries get the ``mean`` of the task vectors, or the values of the ``base``.
    """

    needs_pretrained = True
    shows_nonfinite = True
    heavy = True

    iter_num: int = 400
    exclude_keys: Sequence[str] | None = None
    solver: Solver = "adam"
    divisor: Divisor = "squared"
    rest: Rest = "mean"

    def __post_init__(self) -> None:
        check_between("iter_num", self.iter_num, 0, 1_000_000)
        check_choice("solver", self.solver, Solver)
        check_choice("divisor", self.divisor, Divisor)
        check_choice("rest", self.rest, Rest)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that of large tall matrices, such as embeddings, only rows stay whole."""
        return cut_of_matrices(key, shape, self.exclude_keys or ())

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of what a matrix with more columns than rows takes beyond its share."""
        shapes = [inputs.spec(key).shape for key in inputs]
        wide = [columns for rows, columns in (s for s in shapes if len(s) == 2) if columns > rows]
        squares = 8 * 3 if self.solver == "lstsq" else 4 * 2
        return squares * max(wide, default=0) ** 2 * threads_for(inputs)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return what merges; of large tall matrices find what all rows share."""
        grams = inputs.each(self._grams)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            shared = grams(key) if self.cut(key, inputs.spec(key).shape) == "rows" else None
            return self.merge_tensor(key, tensors, base, shared)

        return merge

    def merge_tensor(
        self,
        key: str,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        grams: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return ``base`` plus the fitted, or else the mean task vector.

        ``grams`` are those of the models' whole matrices, where these are rows of them.
        """
        assert base is not None
        fitted = is_matrix(key, base.shape, self.exclude_keys or ())
        if self.rest == "base" and not fitted:
            return base.clone()
        merged = torch.zeros_like(base)
        for vector in task_vectors(key, 0, tensors, base):
            merged += vector
        if not fitted:
            return merged.div_(len(tensors)).add_(base)
        with suited_threads(0, merged.device):  # the same on each machine
            gram, pull = self._equations(key, tensors, base, merged, grams)
            if pull.any():  # else the sum is the minimum
                merged += self._solution(gram, pull, like=merged)
        return merged.add_(base)

    def _equations(
        self,
        key: str,
        tensors: Sequence[Tensor],
        base: Tensor,
        total: Tensor,
        grams: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``gram`` and ``pull``: at ``total + x`` the gradient is 2 (x @ gram + pull)."""
        dtype = self._dtype(base)
        rows, columns = base.shape
        gram = base.new_zeros(columns, columns, dtype=dtype)
        pull = torch.zeros_like(base, dtype=dtype)
        for model, vector in enumerate(task_vectors(key, 0, tensors, base)):
            if grams is not None:
                gram += grams[model]
                pull.addmm_((total - vector).to(dtype), grams[model])
                continue
            norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
            if norm == 0:  # it asks for nothing
                continue
            others = (total - vector).to(dtype)
            unit = vector.to(dtype).div_(norm)
            weight = self._weight(norm)
            if rows < columns:
                gram.addmm_(unit.mT, unit, alpha=weight)
                pull.addmm_(others @ unit.mT, unit, alpha=weight)
            else:
                own = unit.mT @ unit
                gram.add_(own, alpha=weight)
                pull.addmm_(others, own, alpha=weight)
        return gram, pull

    def _dtype(self, like: Tensor) -> torch.dtype:
        return torch.float64 if self.solver == "lstsq" else like.dtype

    def _weight(self, norm: float) -> float:
        return 1.0 if self.divisor == "squared" else norm

    def _grams(self, entry: Inputs) -> list[Tensor]:
        """Return what ``_gram`` does of all models' matrices, which are cut into rows."""
        found = []
        for model in range(len(entry.names)):

            def product(
                key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
            ) -> Tensor:
                assert base is not None
                vector = wide(tensors[model] - base)  # noqa: B023
                return vector.mT @ vector

            own = folded(entry, product)
            norm = math.sqrt(float(own.trace()))
            own = own / norm**2 * self._weight(norm) if norm else own
            found.append(own if entry.is_double or self.solver == "lstsq" else own.float())
        return found

    def _solution(self, gram: Tensor, pull: Tensor, like: Tensor) -> Tensor:
        """Return ``x``."""
        if self.solver == "lstsq":
            if not pull.isfinite().all():
                return pull.to(like)
            values, vectors = eigenvectors(gram)
            kept = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
            vectors = vectors[:, :kept]
            return (pull @ vectors).div_(-values[:kept]).matmul(vectors.mT).to(like)
        # Written by hand, a step is one product; the loss itself would take two for each model.
        gram, pull = gram.mul_(2), pull.mul_(2)
        x = torch.zeros_like(like)
        gradient = x.grad = torch.empty_like(like)
        optimizer = torch.optim.Adam([x], _LEARNING_RATE, fused=True)
        for _ in range(self.iter_num):
            torch.addmm(pull, x, gram, out=gradient)
            optimizer.step()
        return x
