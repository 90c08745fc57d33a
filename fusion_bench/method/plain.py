"""Adapts any object with a ``run`` to a fusion method."""

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from fusion_bench.method.contract import Data, Fused, FusionMethod, ModelPool, Needs, Product
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Model, TensorWeights, Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@runtime_checkable
class Runs(Protocol):
    """The interface that an object needs to be a method."""

    def run(self, modelpool: ModelPool) -> object:
        """Return tensors by key, a module, or several of either by name."""


class PlainMethod:
    """An object whose ``run`` merges a pool; optional attributes state its requirements.

    Args:
        method: may have ``needs_pretrained``, ``needs_data`` with ``split``, ``needs_own_data`` and
            ``uses_labels``. Its ``run`` takes the pool, and ``fabric`` and ``data`` if it likes.
    """

    def __init__(self, method: Runs):
        self.method = method

    @property
    def needs(self) -> Needs:
        """What the object says; models that it has to see as weights are compared by itself."""
        learns = self._says("needs_data")
        return Needs(
            base=self._says("needs_pretrained"),
            weights=learns,
            split=getattr(self.method, "split", None) if learns else None,
            own_data=self._says("needs_own_data"),
            labels=self._says("uses_labels"),
        )

    def _says(self, name: str) -> bool:
        return bool(getattr(self.method, name, False))

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse a pool without a required pretrained model."""
        refuse_without_pretrained(self, pool)

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Fused:
        """Return what ``run`` does; state dicts become weights, and names within names one."""
        offered = {"fabric": fabric, "data": data}
        taken = signature(self.method.run).parameters
        result = self.method.run(pool, **{k: v for k, v in offered.items() if k in taken})
        models = _named(result)
        return models[""] if list(models) == [""] else models

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Fused:
        """Return what ``fuse`` does, for a pool."""
        assert not isinstance(modelpool, Mapping)
        return self.fuse(modelpool, fabric, data)


def as_method(made: object) -> FusionMethod:
    """Return an object as a fusion method.

    Raises:
        FusionBenchError: it cannot be run.
    """
    if isinstance(made, FusionMethod) and not _fuses_in_run(type(made)):
        return made
    if isinstance(made, Runs):
        return PlainMethod(made)
    raise FusionBenchError(f"{made!r} is not a method.")


def class_name(method: FusionMethod) -> str:
    """Return a method's name for messages."""
    return type(method.method if isinstance(method, PlainMethod) else method).__name__


def refuse_without_pretrained(method: FusionMethod, pool: ModelPool) -> None:
    """Refuse a pool without a pretrained model if the method needs it.

    Raises:
        FusionBenchError: there is none.
    """
    if method.needs.base and not pool.has_pretrained:
        raise FusionBenchError(
            f"{class_name(method)} needs the pretrained model.",
            "Add '_pretrained_' to the pool's models.",
        )


def _fuses_in_run(own: type) -> bool:
    """Return whether a class overrides ``run`` but not ``fuse``."""
    run, fuse = (next(c for c in own.__mro__ if name in vars(c)) for name in ("run", "fuse"))
    return run is not fuse and issubclass(run, fuse)


def _named(result: object, name: str = "") -> dict[str, Product]:
    """Return by name what a ``run`` returned: weights, a module, or a family of either.

    Raises:
        FusionBenchError: it returned something else.
    """
    if isinstance(result, nn.Module | Weights | Model):
        return {name: result}
    if not isinstance(result, Mapping):
        raise FusionBenchError(
            f"its run returned {result!r}.", "Return tensors by key, a module, or these by name."
        )
    if all(isinstance(value, Tensor) for value in result.values()):
        return {name: TensorWeights(result)}
    parts = [_named(part, f"{name}/{own}" if name else own) for own, part in result.items()]
    return {key: model for part in parts for key, model in part.items()}
