r"""LiNeS: $\theta = \theta_0 + c_l\,\tau$, where the coefficient $c_l$ grows from block to block.

$\tau$ is what another method adds to the pretrained model. In block $l = 0 \dots L - 1$ of a stack
$c_l = \alpha + \beta\,\frac{l}{L - 1}$, and $\alpha$ outside of blocks: shallow layers, which all
tasks share, change less than deep ones.
Wang et al., LiNeS, https://arxiv.org/abs/2410.17146
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.contract import Data, FusionMethod, ModelPool, Needs
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.method.plain import Runs, as_method, class_name, refuse_without_pretrained
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.weights import (
    Inputs,
    MergedWeights,
    MergePiece,
    Model,
    Weights,
    align,
)
from fusion_bench.weights.ops import block, task_vectors
from fusion_bench.weights.statistics import sums, total

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LiNeSAlgorithm(TensorwiseAlgorithm):
    """Another method's change, scaled from block to block.

    Args:
        base_method: the other method.
        alpha: the coefficient in the first block and outside of blocks. ``auto`` takes the one that
            gives the changes the L1 norm of the average of the task vectors.
        beta: by how much the coefficient grows up to the last block; with ``None`` up to 1.
    """

    needs_pretrained = True

    base_method: object
    alpha: float | Literal["auto"] = "auto"
    beta: float | None = 1.0

    def __post_init__(self) -> None:
        alpha = self.alpha
        if alpha != "auto" and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise FusionBenchError(f"{alpha!r} is neither a number nor 'auto'.", place=("alpha",))
        with within("base_method"):
            made = instantiate(self.base_method, "method")
        if not isinstance(made, Runs):
            raise FusionBenchError(
                f"{self.base_method!r} is not a method.",
                "On the command line, choose one with 'method@{here}base_method=ties_merging'.",
                place=("base_method",),
            )
        self.base_method = self._base = as_method(made)

    @property
    def needs(self) -> Needs:
        """What the base method asks for, and the pretrained model."""
        needs = self._base.needs
        return replace(needs, base=True, split_place=("base_method", *needs.split_place))

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse what the base method cannot merge, and what it makes a module of."""
        refuse_without_pretrained(self, pool)
        if self.where:
            raise FusionBenchError(
                "LiNeS scales the change of another method along the layers.",
                "Give the rules to that one: {here}base_method.where.",
                place=("where",),
            )
        if isinstance(self._base, EnsembleAlgorithm):
            raise _no_weights(self._base)
        with within("base_method"):
            self._base.check_pool(pool)

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights | Mapping[str, Weights]:
        """Merge with the base method, and return weights with the scaled change.

        Args:
            pool: the models.
            fabric: for the base method.
            data: for the base method, if it learns from data.

        Raises:
            FusionBenchError: no pretrained model; a base method that does not return weights.
        """
        self.check_pool(pool)
        with within("base_method", keyed_only=True):
            fused = self._base.fuse(pool, fabric, data)
        if isinstance(fused, Weights | Model | nn.Module):
            return self._scaled(pool, fused)
        return {name: self._scaled(pool, own) for name, own in fused.items()}

    def _scaled(self, pool: ModelPool, merged: Weights | Model | nn.Module) -> Weights:
        """Return weights that scale ``merged`` when they are read."""
        if not isinstance(merged, Weights):
            raise _no_weights(self._base)
        base = pool.weights("_pretrained_")
        # What was merged may be stored in another type than the models.
        policy = replace(pool.policy, on_dtype="cast")

        def inputs(models: Mapping[str, Weights]) -> Inputs:
            aligned = align(models, base, policy, pool.vocabulary)
            return Inputs(aligned, policy, True, False, self.show_pbar)

        alpha = self.alpha
        if alpha == "auto":
            models = {name: pool.weights(name) for name in pool.model_names}
            alpha = _alpha(inputs({**models, "_merged_": merged}))
            log.info("LiNeS: alpha is %.4g.", alpha)
        beta = 1 - alpha if self.beta is None else self.beta
        depths = _depths(merged)
        if not depths:
            log.warning(
                "LiNeS: no key contains a block's index, so all changes are scaled equally."
            )
        return _Scaled(inputs({"merged": merged}), _scale(alpha, beta, depths), merged)


def _no_weights(method: FusionMethod) -> FusionBenchError:
    """Return the problem of a base method that returns no weights of the models' own form."""
    return FusionBenchError(
        f"{class_name(method)} returns a module or another form of model, which cannot be scaled.",
        "Choose another method.",
        place=("base_method",),
    )


class _Scaled(MergedWeights):
    """Scaled weights that also report problems of the merge."""

    def __init__(self, inputs: Inputs, merge_piece: MergePiece, fused: Weights):
        super().__init__(inputs, merge_piece)
        self._fused = fused

    def verify(self) -> None:
        self._fused.verify()
        super().verify()


def _scale(alpha: float, beta: float, depths: Mapping[str, float]) -> MergePiece:
    def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        (vector,) = task_vectors(key, start, tensors, base)
        return vector.mul_(alpha + beta * depths.get(key, 0)).add_(base)

    return merge


def _depths(keys: Iterable[str]) -> dict[str, float]:
    """Return the relative depth, from 0 to 1, of each key's block in its stack."""
    blocks = {key: place for key in keys if (place := block(key))}
    last: dict[str, int] = {}
    for stack, index in blocks.values():
        last[stack] = max(index, last.get(stack, 1))  # a block alone is the first
    return {key: index / last[stack] for key, (stack, index) in blocks.items()}


def _alpha(inputs: Inputs) -> float:
    """Return the norm of the models' average change over that of the last one's change."""
    average, merged = total(sums(inputs, _magnitudes))
    return average / merged if merged else 1.0


def _magnitudes(
    key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Iterator[Tensor]:
    *vectors, merged = task_vectors(key, start, tensors, base)
    yield (sum(vectors[1:], vectors[0]) / len(vectors)).abs_()
    yield merged.abs_()
