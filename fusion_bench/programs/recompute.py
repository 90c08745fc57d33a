"""Computes entries of a saved merge again, from its recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from fusion_bench.instantiate import instantiate
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.plain import as_method, class_name
from fusion_bench.problems import ResultError
from fusion_bench.programs.environment import make_fabric
from fusion_bench.programs.fusing import MERGED, fuse, seeded, weights_of
from fusion_bench.programs.pools import Shortening, placed
from fusion_bench.weights import Weights
from fusion_bench.weights.stream import PIECE

#: Pieces of one entry that are computed again.
_PIECES = 4
#: Packages whose classes a card may name: a stranger has written it.
_KNOWN = ("fusion_bench.method.", "fusion_bench.modelpool.")


class NotComputed(ResultError):  # noqa: N818 (it is no fault of the user)
    """A merge that is not computed again, so that its weights are not verified."""


@dataclass(frozen=True)
class _Difference:
    """How far an entry is from the computed one.

    Attributes:
        key: the entry.
        dtype: its type.
        compared: how many elements were compared.
        differing: how many of them are not equal.
        beyond: how many are further apart than rounding explains.
        largest: the largest difference, in terms of the entry's largest value.
    """

    key: str
    dtype: torch.dtype
    compared: int
    differing: int
    beyond: int
    largest: float

    @property
    def is_rounding(self) -> bool:
        """Whether another processor's order of summation explains it.

        Rounded to 16 bits, its result is another one where it is close to the middle between two.
        """
        rare = self.dtype.itemsize >= 4 or self.differing <= max(2, self.compared // 100)
        return rare and not self.beyond


def recompute(folder: Path, config: Mapping[str, Any], entries: int | None) -> str:
    """Compare saved entries with computed ones; return in a sentence how equal they are.

    Args:
        folder: the saved model, whose sources are on this machine.
        config: the run's config, from the recipe.
        entries: how many to compute, evenly spread over the model; ``None`` computes all.

    Raises:
        FusionBenchError: a recipe that does not work.
        NotComputed: a method that learns, or a class that is not called.
        ResultError: an entry that is not what the recipe gives.
    """
    if unknown := sorted(_foreign(config.get("method")) | _foreign(config.get("modelpool"))):
        raise NotComputed(
            f"The recipe names '{unknown[0]}', which is not run: the card may be a stranger's."
        )
    method = as_method(instantiate(seeded(config["method"], config.get("seed")), "method"))
    if method.needs.split is not None:
        raise NotComputed(
            f"{class_name(method)} learns from data, so the weights are not computed again. "
            "'fusion_bench reproduce' of its report does it."
        )
    node = {"_recursive_": False, **config["modelpool"]}
    own = instantiate(node, "modelpool")
    pool = placed(own)
    products = fuse(method, pool, make_fabric({"accelerator": "cpu"}), None)
    # One of several of a family's has the names of both.
    name = unquote(folder.name).rpartition("/")[2]
    product = products.get(MERGED, products.get(f"{MERGED}/{name}"))
    made = None if product is None else weights_of(product)
    if made is None:
        raise NotComputed(
            f"{class_name(method)} makes no weights that could be computed one by one."
        )
    if isinstance(own, Shortening):
        made = own.as_saved(made)
    saved = pool.open_saved(folder)
    if missing := sorted(set(made) ^ set(saved)):
        raise ResultError(f"'{folder}' is not that merge: '{missing[0]}' is only in one of both.")
    keys = [key for key in made if made.tied_to(key) == key]
    count = len(keys) if entries is None else min(entries, len(keys))
    spread = [keys[index * len(keys) // count] for index in range(count)]
    chosen = list(dict.fromkeys([*spread, *_computed(made, keys)[:count]]))
    # Factorisations differ by more between processors than sums do.
    tolerance = 1e-4 if isinstance(method, TensorwiseAlgorithm) and method.heavy else 1e-6
    most = None if entries is None else _PIECES
    found = [_compared(key, made, saved, tolerance, most) for key in chosen]
    if bad := [one for one in found if not one.is_rounding]:
        raise ResultError(
            f"'{folder}' is not the merge of its recipe: {len(bad)} of {count} entries that were "
            "computed again differ.",
            details=[
                f"'{one.key}': {one.differing:,} of {one.compared:,} elements, by up to "
                f"{one.largest:.2g} of its largest value"
                for one in bad
            ],
        )
    count, differing = len(found), sum(one.differing for one in found)
    equal = "bit for bit" if not differing else f"but for rounding in {differing:,} elements"
    part = "" if entries is None else ", of each up to a million elements"
    return (
        f"{count} of {len(keys)} entries, computed again from the recipe{part}, are equal {equal}."
    )


def _computed(made: Weights, keys: Sequence[str]) -> list[str]:
    """Return the entries that are no function of entries of their own shape, such as routers."""
    return [
        key
        for key in keys
        if all(o.weights.spec(o.key).shape != made.spec(key).shape for o in made.origins(key))
    ]


@torch.no_grad()
def _compared(
    key: str, made: Weights, saved: Weights, tolerance: float, most: int | None
) -> _Difference:
    """Compare an entry, or so many pieces of it at most, evenly spread."""
    spec, stored = made.spec(key), saved.spec(key)
    if spec != stored:
        raise ResultError(
            f"'{key}' is {list(stored.shape)} {stored.dtype}; the recipe gives "
            f"{list(spec.shape)} {spec.dtype}."
        )
    pieces = list(made.pieces(key, PIECE))
    if most is not None and len(pieces) > most:
        pieces = [pieces[index * len(pieces) // most] for index in range(most)]
    compared = differing = beyond = 0
    largest = scale = 0.0
    for start, stop in pieces:
        own = made.read(key, start, stop).to("cpu", spec.dtype).double()
        gap = (own - saved.read(key, start, stop).double()).abs()
        compared += len(own)
        differing += int(torch.count_nonzero(gap))
        if len(own):
            largest, scale = max(largest, float(gap.max())), max(scale, float(own.abs().max()))
        beyond += int((gap > _rounding(own, spec.dtype, tolerance)).sum())
    relative = largest / scale if scale else largest
    return _Difference(key, spec.dtype, compared, differing, beyond, relative)


def _rounding(values: Tensor, dtype: torch.dtype, tolerance: float) -> Tensor:
    """Return how far elements may be apart: a step of 16 bits, or some of a wider type."""
    if not dtype.is_floating_point or not len(values):
        return torch.zeros_like(values)
    eps = torch.finfo(dtype).eps
    if dtype.itemsize < 4:
        return eps * values.abs() + torch.finfo(dtype).smallest_normal
    return 16 * eps * values.abs() + tolerance * values.abs().max()


def _foreign(node: object) -> set[str]:
    """Return the classes of a config that are none of ours."""
    if isinstance(node, list):
        return set().union(*map(_foreign, node))
    if not isinstance(node, Mapping):
        return set()
    own = {str(node["_target_"])} if "_target_" in node else set()
    found = {target for target in own if not target.startswith(_KNOWN)}
    return found.union(*map(_foreign, node.values()))
