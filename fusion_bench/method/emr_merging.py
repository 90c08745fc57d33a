r"""EMR: elect, mask and rescale, $\theta_t = \theta_0 + \lambda_t\, m_t \odot \tau$.

At each element $\tau$ has the sign of $\sum_t \tau_t$ and the largest magnitude with that sign;
$m_t$ is 1 where $\tau_t$ has it too; $\lambda_t = \sum |\tau_t| / \sum |m_t \odot \tau|$.
Huang et al., EMR-Merging, https://arxiv.org/abs/2405.17461
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_choice
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.entries import Kept, Measure
from fusion_bench.weights.ops import disjoint_merge, task_vectors
from fusion_bench.weights.statistics import Piece, sums, total

Rescale = Literal["paper", "released"]
#: A unified task vector of more elements is computed anew for each model: on a disk it would take
#: much room.
_KEPT = 2**27


@dataclass(eq=False)
class EMRMerging(TensorwiseAlgorithm):
    """A model for each task: the pretrained model plus a masked, rescaled unified task vector.

    Args:
        rescale: what the magnitudes are compared by: ``paper`` takes sums over the whole model,
            ``released``, as the authors' code, sums over the tensors of each tensor's mean.
    """

    needs_pretrained = True
    elementwise = True

    rescale: Rescale = "paper"

    def __post_init__(self) -> None:
        check_choice("rescale", self.rescale, Rescale)

    def merger(self, inputs: Inputs) -> Mapping[str, MergePiece]:
        """Compute the scales; return the merge function of each task's model by name."""
        # Each task's model takes all of it again.
        unified = Kept(inputs, _unified) if inputs.count() <= _KEPT else _unified

        def magnitudes(*piece: *Piece) -> Iterator[Tensor]:
            """Yield, model by model, those of the task vector and of its share of the whole."""
            whole = unified(*piece)
            for vector in task_vectors(*piece):
                signs = vector.sign()
                yield vector.abs_()
                yield signs.mul_(whole).clamp_(min=0)

        found = sums(inputs, magnitudes, positive=True)
        if self.rescale == "released":
            found = {key: [own / inputs.merged(key) for own in found[key]] for key in found}
        totals = total(found)
        scales = [
            own / shared if shared else 1.0
            for own, shared in zip(totals[::2], totals[1::2], strict=True)
        ]
        return {
            name: partial(_merge, unified, scales, task) for task, name in enumerate(inputs.names)
        }


def _merge(
    unified: Measure,
    scales: Sequence[float],
    task: int,
    key: str,
    start: int,
    tensors: Sequence[Tensor],
    base: Tensor | None,
) -> Tensor:
    assert base is not None
    signs = (tensors[task] - base).sign_()
    # The magnitudes of the unified vector where it has these signs, else 0.
    share = (signs * unified(key, start, tensors, base)).clamp_(min=0)
    return torch.addcmul(base, share, signs, value=scales[task])


def _unified(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return disjoint_merge(task_vectors(key, start, tensors, base), "max", lambda: -1)
