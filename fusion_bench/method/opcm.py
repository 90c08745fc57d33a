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
from fusion_bench.weights.matrices import right_vectors, svd, wide
from fusion_bench.weights.ops import is_linear_weight, uniform
from fusion_bench.weights.statistics import Piece, sums, total

Rho = Literal["paper", "fusionbench"]

#: Bytes of matrices that are kept at hand, and rows of one that are taken at a time.
_AT_HAND, _ROWS = 2**28, 4096


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

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the sums that are kept at hand."""
        linear = [k for k in inputs if is_linear_weight(k, inputs.spec(k))]
        return min(_AT_HAND, 4 * sum(map(inputs.merged, linear)))

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Add up the task vectors, and find the scale after each step.

        To scale the sum at each step changes neither its directions nor, in the end, its length:
        it is enough to do it once, after the last one.
        """
        order = list(range(len(inputs.names)))
        if self.shuffle_order:
            draws = uniform(len(order), (self.seed or 0, "order of models"))
            order = np.argsort(draws, kind="stable").tolist()
        path = _Path(self, inputs, order)
        steps = range(1, len(order) + 1)
        scales = path.scales()
        if not (self.save_on_every_step or self.evaluate_on_every_step):
            return path.merger(len(order), scales[-1])
        digits = len(str(len(order)))
        return {
            f"step{step:0{digits}}_{inputs.names[order[step - 1]]}": path.merger(step, scale)
            for step, scale in zip(steps, scales, strict=True)
        }

    def clean(self, vector: Tensor, merged: Tensor) -> Tensor:
        """Return ``vector`` without its part along the directions of ``merged``.

        Both are matrices; ``vector`` may be written to.
        """
        if not 0 < float(merged.norm()) < math.inf:
            return vector
        if len(merged) < merged.shape[1]:
            u, s, vh = svd(merged)  # without the directions of value 0, which are anyone's guess
            change = wide(vector)
            inside = u.mT @ change @ vh.mT
            return (change - u @ self._taken(inside, s) @ vh).to(vector)
        # The left sides are the matrix times the right ones: it is enough to go by rows.
        s, v = right_vectors(merged)
        rows = [one.split(_ROWS) for one in (merged, vector)]
        both = sum(wide(m).mT @ wide(c) for m, c in zip(*rows, strict=True))
        inside = (v / s).mT @ both @ v
        factor = torch.linalg.multi_dot([v / s, self._taken(inside, s), v.mT])
        for own, change in zip(*rows, strict=True):
            change.sub_((wide(own) @ factor).to(change))
        return vector

    def _taken(self, inside: Tensor, values: Tensor) -> Tensor:
        """Return what is taken of a change along the directions."""
        taken = inside.diagonal().diag_embed()
        closed = self._closed(values)
        taken[:closed, :closed] = inside[:closed, :closed]
        return taken

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
    """The sum of the cleaned task vectors, step by step.

    Of as many matrices as there is room for, the sum that was asked for last is kept: who asks for
    one step after the other computes each once.
    """

    def __init__(self, method: OPCM, inputs: Inputs, order: Sequence[int]):
        self._method = method
        self._inputs = inputs
        self._order = order
        self._kept: dict[tuple[str, int], tuple[int, Tensor]] = {}
        self._last: dict[tuple[str, int], tuple[int, Tensor]] = {}

    def after(self, step: int, *piece: *Piece) -> Tensor:
        """Return a piece of the sum after so many models; the caller must not write to it."""
        key, start, tensors, base = piece
        assert base is not None
        linear = is_linear_weight(key, self._inputs.spec(key))
        place = key, start
        done, last = self._last.get(place) or self._kept.get(place) or (0, torch.zeros_like(base))
        if done > step:
            done, last = 0, torch.zeros_like(base)
        merged = last.to(base.device)
        for model in self._order[done:step]:
            vector = tensors[model] - base
            merged = merged + (self._method.clean(vector, merged) if linear else vector)
        found = step, merged.cpu()
        self._last = {place: found}
        # Entries come in the same order each time: to make room would drop the next to come.
        others = (kept.nbytes for own, (_, kept) in self._kept.items() if own != place)
        if linear and sum(others) + merged.nbytes <= _AT_HAND:
            self._kept[place] = found
        return merged

    def scales(self) -> list[float]:
        """Return what gives the sum after each step the mean norm of its task vectors."""

        def squares(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            assert base is not None
            for step, model in enumerate(self._order, 1):
                yield (tensors[model] - base).square()
                yield self.after(step, key, start, tensors, base).square()

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
