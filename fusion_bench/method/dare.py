r"""DARE: drop elements of the task vectors at random, scale up the rest, then merge.

$\tilde\tau_t = m_t \odot \tau_t / (1 - p)$ with $m_t \sim \mathrm{Bernoulli}(1 - p)$.
Yu et al., Language models are super Mario, https://arxiv.org/abs/2311.03099
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.per_model import PerModel, check_each_between, of_each
from fusion_bench.method.ties_merging import Keep, Scope, TiesMergingAlgorithm, ZeroSign
from fusion_bench.problems import check_choice
from fusion_bench.weights import Inputs, MergePiece
from fusion_bench.weights.draws import drop
from fusion_bench.weights.entries import restoring_l1
from fusion_bench.weights.ops import (
    MergeFunc,
    Rescale,
    add_scaled,
    divisor,
    is_linear_weight,
    task_vectors,
)
from fusion_bench.weights.statistics import Values


@dataclass(frozen=True)
class _Dropping:
    """How elements are dropped; each model's entry has a random stream of its own."""

    sparsity_ratio: PerModel
    only_on_linear_weights: bool
    rescale: bool | Rescale
    seed: int | None

    def __post_init__(self) -> None:
        check_each_between("sparsity_ratio", self.sparsity_ratio, 0, 1)
        if not isinstance(self.rescale, bool):
            check_choice("rescale", self.rescale, Rescale)

    @property
    def way(self) -> Rescale:
        """What is done with the elements that are left."""
        if isinstance(self.rescale, bool):
            return "inverse_keep" if self.rescale else "none"
        return self.rescale

    def vectors(self, inputs: Inputs) -> Values:
        """Return the function that makes the models' sparse task vectors."""
        rates = of_each(self.sparsity_ratio, inputs.names)

        def dropped(
            key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
        ) -> Iterator[Tensor]:
            whole = self.only_on_linear_weights and not is_linear_weight(key, inputs.spec(key))
            vectors = task_vectors(key, start, tensors, base)
            rescale = self.way == "inverse_keep"
            for name, vector, rate in zip(inputs.names, vectors, rates, strict=True):
                seed = (self.seed or 0, name, key)
                yield drop(vector, 0.0 if whole else rate, rescale, seed, start)

        return restoring_l1(inputs, dropped, task_vectors) if self.way == "l1" else dropped


@dataclass(eq=False)
class DareTaskArithmetic(TensorwiseAlgorithm):
    """Task arithmetic on sparse task vectors.

    Args:
        scaling_factor: scaling factor of the sum of the task vectors.
        sparsity_ratio: the probability that an element is dropped, from 0 to 1: one for all, one
            for each model by name, or a list in the pool's order.
        only_on_linear_weights: leave all entries but linear layers' matrices whole.
        rescale: ``true`` divides what is left by the probability to be kept; ``l1`` restores each
            tensor's sum of magnitudes; ``false`` does neither.
        seed: the random seed.
        weights: factors of the task vectors, in the same forms as ``sparsity_ratio``.
        normalize: divide the weights by their sum.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    scaling_factor: float = 0.3
    sparsity_ratio: PerModel = 0.5
    only_on_linear_weights: bool = False
    rescale: bool | Rescale = True
    seed: int | None = None
    weights: PerModel = field(default=1.0, kw_only=True)
    normalize: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._dropping = _Dropping(
            self.sparsity_ratio, self.only_on_linear_weights, self.rescale, self.seed
        )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds the sparse task vectors to the pretrained model."""
        weights = of_each(self.weights, inputs.names)
        factor = self.scaling_factor / (divisor(weights) if self.normalize else 1)
        return _sum_merger(self._dropping.vectors(inputs), factor, weights)


@dataclass(eq=False)
class DareSimpleAverage(TensorwiseAlgorithm):
    """The average of models with sparse task vectors.

    Args:
        sparsity_ratio: as in ``DareTaskArithmetic``; so are the next arguments.
        only_on_linear_weights: leave all entries but linear layers' matrices whole.
        rescale: scale up what is left.
        seed: the random seed.
        weights: of the models, as there; they are divided by their sum.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    sparsity_ratio: PerModel = 0.5
    only_on_linear_weights: bool = False
    rescale: bool | Rescale = True
    seed: int | None = None
    weights: PerModel = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self._dropping = _Dropping(
            self.sparsity_ratio, self.only_on_linear_weights, self.rescale, self.seed
        )

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that adds the mean sparse task vector to the pretrained model."""
        weights = of_each(self.weights, inputs.names)
        return _sum_merger(self._dropping.vectors(inputs), 1 / divisor(weights), weights)


@dataclass(eq=False)
class DareTiesMerging(TensorwiseAlgorithm):
    """TIES on sparse task vectors.

    Args:
        sparsity_ratio: as in ``DareTaskArithmetic``; so are the next two arguments.
        only_on_linear_weights: leave all entries but linear layers' matrices whole.
        rescale: scale up what is left.
        scaling_factor: as in ``TiesMergingAlgorithm``; so are the next arguments.
        threshold: how much of each sparse task vector is kept.
        remove_keys: entries that are copied from the pretrained model.
        merge_func: how values of the elected sign are merged.
        scope: where the largest elements are searched.
        keep: whether elements that equal the smallest one kept are all kept.
        zero_sign: the sign where the sum is 0.
        seed: as in ``DareTaskArithmetic``.
        weights: as in ``TiesMergingAlgorithm``.
    """

    needs_pretrained = True
    shows_nonfinite = True
    elementwise = True

    sparsity_ratio: PerModel = 0.5
    only_on_linear_weights: bool = False
    rescale: bool | Rescale = True
    scaling_factor: float = 0.5
    threshold: PerModel = 20
    remove_keys: Sequence[str] = ()
    merge_func: MergeFunc = "sum"
    scope: Scope = "model"
    keep: Keep = "exact_topk"
    zero_sign: ZeroSign = "global_majority"
    seed: int | None = None
    weights: PerModel = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self._dropping = _Dropping(
            self.sparsity_ratio, self.only_on_linear_weights, self.rescale, self.seed
        )
        self._ties = TiesMergingAlgorithm(
            self.scaling_factor,
            self.threshold,
            self.remove_keys,
            self.merge_func,
            self.scope,
            self.keep,
            self.zero_sign,
            weights=self.weights,
        )
        self.shows_nonfinite = self._ties.shows_nonfinite

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of the search for the largest elements."""
        return self._ties.kept_bytes(inputs)

    def merger(self, inputs: Inputs) -> MergePiece:
        """Return the function that merges the sparse task vectors as in TIES."""
        return self._ties.merger_of(inputs, self._dropping.vectors(inputs))


def _sum_merger(vectors: Values, factor: float, weights: Sequence[float]) -> MergePiece:
    def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        return add_scaled(base, vectors(key, start, tensors, base), factor, weights)

    return merge
