r"""SCE: select by variance, weigh by energy, erase minority signs.

Per tensor: keep the elements whose task vectors vary most between the models, weigh each model by
the mean square of what is kept, and average where the signs agree with that of the sum.
Wan et al., FuseChat, https://arxiv.org/abs/2408.07990
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.problems import check_between
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.largest import Cutoff, largest, search_bytes
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.statistics import Piece, Values, products, sums, total


@dataclass(eq=False)
class SCEAlgorithm(TensorwiseAlgorithm):
    """The pretrained model plus a mean of the task vectors, weighted towards larger changes.

    Args:
        select_topk: the share of the varying elements to keep, from 0 to 1.
    """

    needs_pretrained = True
    elementwise = True

    select_topk: float = 1.0

    def __post_init__(self) -> None:
        check_between("select_topk", self.select_topk, 0, 1)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        size = max(map(inputs.merged, inputs), default=0)
        return 0 if self.select_topk == 1 else search_bytes(size, 1)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Find the elements that are selected in each entry, and the models' weights there."""
        vectors = task_vectors if self.select_topk == 1 else self._selected(inputs)

        def energy(entry: Inputs) -> Tensor:
            (found,) = products(entry, vectors).values()
            return found.diagonal()

        energies = inputs.each(energy)

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            own = list(vectors(key, start, tensors, base))
            return _of_majority(own, energies(key)).add_(base)

        return merge

    def _selected(self, inputs: Inputs) -> Values:
        """Return the function that keeps of the task vectors where they vary most."""

        def varying(*piece: *Piece) -> Iterator[Tensor]:
            yield _variance(list(task_vectors(*piece))).sign_()

        def variances(*piece: *Piece) -> Iterator[Tensor]:
            yield _variance(list(task_vectors(*piece)))

        def find(entry: Inputs) -> Cutoff:
            count = int(self.select_topk * total(sums(entry, varying))[0])
            (cutoff,) = largest(entry, variances, [count], wide=True)
            return cutoff

        cutoffs = inputs.each(find)

        def selected(*piece: *Piece) -> Iterator[Tensor]:
            key, start, *_ = piece
            vectors = list(task_vectors(*piece))
            kept = cutoffs(key).keep(key, start, _variance(vectors)).sign_()
            for vector in vectors:
                yield vector.mul_(kept)

        return selected


def _variance(vectors: Sequence[Tensor]) -> Tensor:
    """Return the variance between the vectors, in float64."""
    return torch.stack(list(vectors)).double().var(dim=0, correction=0)


def _of_majority(vectors: Sequence[Tensor], energy: Tensor) -> Tensor:
    """Return the mean, by energy, of the values that have the sum's sign; they are written to."""
    total = energy.sum()
    weights = energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))
    sign = sum(vectors[1:], vectors[0]).sign()
    sign += 1 - sign.abs()  # a sum of 0 counts as positive
    merged, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, share in zip(vectors, weights.tolist(), strict=True):
        agreeing = vector.mul_(sign).clamp_(min=0)
        merged.add_(agreeing, alpha=share)
        weight.add_(agreeing.sign_(), alpha=share)
    return merged.div_(weight.masked_fill_(weight == 0, 1)).mul_(sign)
