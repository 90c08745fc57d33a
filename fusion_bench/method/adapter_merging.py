r"""Merging LoRA adapters in their factors, $\sum_i w_i s_i B_i A_i$, as PEFT's weighted adapters.

``cat`` puts the factors side by side, ``svd`` shortens these, ``linear`` sums the factors, with
$\sqrt{|w_i s_i|}$ before each. Mangrulkar et al., PEFT, https://github.com/huggingface/peft
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fusion_bench.method.base import aligned, run
from fusion_bench.method.contract import Data, ModelPool, Needs, Ran
from fusion_bench.method.per_model import PerModel, of_each
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.weights import MergePolicy, Weights
from fusion_bench.weights.lowrank import Factors, LowRankWeights, Truncation, shortened

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Combination = Literal["cat", "svd", "linear"]


@dataclass(eq=False)
class AdapterMerging:
    """The weighted sum of LoRA adapters, in their factors and without their base.

    Args:
        combination: ``cat`` is exact, and its rank is the sum of the adapters' ranks; ``svd`` is
            the best approximation of a rank; ``linear`` sums the factors, which is another thing
            than the sum of the products, and needs equal ranks.
        weights: one for each adapter by name, or a list in the pool's order; 1 each if there are
            none.
        rank: with ``svd`` the largest rank; by default the largest of the adapters', or no limit
            with ``energy``.
        energy: with ``svd`` the smallest rank is taken that keeps this share of the squared
            singular values, from 0 to 1.
    """

    combination: Combination = "cat"
    weights: PerModel | None = None
    rank: int | None = None
    energy: float | None = None

    needs_pretrained = False
    needs = Needs()

    def __post_init__(self) -> None:
        check_choice("combination", self.combination, Combination)
        self._truncation = Truncation(self.rank, self.energy)
        for name in ("rank", "energy"):
            given = self.rank if name == "rank" else self.energy
            if given is not None and self.combination != "svd":
                raise FusionBenchError(
                    f"'{self.combination}' does not shorten factors.",
                    "Remove it, or choose {above}combination=svd.",
                    place=(name,),
                )

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse what are no adapters, and weights that are not one for each.

        Raises:
            FusionBenchError: one of these.
        """
        known = {name: pool.weights(name) for name in pool.model_names}
        of_each(self.weights, list(known), "weights")
        if any(len(own) and not isinstance(own, LowRankWeights) for own in known.values()):
            raise FusionBenchError(
                "AdapterMerging merges adapters, and these are whole models.",
                "Choose modelpool=AdapterPool/_template with adapters, or another method.",
            )
        if all(map(len, known.values())):
            aligned(pool)
            self._refuse_ranks(_low_rank(pool))

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights:
        """Return the merged products, with their factors.

        Raises:
            FusionBenchError: as ``check_pool``; NaN or infinity, if the policy does not allow them.
        """
        self.check_pool(pool)
        adapters = _low_rank(pool)
        values = of_each(self.weights, pool.model_names, "weights")
        weights = dict(zip(pool.model_names, values, strict=True))
        first = next(iter(adapters.values()))
        factors, errors, vectors = {}, {}, {}
        for key in first:
            for name, own in adapters.items():
                _check_finite(name, own, key, pool.policy)
            parts = [
                (weights[n], own.factors[key]) for n, own in adapters.items() if key in own.factors
            ]
            if not parts:
                size = first.spec(key).numel
                vectors[key] = sum(
                    (weights[n] * own.read(key, 0, size) for n, own in adapters.items()),
                    torch.zeros(size),
                )
            elif self.combination == "linear":
                factors[key] = _summed(parts)
            else:
                factors[key] = _side_by_side(parts)
                if self.combination == "svd":
                    factors[key], errors[key] = shortened(factors[key], self._limits(adapters))
        specs = {key: first.spec(key) for key in first}
        files = tuple(file for own in adapters.values() for file in own.files)
        origins = {
            key: tuple(origin for own in adapters.values() for origin in own.origins(key))
            for key in first
        }
        return LowRankWeights(specs, factors, vectors, files, origins, errors)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Merge a pool's adapters."""
        return run(self, modelpool, fabric, data)

    def _limits(self, adapters: Mapping[str, LowRankWeights]) -> Truncation:
        if self.rank is None and self.energy is None:
            return Truncation(
                max(f.rank for own in adapters.values() for f in own.factors.values())
            )
        return self._truncation

    def _refuse_ranks(self, adapters: Mapping[str, LowRankWeights]) -> None:
        """Refuse factors that cannot be summed."""
        for key in next(iter(adapters.values())) if self.combination == "linear" else ():
            ranks = {n: own.factors[key].rank for n, own in adapters.items() if key in own.factors}
            if len(set(ranks.values())) > 1:
                said = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
                raise FusionBenchError(
                    f"the adapters have different ranks for '{key}' ({said}), and 'linear' sums "
                    "factors of one rank.",
                    "Choose cat or svd.",
                    place=("combination",),
                )


def _check_finite(name: str, adapter: LowRankWeights, key: str, policy: MergePolicy) -> None:
    """Refuse, or tell, NaN and infinity in an adapter's part of an entry."""
    own = adapter.factors.get(key)
    parts = [] if own is None else [own.b, own.a]
    if own is None and adapter.origins(key):
        parts = [adapter[key]]
    if all(bool(part.isfinite().all()) for part in parts):
        return
    reason = f"the adapter '{name}' has NaN or infinity in '{key}'."
    if policy.on_nonfinite == "error":
        remedy = f"Use a valid adapter, or set {policy.typed('on_nonfinite', 'warn')}."
        raise FusionBenchError(reason, remedy)
    log.warning("%s", reason[0].upper() + reason[1:])


def _low_rank(pool: ModelPool) -> dict[str, LowRankWeights]:
    known = {name: pool.weights(name) for name in pool.model_names}
    return {name: own for name, own in known.items() if isinstance(own, LowRankWeights)}


def _side_by_side(parts: Sequence[tuple[float, Factors]]) -> Factors:
    b = torch.cat([own.b.float() for _, own in parts], dim=1)
    return Factors(b, torch.cat([own.a.float() * (weight * own.scale) for weight, own in parts]))


def _summed(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Return sums of the factors; the sign of a negative weight goes to PEFT's A."""
    sides = []
    for side in "ba":
        total = torch.zeros(())
        for weight, own in parts:
            scale = weight * own.scale
            has_sign = (side == "b") == own.embedding
            root = math.sqrt(abs(scale)) * (math.copysign(1, scale) if has_sign else 1)
            total = total + root * (own.b if side == "b" else own.a).float()
        sides.append(total)
    b, a = sides
    return Factors(b, a)
