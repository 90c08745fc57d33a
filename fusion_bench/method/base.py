"""Base class of tensorwise fusion methods."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, replace
from inspect import signature
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.forms import rule_problem
from fusion_bench.method.contract import (
    Comparing,
    Data,
    FusionMethod,
    ModelPool,
    Needs,
    Partial,
    Product,
    Ran,
)
from fusion_bench.method.per_model import of_each, per_model_options
from fusion_bench.method.plain import refuse_without_pretrained
from fusion_bench.method.rules import Rule
from fusion_bench.method.where import Resolved, by_model, resolve
from fusion_bench.problems import FusionBenchError, Problems
from fusion_bench.weights import (
    Aligned,
    Config,
    Cut,
    Inputs,
    MergedWeights,
    MergePiece,
    MergePolicy,
    Model,
    TensorWeights,
    Weights,
    align,
    in_memory,
    is_special,
    predicted_peak,
    same_for_all,
)
from fusion_bench.weights.config import plain

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


class ModuleDict:
    """A model pool from a dict of modules, ``{"_pretrained_": m0, "a": m1}``."""

    policy = MergePolicy()
    vocabulary = None

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self.model_names = [name for name in modules if not is_special(name)]
        self.has_pretrained = "_pretrained_" in modules

    def weights(self, name: str) -> Weights:
        """Return a view of the module's state dict."""
        return TensorWeights(self._modules[name].state_dict())

    def load_model(self, name: str) -> nn.Module:
        """Return the module itself."""
        return self._modules[name]

    def model(self, name: str) -> Model:
        """Return the module's weights, with its config where it has one."""
        module = self._modules[name]
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        config = None if to_dict is None else plain(to_dict())
        return Model(self.weights(name), config, type(module).__name__)

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Return a copy of the pretrained module, or else of the first, with these weights."""
        name = "_pretrained_" if self.has_pretrained else self.model_names[0]
        module = deepcopy(self._modules[name])
        module.load_state_dict(dict(weights.weights if isinstance(weights, Model) else weights))
        return module.eval()


class TensorwiseAlgorithm:
    """A method that merges each tensor separately.

    Subclasses implement ``merge_tensor``, or ``merger`` where they need to see the whole models
    first. Those that need the pretrained model set ``needs_pretrained``, and those whose result at
    each element depends on that element alone set ``elementwise``. Where NaN or infinity in a model
    always shows in the result, as in a weighted sum, ``shows_nonfinite`` saves looking for it
    twice. ``heavy`` ones, which factorise matrices or descend gradients, compute where Fabric
    computes.

    Most subclasses are dataclasses, whose fields are their options. The options of every method are
    added to these, as the last ones.

    Args:
        show_pbar: show a progress bar.
        inplace: of modules given as a dict, write to the pretrained one, or else to the first.
        where: rules that give options other values in some entries: under ``match`` a key pattern
            or a list of them, and the options. The first rule that matches and sets an option is
            used. A value may be a ``gradient`` along the layers. A pattern that matches nothing is
            refused, but in a rule that is ``optional``.
    """

    needs_pretrained = False
    elementwise = False
    heavy = False
    shows_nonfinite = False
    show_pbar = True
    inplace = False
    where: Sequence[Rule] = ()

    @keeps_arguments
    def __init__(
        self, show_pbar: bool = True, inplace: bool = False, *, where: Sequence[Rule] = ()
    ):
        self.show_pbar = show_pbar
        self.inplace = inplace
        self.where = where

    def __init_subclass__(cls) -> None:
        """Add the options of every method to a dataclass's own."""
        last = {"show_pbar": bool, "inplace": bool, "_": KW_ONLY, "where": Sequence[Rule]}
        cls.__annotations__ = {**cls.__annotations__, **last}

    @property
    def needs(self) -> Needs:
        """What the method asks for."""
        return Needs(base=self.needs_pretrained)

    def check(self, inputs: Inputs) -> None:
        """Refuse models that the method cannot merge."""

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return how an entry may be cut without a change of the result.

        ``elements``: anywhere; ``rows``: into slices along the first dimension, which keep their
        other dimensions; ``whole``: not at all. What is not cut takes memory for all of it.
        """
        return "elements" if self.elementwise else "whole"

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Return the function that merges a piece, or a dict of functions for several models.

        The place for a first pass, where the method needs a statistic: of the whole model by
        ``inputs.survey``, of each entry by ``inputs.each``, and by what
        ``fusion_bench.weights.statistics`` makes of these. What is found is kept in what is
        returned, never in ``self``: the weights are computed later, when they are read.
        """
        return same_for_all(self.merge_tensor)

    def merge_tensor(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the merged entry ``key``.

        It is called from several threads, and must not write to what it is given.

        Args:
            key: the entry's name.
            tensors: in float32, one per model, all of one shape; a tensor is converted each time it
                is taken from the sequence. With ``elementwise`` they are 1-d pieces of the
                flattened entry.
            base: the pretrained model's tensor, or ``None``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merge_tensor or merger.")

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models that cannot be merged; of no weight more than its shape is read.

        Raises:
            FusionBenchError: an empty pool, a missing pretrained model, weights that differ in
                keys, shapes or dtypes.
        """
        self.inputs(pool)

    def outline(self, pool: ModelPool) -> Weights:
        """Return the result's shapes, types and origins; no weight is read.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        return MergedWeights(self.inputs(pool), _unread)

    def predicted_peak(self, inputs: Inputs) -> int:
        """Return the bytes of anonymous memory that merging to a disk takes at most, by headers.

        What the program has before it begins, some 0.4 GB with torch, comes on top.
        """
        return predicted_peak(MergedWeights(inputs, _unread)) + self.kept_bytes(inputs)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of what first passes find and keep, beside the pieces; by headers."""
        return 0

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights | Mapping[str, Weights]:
        """Return the merged weights, whose entries are computed when they are read.

        Args:
            pool: the models.
            fabric: whose device ``heavy`` methods use, if the pool's policy names no other.
            data: ignored.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        return self.merged(self.inputs(pool, fabric))

    def merged(self, inputs: Inputs) -> Weights | Mapping[str, Weights]:
        """Return the merged weights of models that are aligned already."""
        merger = resolve(self, inputs).merger(inputs) if self.where else self.merger(inputs)
        if isinstance(merger, Mapping):
            return {name: MergedWeights(inputs, own) for name, own in merger.items()}
        return MergedWeights(inputs, merger)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Merge a pool's models, or a dict's.

        Returns:
            For a pool, the result of ``fuse``. For a dict of modules, a state dict, or several by
            name. The modules are not changed, unless ``inplace`` is set: then the merged values are
            written to the tensors of the pretrained model, or of the first model if there is none.

        Raises:
            FusionBenchError: as ``fuse``, and ``inplace`` where there are several results.
        """
        if not self.inplace or not isinstance(modelpool, Mapping):
            return run(self, modelpool, fabric, data)
        pool = ModuleDict(modelpool)
        fused = self.fuse(pool, fabric, data)
        if not isinstance(fused, Weights):
            raise FusionBenchError(
                f"{type(self).__name__} makes {len(fused)} models, and only one can be written in "
                "place.",
                "Remove it.",
                place=("inplace",),
            )
        target = pool.weights("_pretrained_" if pool.has_pretrained else pool.model_names[0])
        return {key: target[key].copy_(tensor) for key, tensor in in_memory(fused).items()}

    def inputs(self, pool: ModelPool, fabric: "Fabric | None" = None) -> Inputs:
        """Return the pool's models, aligned and checked; of no weight more than its shape is read.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        return inputs_of([self], pool, fabric)

    def resolved(self, inputs: Inputs) -> Resolved:
        """Return the options of each entry, as far as they differ by entry or by model.

        Raises:
            FusionBenchError: rules and options that do not fit the models, and what ``check``
                refuses.
        """
        names = signature(type(self)).parameters
        wrong = (rule_problem(name, own) for name, own in vars(self).items() if name in names)
        Problems(filter(None, wrong)).raise_all()
        if self.where:
            return resolve(self, inputs)
        self.check_options(inputs)
        return Resolved((), by_model(self, inputs), ())

    def check_options(self, inputs: Inputs) -> None:
        """Refuse options that do not fit the models, and what ``check`` refuses.

        Raises:
            FusionBenchError: they do not.
        """
        for option in sorted(per_model_options(type(self))):
            of_each(getattr(self, option), inputs.names, option)
        self.check(inputs)


def inputs_of(
    methods: Sequence[TensorwiseAlgorithm], pool: ModelPool, fabric: "Fabric | None" = None
) -> Inputs:
    """Return a pool's models, aligned and checked for several methods, all ``heavy`` or none.

    Raises:
        FusionBenchError: as ``check_pool`` of one of them.
    """
    policy, heavy = pool.policy, any(own.heavy for own in methods)
    for own in methods:
        refuse_without_pretrained(own, pool)
    if heavy and fabric is not None and policy.device == "cpu":
        policy = replace(policy, device=str(fabric.device))
    found = aligned(pool, policy)
    asked = Inputs(found, policy)
    variants = [
        one
        for own in methods
        for one in [variant.method for variant in own.resolved(asked).variants] or [own]
    ]

    def strictest(key: str, shape: Sequence[int]) -> Cut:
        """Return how all of the methods may cut, for one may look at the others' entries."""
        own = {method.cut(key, shape) for method in variants}
        return "whole" if "whole" in own else "rows" if "rows" in own else "elements"

    return Inputs(
        found,
        policy,
        all(own.elementwise for own in variants),
        not all(own.shows_nonfinite for own in variants),
        any(own.show_pbar for own in methods),
        strictest,
        one_by_one=heavy,
    )


def _unread(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    raise RuntimeError(f"'{key}' of an outline has no values.")


def run(
    method: FusionMethod,
    modelpool: ModelPool | Mapping[str, nn.Module],
    fabric: "Fabric | None" = None,
    data: Data | None = None,
) -> Ran:
    """Fuse a pool's models; of a dict of modules merged weights become plain state dicts."""
    if not isinstance(modelpool, Mapping):
        return method.fuse(modelpool, fabric, data)
    fused = method.fuse(ModuleDict(modelpool), fabric, data)
    if isinstance(fused, Mapping) and not isinstance(fused, Weights):
        return {name: _in_memory(part) for name, part in fused.items()}
    return _in_memory(fused)


def _in_memory(product: Product) -> dict[str, Tensor] | nn.Module:
    if isinstance(product, Model):
        product = product.weights
    return in_memory(product) if isinstance(product, Weights) else product


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

    def config_of(name: str) -> Config | None:
        return pool.model(name).config

    found = align(models, base, policy or pool.policy, pool.vocabulary, config_of)
    refuse_disagreeing(pool)
    return replace(found, elsewhere=pool.elsewhere) if isinstance(pool, Partial) else found


def refuse_disagreeing(pool: ModelPool, *, layers: bool = True) -> None:
    """Refuse models that compute unlike, weights aside; warn of what differs and may.

    Args:
        pool: the models.
        layers: whether they must have the same layers.

    Raises:
        FusionBenchError: what the pool's policy does not allow.
    """
    if isinstance(pool, Comparing):
        known = set(pool.notes)
        for note in pool.compare(layers=layers):
            if note not in known:
                log.warning("%s", note)
