r"""Extraction of a LoRA adapter from a full model: $\theta - \theta_0 \approx BA$, layer by layer.

$B = U \sqrt{S}$ and $A = \sqrt{S} V^\top$ of the truncated singular value decomposition, the best
approximation of its rank (Eckart and Young, 1936). Hu et al., LoRA, https://arxiv.org/abs/2106.09685
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.adapter_outline import AdapterEntry, AdapterOutline, entry_of
from fusion_bench.method.base import aligned, run
from fusion_bench.method.contract import (
    Arranging,
    Data,
    FusionMethod,
    ModelPool,
    Needs,
    Outlining,
    Ran,
)
from fusion_bench.method.differing import Differing
from fusion_bench.method.modules import Layer, layers_of
from fusion_bench.method.plain import Runs, as_method, class_name, refuse_without_pretrained
from fusion_bench.problems import FusionBenchError, ResultError, check_choice, within
from fusion_bench.progress import quiet_libraries, step
from fusion_bench.threads import threads_each
from fusion_bench.weights import (
    AdapterWeights,
    Model,
    Weights,
    align,
    matches,
    zeros_like,
)
from fusion_bench.weights.adapter_builder import AdaptedModel, Adapter, AdapterBuilder
from fusion_bench.weights.lowrank import Factors, Truncation

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Embeddings = Literal["whole", "factors"]
_WITH_FACTORS = ("linear", "convolution")
#: So many modules that stay as they are in the base are named in the log.
_NAMED = 5


@dataclass(eq=False)
class ExtractLora:
    """The pretrained model with the change of one model as a LoRA adapter.

    It is evaluated as a model, and saved as an adapter in PEFT's layout. Layers get factors;
    embeddings, norms and all else that is no layer get a copy, if they have changed.

    Args:
        base_method: a method whose result is the model; without it the pool has one model.
        rank: the largest rank of a layer's factors; ``None`` is 32, or no limit with ``energy``.
        energy: the smallest rank is taken that keeps this share of the squared singular values,
            from 0 to 1.
        epsilon: singular values that are not greater are left out.
        embeddings: whether embeddings and the head are copied ``whole``, or get ``factors``.
        exclude_keys: keys or key patterns of entries that stay as they are in the pretrained model.
        power_iterations: with a number, the SVD is randomised, with so many power iterations.
    """

    needs_pretrained = True

    base_method: object = None
    rank: int | None = None
    energy: float | None = None
    epsilon: float = 0.0
    embeddings: Embeddings = "whole"
    exclude_keys: Sequence[str] = ()
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        self._truncation = Truncation(self.rank, self.energy, self.epsilon, self.power_iterations)
        check_choice("embeddings", self.embeddings, Embeddings)
        self._base: FusionMethod | None = None
        if self.base_method is not None:
            with within("base_method"):
                made = instantiate(self.base_method, "method")
            if not isinstance(made, Runs):
                reason = f"{self.base_method!r} is not a method."
                raise FusionBenchError(reason, place=("base_method",))
            self.base_method = self._base = as_method(made)

    @property
    def needs(self) -> Needs:
        """What the base method asks for, and the pretrained model."""
        if self._base is None:
            return Needs(base=True)
        needs = self._base.needs
        return replace(needs, base=True, split_place=("base_method", *needs.split_place))

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse what the base method cannot merge, and several models without one.

        Raises:
            FusionBenchError: one of these, or weights that differ in keys or shapes.
        """
        refuse_without_pretrained(self, pool)
        if self._base is not None:
            with within("base_method"):
                self._base.check_pool(pool)
            return
        if len(pool.model_names) != 1:
            raise FusionBenchError(
                f"there are {len(pool.model_names)} models, and an adapter is extracted from one.",
                "Name one, or choose the method that merges them with {here}base_method.",
            )
        aligned(pool)

    def described(self, pool: ModelPool) -> str:
        """Return what is made, and of which rank."""
        largest = self._truncation.largest
        rank = "of any rank" if largest is None else f"of a rank up to {largest}"
        return f"a LoRA adapter {rank}; what has not changed makes it smaller than told"

    def outline(self, pool: ModelPool) -> Weights:
        """Return what the adapter has at most, as if all had changed; no weight is read.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        self.check_pool(pool)
        names = pool.model_names
        if self._base is None:
            models = [pool.weights(names[0])]
        elif isinstance(self._base, Outlining):
            with within("base_method", keyed_only=True):
                models = [self._weights(self._base.outline(pool))]
        else:
            models = [pool.weights(name) for name in names]
        base, module = _as_built(pool, pool.weights("_pretrained_"))
        models = [_as_built(pool, model)[0] for model in models]
        layers = layers_of(module, base)
        transposed = any(layer.transposed for layer in layers)
        embeddings = self._factors_embeddings(layers)
        entries: dict[str, AdapterEntry] = {}
        for layer in layers:
            kept = self._kept(layer.keys.values())
            factors = self._wants_factors(layer, transposed, embeddings)
            for part, key in layer.keys.items() if kept else ():
                spec = base.spec(key)
                dtype = pool.policy.torch_dtype or models[0].spec(key).dtype
                rank = self._truncation.largest if factors and part == "weight" else 0
                entries[f"{layer.name}.{part}"] = entry_of(key, spec.shape, dtype, rank)
        return AdapterOutline(entries, base, *models)

    def _factors_embeddings(self, layers: Sequence[Layer]) -> bool:
        """Return whether embeddings may get factors: PEFT knows none beside changed biases."""
        return self.embeddings == "factors" and not self._kept(_biases(layers))

    def _wants_factors(self, layer: Layer, transposed: bool, embeddings: bool) -> bool:
        """Return whether a layer is of a kind that gets factors, if its shapes are the base's."""
        if layer.kind == "embedding" or layer.is_head:
            wanted = embeddings
        else:
            wanted = layer.kind in _WITH_FACTORS
        return wanted and (layer.kind != "linear" or layer.transposed == transposed)

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> AdaptedModel | Mapping[str, AdaptedModel]:
        """Extract the adapter, module by module.

        Args:
            pool: the models.
            fabric: whose device factorises, if the pool's policy names no other.
            data: for a base method that learns from it.

        Raises:
            FusionBenchError: as ``check_pool``; a base method that does not return weights.
            ResultError: a model that is its base.
        """
        self.check_pool(pool)
        if self._base is None:
            return self._extracted(pool, pool.weights(pool.model_names[0]), fabric)
        with within("base_method", keyed_only=True):
            fused = self._base.fuse(pool, fabric, data)
        if isinstance(fused, Weights | Model | nn.Module):
            return self._extracted(pool, self._weights(fused), fabric)
        return {
            name: self._extracted(pool, self._weights(own), fabric) for name, own in fused.items()
        }

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Extract from a pool's models, or from a dict of modules; of these it is a state dict."""
        return run(self, modelpool, fabric, data)

    def _weights(self, fused: Weights | Model | nn.Module) -> Weights:
        if isinstance(fused, Weights):
            return fused
        assert self._base is not None
        what = "a model of another form" if isinstance(fused, Model) else "a module"
        raise FusionBenchError(
            f"{class_name(self._base)} makes {what}, of which no adapter can be made.",
            "Choose another method.",
            place=("base_method",),
        )

    def _extracted(self, pool: ModelPool, model: Weights, fabric: "Fabric | None") -> AdaptedModel:
        base = pool.model("_pretrained_")
        # What was merged may be stored in another type than the models.
        policy = replace(pool.policy, on_dtype="cast")
        base_weights, module = _as_built(pool, base.weights)
        model, _ = _as_built(pool, model)
        found = align({"model": model}, base_weights, policy, pool.vocabulary)
        device = torch.device(policy.device)
        if fabric is not None and device.type == "cpu":
            device = fabric.device
        quiet_libraries()
        differing = Differing(found, policy, device)
        adapter = self._adapter(module, layers_of(module, base_weights), differing)
        model.verify()
        weights = AdapterWeights(base_weights, adapter.tensors, adapter.config)
        return AdaptedModel(weights, base.config, base.kind, base.companions, adapter=adapter)

    def _adapter(self, module: nn.Module, layers: Sequence[Layer], model: Differing) -> Adapter:
        transposed = any(layer.transposed for layer in layers)
        covered = {key for layer in layers for key in layer.keys.values()}
        covered |= {f"{layer.name}.{part}" for layer in layers for part in layer.keys}
        if lost := [key for key in self._kept(model.outside(covered)) if model.differs(key)]:
            raise FusionBenchError(
                f"'{lost[0]}' has changed, and the model's class has no layer with that entry.",
                "Leave it out with {here}exclude_keys, or merge without an adapter.",
            )
        builder = AdapterBuilder(transposed=transposed)
        gets_factors = self._getting_factors(layers, model, transposed)
        left: list[str] = []

        def begun(layer: Layer) -> Callable[[], None]:
            """Begin with a layer, and return what adds it to the adapter."""
            kept = self._kept(layer.keys.values())
            changed = [key for key in kept if model.differs(key)]
            if changed and gets_factors(layer):
                found = threads.submit(self._factorised, layer, changed, model)
                return lambda: self._add(builder, layer, *found.result())
            if changed:
                return partial(builder.whole, layer.name, model.only(changed, layer), layer.keys)
            if len(kept) < len(layer.keys) and any(map(model.differs, layer.keys.values())):
                left.append(layer.name)
                return partial(builder.left, layer.name)
            return lambda: None

        total = sum(model.bytes_of(layer) for layer in layers)
        # What is drawn at random is drawn by one thread.
        count = 1 if self.power_iterations is not None else model.threads
        with (
            step("Extracting", total, "B") as work,
            threads_each(torch.get_num_threads() // count),
            ThreadPoolExecutor(count) as threads,
        ):
            under_way = deque[tuple[Layer, Callable[[], None]]]()

            def finish() -> None:
                layer, add = under_way.popleft()
                work.detail = layer.name
                add()
                work.advance(model.bytes_of(layer))

            for layer in layers:
                under_way.append((layer, begun(layer)))
                if len(under_way) > count:
                    finish()
            while under_way:
                finish()
        if left:
            more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            named = ", ".join(left[:_NAMED])
            log.warning("These modules stay as they are in the base: %s%s.", named, more)
        if not builder.has_factors:
            raise ResultError(
                "No layer of the model differs from the pretrained model, so that there is nothing "
                "to extract.",
                "Name a model that was fine-tuned from it.",
            )
        return builder.build([name for name, _ in module.named_modules(remove_duplicate=False)])

    def _getting_factors(
        self, layers: Sequence[Layer], model: Differing, transposed: bool
    ) -> Callable[[Layer], bool]:
        """Return the function that tells whether a layer gets factors, if it has changed.

        An adapter stores all its matrices in one way, and PEFT knows no biases of factors beside
        factors of an embedding.
        """
        embeddings = self.embeddings == "factors"
        if embeddings and any(map(model.differs, self._kept(_biases(layers)))):
            embeddings = False
            log.warning(
                "Embeddings are copied whole: biases have changed, and PEFT knows no adapter with "
                "factors of embeddings and changed biases."
            )

        def gets_factors(layer: Layer) -> bool:
            wanted = self._wants_factors(layer, transposed, embeddings)
            return wanted and model.has_shapes(layer)

        return gets_factors

    def _kept(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if not matches(key, self.exclude_keys)]

    @torch.no_grad()
    def _factorised(
        self, layer: Layer, changed: Sequence[str], model: Differing
    ) -> tuple[Factors, float, Sequence[int], Tensor | None]:
        """Return a layer's factors, of rank 1 where only its bias has changed; and the bias."""
        key = layer.keys["weight"]
        matrix = model.change(key) if key in changed else model.zeros(key)
        kernel = matrix.shape[2:]
        matrix = (matrix.T if layer.transposed else matrix).flatten(1)
        if not matrix.isfinite().all():
            raise FusionBenchError(f"'{key}' has NaN or infinity, in the model or in its base.")
        factors = self._truncation.factors(matrix)
        if not factors.rank:  # PEFT knows no rank of 0
            factors = Factors(
                matrix.new_zeros(len(matrix), 1), matrix.new_zeros(1, matrix.shape[1])
            )
        factors = factors.to(model.dtype(key))
        shift = None
        if layer.kind != "embedding" and (bias := layer.keys.get("bias")):
            shift = model.change(bias) if bias in changed else model.zeros(bias)
        return factors, factors.error(matrix), kernel, shift

    @staticmethod
    def _add(
        builder: AdapterBuilder,
        layer: Layer,
        factors: Factors,
        error: float,
        kernel: Sequence[int],
        bias: Tensor | None,
    ) -> None:
        if layer.kind == "embedding":
            builder.embedding(layer.name, factors, error=error)
        else:
            builder.factors(layer.name, factors, error=error, kernel=kernel, bias=bias)


def _biases(layers: Sequence[Layer]) -> list[str]:
    """Return the keys of the biases of layers that get factors."""
    return [o.keys["bias"] for o in layers if o.kind in _WITH_FACTORS and "bias" in o.keys]


def _as_built(pool: ModelPool, weights: Weights) -> tuple[Weights, nn.Module]:
    """Return weights as the entries of the pool's class, and a module of it."""
    if isinstance(pool, Arranging):
        return pool.as_built(weights)
    return weights, pool.build_model(zeros_like(weights))
