r"""EMR: elect, mask and rescale, $\theta_t = \theta_0 + \lambda_t\, m_t \odot \tau$.

At each element $\tau$ has the sign of $\sum_t \tau_t$ and the largest magnitude with that sign;
$m_t$ is 1 where $\tau_t$ has it too; $\lambda_t = \sum |\tau_t| / \sum |m_t \odot \tau|$.
Huang et al., EMR-Merging, https://arxiv.org/abs/2405.17461
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_choice
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.entries import Kept, Measure
from fusion_bench.weights.ops import disjoint_merge, task_vectors
from fusion_bench.weights.statistics import Piece, sums, total

Rescale = Literal["paper", "released"]
#: A unified task vector of more elements is computed anew for each model, instead of being kept.
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

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the unified task vector, where it is kept."""
        size = inputs.count()
        return size * (8 if inputs.is_double else 4) if size <= _KEPT else 0

    def merger(self, inputs: Inputs) -> Mapping[str, MergePiece]:
        """Compute the scales; return the merge function of each task's model by name."""
        # Each task's model takes all of it again.
        unified = Kept(inputs, _unified) if inputs.count() <= _KEPT else _unified

        def magnitudes(*piece: *Piece) -> Iterator[Tensor]:
            """Yield, model by model, those of the task vector and of its share of the whole."""
            whole = unified(*piece)
            for vector in task_vectors(*piece):
                yield vector.abs()
                yield _share(vector.sign_(), whole)

        found = sums(inputs, magnitudes)
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
    share = _share(signs, unified(key, start, tensors, base))
    return signs.mul_(share).mul_(scales[task]).add_(base)


def _unified(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return disjoint_merge(task_vectors(key, start, tensors, base), "max", lambda: -1)


def _share(signs: Tensor, unified: Tensor) -> Tensor:
    """Return the magnitudes of ``unified`` where it has these signs, else 0."""
    return (signs * unified).clamp_(min=0)
