r"""Layers of several models, one slice after another.

Each slice is merged by a method of its own. With copied slices that is depth up-scaling:
Kim et al., Simple yet effective depth up-scaling, https://arxiv.org/abs/2312.15166
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.base import refuse_disagreeing, run
from fusion_bench.method.contract import Data, FusionMethod, ModelPool, Needs, Outlining, Ran
from fusion_bench.method.plain import class_name
from fusion_bench.method.slices import BASE, Slice, check_names, read_slices
from fusion_bench.method.stack import Part, Stack, reference_of
from fusion_bench.problems import FusionBenchError, Place
from fusion_bench.weights import Model, Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


class StackedLayers:
    """A model of layers of several models, in any number and order.

    What is in front of the layers comes from the first slice, what is behind them from the last, by
    that slice's method. The config is that of the pretrained model, or else of the first, with the
    new number of layers.

    Args:
        slices: each a mapping: ``models``, name to ``[first, end]`` or null for all layers;
            ``base``, the model that is the slice's pretrained one, by default ``_pretrained_``
            where the method needs one; ``base_method``; and ``stack``, of models with several: a
            name or the beginning of one, such as ``decoder``, or several of which one fits. It may
            also be of entries outside of layers, such as ``shared``.
        base_method: merges the slices without their own; one model is copied by default.

    Raises:
        FusionBenchError: with each mistake.
    """

    @keeps_arguments
    def __init__(self, slices: Sequence[Mapping[str, Any]], base_method: object = None):
        self.slices = slices
        self.base_method = base_method
        self._slices = read_slices(slices, base_method)

    @property
    def needs(self) -> Needs:
        """What the slices' methods ask for."""
        return Needs(base=any(one.base == BASE for one in self._slices), alike=False)

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse slices that the models do not have, or that make no model; no weight is read.

        Raises:
            FusionBenchError: unknown models, stacks or layers, layers that a slice's method cannot
                merge, or that no config describes.
        """
        check_names(self._slices, pool)
        if not pool.weights(reference_of(pool)):  # nothing but the names is known
            return
        stack = Stack(self._slices, pool)
        for part in stack.parts:
            with _placed(part.slice):
                part.slice.method.check_pool(part.pool)
        stack.config()
        for warning in stack.warnings():
            log.warning(warning)

    def slice_methods(self, pool: ModelPool) -> list[tuple[FusionMethod, ModelPool, Place]]:
        """Return the method of each slice, the layers that it merges, and its place."""
        parts = Stack(self._slices, pool).parts
        return [(part.slice.method, part.pool, part.slice.method_place) for part in parts]

    def described(self, pool: ModelPool) -> str:
        """Return which layers the merged model has, and its size."""
        made = self.outline(pool)
        weights = made.weights if isinstance(made, Model) else made
        own = [weights.spec(key).numel for key in weights if weights.tied_to(key) == key]
        return f"{Stack(self._slices, pool).described()}; {_amount(sum(own))} parameters"

    def outline(self, pool: ModelPool) -> Weights | Model:
        """Return the merged model's shapes, types, origins and config; no weight is read."""
        check_names(self._slices, pool)
        stack = Stack(self._slices, pool)
        return stack.model([_outlined(part) for part in stack.parts])

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights | Model:
        """Return the new model, whose weights are computed when they are read.

        Args:
            pool: the models, which may have different numbers of layers.
            fabric: for the slices' methods.
            data: ignored.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        check_names(self._slices, pool)
        refuse_disagreeing(pool, layers=False)
        stack = Stack(self._slices, pool)
        merged = []
        for part in stack.parts:
            with _placed(part.slice):
                made = part.slice.method.fuse(part.pool, fabric)
            if not isinstance(made, Weights):
                raise FusionBenchError(
                    f"{class_name(part.slice.method)} returns no weights of one model.",
                    "Choose another method.",
                    place=part.slice.method_place,
                )
            merged.append(made)
        return stack.model(merged)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Stack a pool's layers, or those of a dict of modules, which become a state dict."""
        return run(self, modelpool, fabric, data)


@contextmanager
def _placed(one: Slice) -> Iterator[None]:
    """Put the place of a slice before that of its problems, or that of its method."""
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(
            problem.inside(*(one.method_place if problem.place else one.place))
            for problem in error.problems
        )
        raise


def _outlined(part: Part) -> Weights:
    method = part.slice.method
    if not isinstance(method, Outlining):
        return part.pool.reference
    with _placed(part.slice):
        made = method.outline(part.pool)
    return made.weights if isinstance(made, Model) else made


def _amount(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
