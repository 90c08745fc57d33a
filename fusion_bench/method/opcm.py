r"""OPCM: models merged one after the other, $\theta = \theta_0 + s_T \sum_t \mathcal{P}_t(\tau_t)$.

For each linear layer's matrix, $\mathcal{P}_t$ removes the part along the singular directions of
the sum so far; $s_T$ scales the sum to the mean norm of the task vectors. Tang et al., Merging
models on the fly, https://arxiv.org/abs/2501.09522
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between, check_choice
from fusion_bench.weights import Cut, Inputs, MergePiece, TensorSpec
from fusion_bench.weights.draws import uniform
from fusion_bench.weights.matrices import right_vectors, wide
from fusion_bench.weights.ops import is_linear_weight
from fusion_bench.weights.scratch import Scratch
from fusion_bench.weights.statistics import Piece, sums, total

Rho = Literal["paper", "fusionbench"]

#: Rows of a matrix that are taken at a time.
_ROWS = 4096


@dataclass(eq=False)
class OPCM(TensorwiseAlgorithm):
    """Sequential merging where each model adds only new directions to the merged one.

    Args:
        alpha: the share of singular values, from 0 to 1, whose directions are reserved for earlier
            models; a larger value keeps earlier models better.
        shuffle_order: merge the models in a random order instead of the pool's.
        seed: another seed gives another order.
        save_on_every_step: return the merged model after each step, by name, not only the last.
        evaluate_on_every_step: the same.
        rho: how many directions that share makes: the ``paper``'s smallest number that reaches it,
            or about one fewer, as ``fusionbench`` counts.
    """

    needs_pretrained = True
    shows_nonfinite = True
    heavy = True

    alpha: float = 0.5
    shuffle_order: bool = False
    seed: int | None = None
    save_on_every_step: bool = False
    evaluate_on_every_step: bool = False
    rho: Rho = "paper"

    def __post_init__(self) -> None:
        check_between("alpha", self.alpha, 0, 1)
        check_choice("rho", self.rho, Rho)

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that linear layers' matrices stay whole."""
        spec = TensorSpec(tuple(shape), torch.float32)
        return "whole" if is_linear_weight(key, spec) else "elements"

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Add up the task vectors, and find the scale after each step.

        To scale the sum at each step changes neither its directions nor, in the end, its length:
        it is enough to do it once, after the last one.
        """
        order = list(range(len(inputs.names)))
        if self.shuffle_order:
            draws = uniform(len(order), (self.seed or 0, "order of models"))
            order = np.argsort(draws, kind="stable").tolist()
        every = self.save_on_every_step or self.evaluate_on_every_step
        steps = range(1 if every else len(order), len(order) + 1)
        path = _Path(self, inputs, order, steps)
        scales = path.scales()
        if not every:
            return path.merger(len(order), scales[-1])
        digits = len(str(len(order)))
        return {
            f"step{step:0{digits}}_{inputs.names[order[step - 1]]}": path.merger(step, scale)
            for step, scale in zip(steps, scales, strict=True)
        }

    def clean(self, vector: Tensor, merged: Tensor) -> Tensor:
        """Return ``vector`` without its part along the directions of ``merged``.

        Both are matrices of one type; ``vector`` may be written to. Of its part along the pairs of
        directions, ``left @ inside @ right.T``, the diagonal and the block of the reserved ones go.
        """
        if not 0 < float(merged.norm()) < math.inf:
            return vector
        if len(merged) < merged.shape[1]:
            return self.clean(vector.mT, merged.mT).mT
        # Without the directions of value 0, which are anyone's guess.
        s, v = right_vectors(merged)
        inner = v / s  # by rows, the left sides are the matrix times these
        right = v.mT.to(vector)
        left = vector.new_empty(len(vector), len(s))
        inside = vector.new_zeros(len(s), vector.shape[1])
        for to, own, change in zip(*(m.split(_ROWS) for m in (left, merged, vector)), strict=True):
            to.copy_(wide(own) @ inner)
            inside.addmm_(to.mT, change)
        taken = (inside * right).sum(1, keepdim=True) * right
        closed = self._closed(s)
        taken[:closed] = inside[:closed] @ right[:closed].mT @ right[:closed]
        return vector.addmm_(left, taken, alpha=-1)

    def _closed(self, values: Tensor) -> int:
        """Return the number of reserved directions."""
        shares = values.double().cumsum(0)
        shares = shares / shares[-1]
        if self.rho == "paper":
            return int((shares < self.alpha).sum()) + (self.alpha > 0)
        return int((shares <= self.alpha).sum()) % len(shares)


#: The name for CLIP; it is the same.
OPCMForCLIP = OPCM


class _Path:
    """The sum of the cleaned task vectors, step by step; those to return are put aside."""

    def __init__(self, method: OPCM, inputs: Inputs, order: Sequence[int], steps: Sequence[int]):
        self._method = method
        self._inputs = inputs
        self._order = order
        self._steps = steps
        self._kept = Scratch()

    def after(self, step: int, *piece: *Piece) -> Tensor:
        """Return a piece of the sum after so many models; the caller must not write to it."""
        key, start, tensors, base = piece
        assert base is not None
        if is_linear_weight(key, self._inputs.spec(key)):
            return self._kept.get((key, start, step)).to(base.device)
        merged = torch.zeros_like(base)
        for model in self._order[:step]:
            merged += tensors[model] - base
        return merged

    def scales(self) -> list[float]:
        """Return what gives the sum after each step the mean norm of its task vectors."""

        def squares(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            assert base is not None
            linear = is_linear_weight(key, self._inputs.spec(key))
            merged = torch.zeros_like(base)
            for step, model in enumerate(self._order, 1):
                vector = tensors[model] - base
                yield vector.square()
                merged += self._method.clean(vector, merged) if linear else vector
                yield merged.square()
                if linear and step in self._steps:
                    self._kept.put((key, start, step), merged)

        squared = total(sums(self._inputs, squares)) or [0.0] * (2 * len(self._order))
        norms = [math.sqrt(value) for value in squared[::2]]
        scales = []
        for step, value in enumerate(squared[1::2], 1):
            scale = fmean(norms[:step]) / math.sqrt(value) if value > 0 else 1.0
            scales.append(scale if math.isfinite(scale) else 1.0)
        return scales

    def merger(self, step: int, scale: float) -> MergePiece:
        """Return what adds the scaled sum after ``step`` models to the pretrained model."""

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            return base + self.after(step, key, start, tensors, base) * scale

        return merge
