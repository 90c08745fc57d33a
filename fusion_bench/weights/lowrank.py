r"""Matrices as products of two thin ones, $s\,BA$: by a truncated SVD, or from adapters."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fusion_bench.problems import ConfigError, FusionBenchError, check_between
from fusion_bench.weights.adapter import part_of
from fusion_bench.weights.adapter_config import AdapterConfig
from fusion_bench.weights.mapping import Origin, TensorSpec, Weights
from fusion_bench.weights.matrices import svd

#: The rank where neither a rank nor an energy is given.
DEFAULT_RANK = 32
#: Columns beyond the rank that a randomised SVD looks at.
_OVERSAMPLING = 8
_NO_PRODUCT = {
    "": "a copy of a whole tensor (modules_to_save, or trained biases)",
    "lora_magnitude_vector": "a magnitude of DoRA, which depends on the base",
    "delta": "a set of trained tokens (trainable_token_indices)",
    "original": "a set of trained tokens (trainable_token_indices)",
}
_WITH_BASE = (
    "Adapters can be merged without their base if they are nothing but products. Merge these as "
    "models on their base, and extract an adapter of the result."
)


@dataclass(frozen=True)
class Factors:
    """The matrix ``scale * b @ a``, of shape [m, n].

    Attributes:
        b: of shape [m, r].
        a: of shape [r, n].
        scale: a factor.
        embedding: whether it is that of an embedding [tokens, features], so that PEFT calls
            ``b`` A and ``a`` B.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The number r of columns of ``b``."""
        return len(self.a)

    def product(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of the matrix, in float32."""
        return (self.b[start:stop].float() * self.scale) @ self.a.float()

    def to(self, dtype: torch.dtype) -> "Factors":
        """Return the same with factors of a type, and the scale in ``b``."""
        return Factors((self.b * self.scale).to(dtype), self.a.to(dtype).contiguous())

    def error(self, matrix: Tensor) -> float:
        """Return the relative Frobenius error as a stand-in for a matrix; 0 for that of zeros."""
        norm = float(torch.linalg.vector_norm(matrix))
        return float(torch.linalg.vector_norm(matrix - self.product())) / norm if norm else 0.0


@dataclass(frozen=True)
class Truncation:
    """How many singular values of a matrix are kept.

    Args:
        rank: at most so many; with ``None`` 32, or any number where ``energy`` is given.
        energy: the fewest whose squares have this share of the sum of all squares, from 0 to 1.
        epsilon: only those that are greater.
        power_iterations: with a number, the SVD is randomised, with so many power iterations:
            faster for large matrices and a small rank, and less exact.

    Raises:
        FusionBenchError: an impossible value.
    """

    rank: int | None = None
    energy: float | None = None
    epsilon: float = 0.0
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "power_iterations"):
            value = getattr(self, name)
            least = 1 if name == "rank" else 0
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if value is not None and not whole:
                raise FusionBenchError(
                    f"{value!r} is not a whole number from {least} on.", place=(name,)
                )
        if self.energy is not None:
            check_between("energy", self.energy, 0, 1)
        check_between("epsilon", self.epsilon, 0, float("inf"))
        if self.power_iterations is not None and self.energy is not None:
            raise FusionBenchError(
                "a randomised SVD does not find all singular values, as an energy needs.",
                "Give a rank instead of the energy.",
                place=("power_iterations",),
            )

    @property
    def largest(self) -> int | None:
        """The largest rank; ``None`` without a limit."""
        return DEFAULT_RANK if self.rank is None and self.energy is None else self.rank

    def factors(self, matrix: Tensor) -> Factors:
        r"""Return $B = U \sqrt{S}$ and $A = \sqrt{S} V^\top$ of what is kept, in float32.

        Singular values that are at most a millionth of the largest are rounding errors, and are
        never kept; nothing is kept of a matrix with NaN or infinity.

        Args:
            matrix: of two dimensions.
        """
        u, s, vh = self._svd(matrix)
        count = int((s > self.epsilon).sum())
        if self.energy is not None and len(s):
            total = torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2
            # A share that rounding keeps from being reached takes all of them.
            short = (s.square().cumsum(0) < self.energy * total.to(s.device)).sum()
            count = min(count, int(short) + 1)
        root = s[:count].sqrt()
        return Factors((u[:, :count] * root).float(), (root[:, None] * vh[:count]).float())

    def _svd(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest = self.largest
        if largest is None or self.power_iterations is None or not matrix.isfinite().all():
            return svd(matrix, largest)
        seed = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)  # the same matrix has the same factors
            width = min(largest + _OVERSAMPLING, *matrix.shape)
            u, s, v = torch.svd_lowrank(matrix.float(), width, self.power_iterations)
        finally:
            torch.random.set_rng_state(seed)
        return u[:, :largest], s[:largest], v.T[:largest]


def shortened(factors: Factors, truncation: Truncation) -> tuple[Factors, float]:
    """Return the truncated SVD of a product, without the product itself, and its relative error.

    The error is the Frobenius norm of the singular values that are left out, as a share of all.

    Args:
        factors: of shapes [m, r] and [r, n], best with an r that is smaller than m and n.
        truncation: what is kept.
    """
    q, left = torch.linalg.qr(factors.b.double() * factors.scale)
    p, right = torch.linalg.qr(factors.a.double().T)
    core = left @ right.T
    inner = truncation.factors(core)
    kept = Factors((q @ inner.b.double()).float(), (inner.a.double() @ p.T).float())
    if not core.isfinite().all():
        return kept, math.nan
    values = torch.linalg.svdvals(core)
    norm = float(torch.linalg.vector_norm(values))
    lost = float(torch.linalg.vector_norm(values[kept.rank :]))
    return kept, lost / norm if norm else 0.0


class LowRankWeights(Weights):
    """Products of factors as entries, computed in float32 when they are read.

    Args:
        specs: all entries; those that have neither factors nor a vector are zeros.
        factors: those that are products; entries of more than two dimensions are matrices whose
            rows are flattened.
        vectors: those that are stored.
        files: what they were read from.
        origins: the stored entries that an entry is made of; by default none.
        errors: of factors that stand for other products, the relative Frobenius error.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        factors: Mapping[str, Factors],
        vectors: Mapping[str, Tensor],
        files: tuple[Path, ...] = (),
        origins: Mapping[str, tuple[Origin, ...]] | None = None,
        errors: Mapping[str, float] | None = None,
    ):
        self._specs = dict(specs)
        self._vectors = dict(vectors)
        self._files = files
        self.factors = dict(factors)
        self.errors = dict(errors or {})
        self._origins = dict(origins or {})

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the factors were read from."""
        return self._files

    def __getitem__(self, key: str) -> Tensor:
        spec = self._specs[key]
        return self.read(key, 0, spec.numel).to(spec.dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""
        return self._specs[key]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry, computed over the rows that hold them."""
        if key in self._vectors:
            return self._vectors[key].reshape(-1)[start:stop].float()
        if key not in self.factors:
            return torch.zeros(stop - start)
        columns = prod(self._specs[key].shape[1:])
        first = start // columns
        rows = self.factors[key].product(first, -(-stop // columns))
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the adapters' tensors that an entry is made of; of zeros none."""
        return self._origins.get(key, ())


def refuse_more_than_products(config: AdapterConfig) -> None:
    """Refuse an adapter whose settings say that it has more than products; nothing else is read.

    Raises:
        ConfigError: as said.
    """
    found = [f"modules_to_save ({', '.join(config.saved)})"] if config.saved else []
    found += ["use_dora"] if config.dora else []
    found += ["trainable_token_indices"] if config.tokens else []
    if found:
        raise ConfigError(f"its adapter_config.json has {' and '.join(found)}. {_WITH_BASE}")


@dataclass(frozen=True)
class AdapterParts:
    """An adapter's products by the keys that their layers' weights have in the base.

    Attributes:
        specs: the entries' shapes, in float32; embeddings are [tokens, features].
        factors: of the layers' weights.
        vectors: what is added to the layers' biases.
        embeddings: the keys of embeddings.
        origins: the adapter's tensors that an entry is made of.
        copies: the names of tensors that PEFT puts beside factors of an embedding: copies of the
            base's own.
    """

    specs: Mapping[str, TensorSpec]
    factors: Mapping[str, Factors]
    vectors: Mapping[str, Tensor]
    embeddings: frozenset[str]
    origins: Mapping[str, tuple[Origin, ...]]
    copies: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Weights, config: AdapterConfig) -> "AdapterParts":
        """Return the products of an adapter's tensors.

        Args:
            adapter: the tensors, in PEFT's layout.
            config: how they are to be applied.

        Raises:
            ConfigError: an adapter with more than products, such as DoRA or whole modules.
        """
        parts: dict[str, dict[str, str]] = {}
        copies = []
        for name in adapter:
            key, part = part_of(name)
            trained = name.removesuffix(".weight").endswith(config.saved)
            if not part and name.endswith(".weight") and not trained:
                copies.append(name)
                continue
            if reason := _NO_PRODUCT.get(part):
                raise ConfigError(f"'{name}' is {reason}. {_WITH_BASE}")
            parts.setdefault(key, {})[part] = name
        specs, factors, vectors, embeddings = {}, {}, {}, set()
        for key, own in parts.items():
            module = key.removesuffix(".weight").removesuffix(".bias")
            if "bias" in own:
                rank = adapter.spec(parts[f"{module}.weight"]["lora_A"]).shape[0]
                vectors[key] = adapter[own["bias"]].float() * config.scaling(module, rank)
                specs[key] = TensorSpec(tuple(vectors[key].shape), torch.float32)
                continue
            embedding = "lora_embedding_A" in own
            kind = "lora_embedding_" if embedding else "lora_"
            if lacking := {f"{kind}A", f"{kind}B"} - own.keys():
                raise ConfigError(f"The adapter is incomplete: '{key}' lacks '{min(lacking)}'.")
            a, b = (adapter[own[f"{kind}{side}"]] for side in "AB")
            rank, kernel = len(a), tuple(a.shape[2:])
            left, right = b.flatten(1), a.flatten(1)
            shape = (len(left), a.shape[1], *kernel)
            if left.shape[1] != rank:
                raise ConfigError(
                    f"The adapter is damaged: of '{key}' A has the rank {rank}, and B has "
                    f"{left.shape[1]}."
                )
            if embedding:
                embeddings.add(key)
                left, right, shape = right.T, left.T, (shape[1], shape[0])
            factors[key] = Factors(left, right, config.scaling(module, rank), embedding)
            specs[key] = TensorSpec(shape, torch.float32)
        origins = {
            key: tuple(Origin(adapter, name) for name in own.values()) for key, own in parts.items()
        }
        return cls(specs, factors, vectors, frozenset(embeddings), origins, tuple(copies))
