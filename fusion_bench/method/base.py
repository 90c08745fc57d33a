"""What a fusion method is: the smallest file that can say its mathematics."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import (
    Aligned,
    Inputs,
    MergedWeights,
    MergePiece,
    MergePolicy,
    TensorWeights,
    Weights,
    align,
    in_memory,
    is_special,
    same_for_all,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

#: What a method makes of a pool: one set of weights, or several by name.
Fused = Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]


class ModelPool(Protocol):
    """What a method sees of a model pool: names, and the weights behind them."""

    @property
    def model_names(self) -> Sequence[str]:
        """The models to fuse; special names such as ``_pretrained_`` are not among them."""

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a ``_pretrained_`` model."""

    @property
    def policy(self) -> MergePolicy:
        """What to do where the models differ."""

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the pretrained model, or without one the first, has; if it has any."""

    def weights(self, name: str) -> Weights:
        """Return a model's weights, which the caller must not write to."""


@runtime_checkable
class Comparing(Protocol):
    """A pool that knows what besides weights its models compute with.

    Attributes:
        notes: what it has found to differ, so far.
    """

    notes: list[str]

    def compare(self, names: Collection[str] | None = None) -> list[str]:
        """Return in sentences what differs in some models, by default in all.

        Raises:
            FusionBenchError: what the policy does not allow.
        """


class ModuleDict:
    """A plain dict of modules, ``{"_pretrained_": m0, "a": m1}``, seen as a model pool."""

    policy = MergePolicy()
    vocabulary = None

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self.model_names = [name for name in modules if not is_special(name)]
        self.has_pretrained = "_pretrained_" in modules

    def weights(self, name: str) -> Weights:
        """Return a view of the module's state dict."""
        return TensorWeights(self._modules[name].state_dict())


class TensorwiseAlgorithm:
    """A method that makes each output tensor from the same tensor of every model.

    Subclasses implement ``merge_tensor``, or ``merger`` where they need to see the whole models
    first. Those that need the pretrained model set ``needs_pretrained``, and those whose result at
    each element depends on that element alone set ``elementwise``. Where NaN or infinity in a model
    always shows in the result, as in a weighted sum, ``shows_nonfinite`` saves looking for it
    twice. ``heavy`` ones, which factorise matrices or descend gradients, compute where Fabric
    computes.
    """

    needs_pretrained = False
    elementwise = False
    heavy = False
    shows_nonfinite = False
    show_pbar = True
    inplace = False

    def check(self, inputs: Inputs) -> None:
        """Refuse models that the method cannot merge."""

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Return what merges one piece of these models, or by name what makes each of several.

        The place for a first pass, ``inputs.survey``, where the method needs a statistic of the
        whole model. What is found is kept in what is returned, never in ``self``: the weights are
        computed later, when they are read.
        """
        return same_for_all(self.merge_tensor)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the merged entry ``key``.

        It is called from several threads, and must not write to what it is given.

        Args:
            key: the entry's name.
            tensors: in float32, one a model, all of one shape; a tensor is converted each time
                that it is taken out of the sequence. With ``elementwise`` they are 1-d pieces of
                the flattened entry.
            base: the pretrained model's; ``None`` where there is none.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither merge_tensor nor merger.")

    def run(
        self, modelpool: ModelPool | Mapping[str, nn.Module], fabric: "Fabric | None" = None
    ) -> Fused:
        """Merge the pool's models.

        Args:
            modelpool: the models.
            fabric: whose device ``heavy`` methods use, if the pool's policy names no other.

        Returns:
            For a pool, weights whose entries are computed when they are read. For a dict of
            modules a state dict. The modules stay as they are, unless ``inplace`` is set: then the
            merged values are written to the pretrained model's tensors, or without one to the
            first model's. A method that makes several models returns either by name.

        Raises:
            FusionBenchError: an empty pool, a missing pretrained model, weights that differ in
                keys, shapes or dtypes.
        """
        pool = ModuleDict(modelpool) if isinstance(modelpool, Mapping) else modelpool
        inputs = self.inputs(pool, fabric)
        merger = self.merger(inputs)
        if isinstance(merger, Mapping):
            family = {name: MergedWeights(inputs, own) for name, own in merger.items()}
            if not isinstance(modelpool, Mapping):
                return family
            return {name: in_memory(weights) for name, weights in family.items()}
        lazy = MergedWeights(inputs, merger)
        if not isinstance(modelpool, Mapping):
            return lazy
        merged = in_memory(lazy)
        if self.inplace:
            target = inputs.aligned.reference
            merged = {key: target[key].copy_(tensor) for key, tensor in merged.items()}
        return merged

    def inputs(self, pool: ModelPool, fabric: "Fabric | None" = None) -> Inputs:
        """Return the pool's models, aligned and checked; of no weight more than its shape is read.

        Raises:
            FusionBenchError: as ``run``.
        """
        refuse_without_pretrained(self, pool)
        policy = pool.policy
        if self.heavy and fabric is not None and policy.device == "cpu":
            policy = replace(policy, device=str(fabric.device))
        inputs = Inputs(
            aligned(pool, policy),
            policy,
            self.elementwise,
            not self.shows_nonfinite,
            self.show_pbar,
        )
        self.check(inputs)
        return inputs


def aligned(
    pool: ModelPool,
    policy: MergePolicy | None = None,
    models: Mapping[str, Weights] | None = None,
) -> Aligned:
    """Align a pool's models, or what was made of them, by its own policy or another.

    Raises:
        FusionBenchError: as ``align``, and models that differ in what besides weights decides what
            they compute.
    """
    base = pool.weights("_pretrained_") if pool.has_pretrained else None
    models = models or {name: pool.weights(name) for name in pool.model_names}
    found = align(models, base, policy or pool.policy, pool.vocabulary)
    refuse_disagreeing(pool)
    return found


def refuse_disagreeing(pool: ModelPool) -> None:
    """Refuse models that compute unlike, weights aside; warn of what differs and may.

    Raises:
        FusionBenchError: what the pool's policy does not allow.
    """
    if isinstance(pool, Comparing):
        told = set(pool.notes)
        for note in pool.compare():
            if note not in told:
                log.warning("%s", note)


def refuse_without_pretrained(method: object, pool: ModelPool) -> None:
    """Refuse a pool without the pretrained model where the method needs it.

    Raises:
        FusionBenchError: there is none.
    """
    if getattr(method, "needs_pretrained", False) and not pool.has_pretrained:
        raise FusionBenchError(
            f"{type(method).__name__} needs the pretrained model: "
            "add '_pretrained_' to modelpool.models."
        )
