"""Computes entries of a saved merge again, from its recipe."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusion_bench.instantiate import instantiate
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


@dataclass(frozen=True)
class _Difference:
    """How far an entry is from the computed one, relative to its largest value."""

    key: str
    relative: float
    allowed: float


def recompute(folder: Path, config: Mapping[str, Any], entries: int | None) -> Iterator[str]:
    """Yield what became of the comparison of saved entries with computed ones, as sentences.

    Args:
        folder: the saved model, whose sources are on this machine.
        config: the run's config, from the recipe.
        entries: how many to compute, evenly spread over the model; ``None`` computes all.

    Raises:
        FusionBenchError: a recipe that does not work.
        ResultError: an entry that is not what the recipe gives.
    """
    if unknown := sorted(_foreign(config.get("method")) | _foreign(config.get("modelpool"))):
        yield f"The recipe names '{unknown[0]}', which is not run: the card may be a stranger's."
        return
    method = as_method(instantiate(seeded(config["method"], config.get("seed")), "method"))
    if method.needs.split is not None:
        yield (
            f"{class_name(method)} learns from data, so the weights are not computed again. "
            "'fusion_bench reproduce' of its report does it."
        )
        return
    node = {"_recursive_": False, **config["modelpool"]}
    own = instantiate(node, "modelpool")
    pool = placed(own)
    products = fuse(method, pool, make_fabric({"accelerator": "cpu"}), None)
    product = products.get(MERGED, products.get(f"{MERGED}/{folder.name}"))
    made = None if product is None else weights_of(product)
    if made is None:
        yield f"{class_name(method)} makes no weights that could be computed one by one."
        return
    if isinstance(own, Shortening):
        made = own.as_saved(made)
    saved = pool.open_saved(folder)
    if missing := sorted(set(made) ^ set(saved)):
        raise ResultError(f"'{folder}' is not that merge: '{missing[0]}' is only in one of both.")
    keys = [key for key in made if made.tied_to(key) == key]
    count = len(keys) if entries is None else min(entries, len(keys))
    chosen = [keys[index * len(keys) // count] for index in range(count)]
    found = [_compared(key, made, saved) for key in chosen]
    if bad := [own for own in found if not own.relative <= own.allowed]:
        raise ResultError(
            f"'{folder}' is not the merge of its recipe: {len(bad)} of {count} entries that were "
            "computed again differ.",
            details=[f"'{own.key}' by {own.relative:.2g} of its largest value" for own in bad],
        )
    largest = max(found, key=lambda own: own.relative)
    equal = "bit for bit" if largest.relative == 0 else f"to rounding ({largest.relative:.1g})"
    yield f"{count} of {len(keys)} entries, computed again from the recipe, are equal {equal}."


@torch.no_grad()
def _compared(key: str, made: Weights, saved: Weights) -> _Difference:
    """Compare some pieces of an entry."""
    spec, stored = made.spec(key), saved.spec(key)
    if spec != stored:
        raise ResultError(
            f"'{key}' is {list(stored.shape)} {stored.dtype}; the recipe gives "
            f"{list(spec.shape)} {spec.dtype}."
        )
    pieces = list(made.pieces(key, PIECE))
    step = max(1, len(pieces) // _PIECES)
    gap = largest = 0.0
    for start, stop in pieces[::step]:
        own = made.read(key, start, stop).to("cpu", spec.dtype).double()
        other = saved.read(key, start, stop).double()
        gap = max(gap, float((own - other).abs().max())) if len(own) else gap
        largest = max(largest, float(own.abs().max())) if len(own) else largest
    if not spec.dtype.is_floating_point:
        return _Difference(key, gap, 0.0)
    # Another processor sums in another order: one step of the stored type, or some of float32.
    allowed = max(torch.finfo(spec.dtype).eps, 1e-4 if spec.dtype.itemsize >= 4 else 0)
    return _Difference(key, gap / largest if largest else gap, allowed)


def _foreign(node: object) -> set[str]:
    """Return the classes of a config that are none of ours."""
    if isinstance(node, list):
        return set().union(*map(_foreign, node))
    if not isinstance(node, Mapping):
        return set()
    own = {str(node["_target_"])} if "_target_" in node else set()
    found = {target for target in own if not target.startswith(_KNOWN)}
    return found.union(*map(_foreign, node.values()))
