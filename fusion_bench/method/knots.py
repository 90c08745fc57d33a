r"""KnOTS: merge with another method, in directions common to all models.

Side by side, $[\tau_1 \dots \tau_T] = U \Sigma [V_1^\top \dots V_T^\top]$; the other method $f$
merges what is left of the task vectors, $\tau = U f(\Sigma V_1^\top, \dots, \Sigma V_T^\top)$.
Stoica et al., Model merging with SVD to tie the KnOTS, https://arxiv.org/abs/2410.19735
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.problems import FusionBenchError, check_between, within
from fusion_bench.weights import (
    Inputs,
    MergePiece,
    MergePolicy,
    Model,
    Origin,
    TensorSpec,
    Weights,
)
from fusion_bench.weights.matrices import column_space, is_matrix
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.scratch import Scratch
from fusion_bench.weights.stream import threads_for


@dataclass(eq=False)
class KnOTSMerging(TensorwiseAlgorithm):
    """The pretrained model plus the aligned task vectors, merged by another method.

    Entries that are not matrices are passed to the other method unchanged.

    Args:
        base_method: the other method; by default TIES. It gets the aligned task vectors as models,
            and zeros as the pretrained model.
        scaling_factor: scaling factor of the change.
        exclude_keys: keys or key patterns of matrices that are not aligned.
        rank_tol: directions whose singular value is at most this share of the largest are left out.
    """

    needs_pretrained = True
    heavy = True

    base_method: object = None
    scaling_factor: float = 1.0
    exclude_keys: Sequence[str] | None = None
    rank_tol: float = 1e-5

    def __post_init__(self) -> None:
        check_between("rank_tol", self.rank_tol, 0, 1)
        with within("base_method"):
            made = instantiate(self.base_method, "method") or TiesMergingAlgorithm()
            if not isinstance(made, TensorwiseAlgorithm) or made.needs.split is not None:
                raise FusionBenchError(
                    f"{type(made).__name__} does not merge weights tensor by tensor.",
                    "Choose another method.",
                )
        self.base_method = self._base = made

    def check(self, inputs: Inputs) -> None:
        """Refuse what the base method cannot merge."""
        with within("base_method"):
            self._base.resolved(inputs)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of what finding a matrix's directions takes beyond its share."""
        beyond = [0]
        for key in inputs:
            shape = inputs.spec(key).shape
            if is_matrix(key, shape, self.exclude_keys or ()):
                rows, columns = shape
                side_by_side = columns * len(inputs.names)
                found = min(rows, side_by_side)
                taken = 24 * found**2 + (16 * rows * found if rows > side_by_side else 0)
                beyond.append(taken - inputs.cost(key).peak_bytes)
        return max(beyond) * threads_for(inputs)

    def merger(self, inputs: Inputs) -> MergePiece | Mapping[str, MergePiece]:
        """Merge the aligned task vectors with the base method, and transform the result back."""
        alignment = _Alignment(inputs, self.exclude_keys or (), self.rank_tol)
        with within("base_method", keyed_only=True):
            fused = self._base.fuse(_AlignedPool(alignment))
        assert not isinstance(fused, Model)
        if isinstance(fused, Weights):
            return self._turned_back(alignment, fused)
        return {name: self._turned_back(alignment, own) for name, own in fused.items()}

    def _turned_back(self, alignment: "_Alignment", fused: Weights) -> MergePiece:
        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            spec = fused.spec(key)
            merged = fused.read(key, 0, spec.numel).view(spec.shape)
            u = alignment.entry(key).u
            merged = merged if u is None else u @ merged
            return merged.to(base).mul_(self.scaling_factor).add_(base)

        return merge


@dataclass(frozen=True)
class _Entry:
    """An entry of all models, with the common directions as columns; a matrix has some."""

    key: str
    tensors: Sequence[Tensor]
    base: Tensor
    u: Tensor | None

    def aligned(self, model: int) -> Tensor:
        """Return a model's task vector, by its parts in the common directions."""
        vector = self.tensors[model] - self.base
        return vector if self.u is None else self.u.T @ vector


class _Alignment:
    """The common directions of each matrix: the left singular vectors of all its task vectors.

    The base method may look at an entry several times, and each time at one model after the other.
    So the directions are put aside, and each thread has its last entry at hand.
    """

    def __init__(self, inputs: Inputs, exclude_keys: Sequence[str], rank_tol: float):
        self.inputs = inputs
        self._exclude_keys = exclude_keys
        self._rank_tol = rank_tol
        self._ranks: dict[str, int] = {}
        self._directions = Scratch()
        self._at_hand = threading.local()
        inputs.survey(self._find)

    def entry(self, key: str) -> _Entry:
        """Return an entry, with its directions."""
        key = self.inputs.tied_to(key)
        last: _Entry | None = getattr(self._at_hand, "entry", None)
        if last is None or last.key != key:
            tensors, base = self.inputs.read(key, 0, self.inputs.merged(key))
            assert base is not None
            u = self._directions.get(key).to(base) if key in self._ranks else None
            last = self._at_hand.entry = _Entry(key, tensors, base, u)
        return last

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of an entry's aligned task vectors."""
        shape = self.inputs.shape(key, 0, self.inputs.merged(key))
        rank = self._ranks.get(self.inputs.tied_to(key))
        return shape if rank is None else (rank, *shape[1:])

    def _find(self, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        assert base is not None
        if is_matrix(key, base.shape, self._exclude_keys):
            rows, columns = base.shape
            vectors = task_vectors(key, start, tensors, base)
            u = column_space(vectors, (rows, columns * len(tensors)), self._rank_tol)
            self._directions.put(key, u.to(base))
            self._ranks[key] = u.shape[1]


class _AlignedPool:
    """A pool of aligned task vectors, with zeros as the pretrained model."""

    has_pretrained = True
    vocabulary = None

    def __init__(self, alignment: _Alignment):
        self._alignment = alignment
        self.model_names = alignment.inputs.names
        self.policy = MergePolicy(on_nonfinite="warn", device=alignment.inputs.policy.device)

    def weights(self, name: str) -> Weights:
        """Return what is computed when it is read."""
        model = None if name == "_pretrained_" else self.model_names.index(name)
        return _Aligned(self._alignment, model)

    def model(self, name: str) -> Model:
        """Return the same, without a config."""
        return Model(self.weights(name), None, "aligned task vectors")

    def load_model(self, name: str) -> nn.Module:
        """Refuse: aligned task vectors are not a module's weights."""
        raise FusionBenchError(
            "This method needs modules, but aligned task vectors have no modules."
        )

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Refuse: aligned task vectors are not weights of a module."""
        return self.load_model("")


class _Aligned(Weights):
    """One model's aligned task vectors; without a model, zeros of the same shapes."""

    in_pieces = False

    def __init__(self, alignment: _Alignment, model: int | None):
        self._alignment = alignment
        self._model = model
        inputs = alignment.inputs
        everything = [inputs.aligned.reference, *inputs.aligned.models.values()]
        self._specs = {
            key: TensorSpec(
                alignment.shape(key),
                torch.float64
                if any(weights.spec(key).dtype == torch.float64 for weights in everything)
                else torch.float32,
            )
            for key in inputs
            if inputs.merged(key)
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all models: they share the directions."""
        return self._alignment.inputs.files

    def __getitem__(self, key: str) -> Tensor:
        spec = self._specs[key]
        if self._model is None:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        return self._alignment.entry(key).aligned(self._model).to(spec.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Return a shape with as many rows as there are directions."""
        return self._specs[key]

    def tied_to(self, key: str) -> str:
        """Return the first key of an entry that is tied in every model."""
        return self._alignment.inputs.tied_to(key)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries of all models: they share the directions."""
        return self._alignment.inputs.origins(key)
