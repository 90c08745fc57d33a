r"""KnOTS: merge with another method, in directions common to all models.

Side by side, $[\tau_1 \dots \tau_T] = U \Sigma [V_1^\top \dots V_T^\top]$; the other method $f$
merges what is left of the task vectors, $\tau = U f(\Sigma V_1^\top, \dots, \Sigma V_T^\top)$.
Stoica et al., Model merging with SVD to tie the KnOTS, https://arxiv.org/abs/2410.19735
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.problems import FusionBenchError, check_between, within
from fusion_bench.weights import (
    Cut,
    Inputs,
    MergePiece,
    MergePolicy,
    Model,
    Origin,
    TensorSpec,
    Weights,
)
from fusion_bench.weights.entries import cut_of_matrices, folded
from fusion_bench.weights.matrices import (
    RESOLVED,
    add_gram,
    column_space,
    count_kept,
    is_matrix,
    mirrored,
    spectrum,
)
from fusion_bench.weights.ops import task_vectors
from fusion_bench.weights.scratch import Scratch, on_disk
from fusion_bench.weights.stream import PIECE, threads_for

#: Columns, or rows, of a large matrix that are converted at a time.
_AT_ONCE = 1024


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

    def cut(self, key: str, shape: Sequence[int]) -> Cut:
        """Return that of large tall matrices, such as embeddings, only rows stay whole."""
        found = cut_of_matrices(key, shape, self.exclude_keys or ())
        # Products of columns do not resolve smaller singular values.
        return "rows" if found == "rows" and self.rank_tol >= RESOLVED else "whole"

    def check(self, inputs: Inputs) -> None:
        """Refuse what the base method cannot merge."""
        with within("base_method"):
            self._base.resolved(inputs)

    def kept_bytes(self, inputs: Inputs) -> int:
        """Return the bytes of what finding a matrix's directions takes beyond its share.

        Or of what the base method keeps, which comes after it.
        """
        beyond, tall = [0], [0]
        for key in inputs:
            shape = inputs.spec(key).shape
            if is_matrix(key, shape, self.exclude_keys or ()):
                rows, columns = shape
                side_by_side = columns * len(inputs.names)
                if inputs.cut(key) == "rows":  # products of columns, and those with what is merged
                    tall.append(8 * side_by_side**2 + 24 * side_by_side * columns)
                    continue
                found = min(rows, side_by_side)
                taken = 24 * found**2 + (16 * rows * found if rows > side_by_side else 0)
                beyond.append(taken - inputs.cost(key).peak_bytes)
        return max(max(beyond) * threads_for(inputs), *tall, self._base.kept_bytes(inputs))

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
        def read(key: str) -> Tensor:
            spec = fused.spec(key)
            whole = torch.empty(spec.numel, dtype=spec.dtype)
            for start, stop in fused.pieces(key, PIECE):
                whole[start:stop] = fused.read(key, start, stop)
            return whole.view(spec.shape)

        factors = alignment.inputs.each(lambda entry: alignment.factor(next(iter(entry)), read))

        def merge(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            if alignment.inputs.cut(key) == "rows":
                merged = alignment.side_by_side(key, start, tensors, base) @ factors(key).to(base)
            else:
                u = alignment.directions(key)
                merged = read(key).to(base) if u is None else u.to(base) @ read(key).to(base)
            return merged.to(base).mul_(self.scaling_factor).add_(base)

        return merge


class _Alignment:
    """The common directions of each matrix: the left singular vectors of all its task vectors.

    These, and the task vectors' parts in them, are put aside on a disk, for the base method may
    look at them several times.

    Of a large tall matrix there are the right singular vectors instead. Those times the values are
    the aligned task vectors; and the rows of the result are those of the task vectors side by side
    times one matrix.
    """

    def __init__(self, inputs: Inputs, exclude_keys: Sequence[str], rank_tol: float):
        self.inputs = inputs
        self._exclude_keys = exclude_keys
        self._rank_tol = rank_tol
        self._ranks: dict[str, int] = {}
        self._aside = Scratch()
        self._right: dict[str, tuple[Tensor, Tensor]] = {}
        inputs.survey(self._find)
        find = inputs.each(self._find_right)
        for key in inputs:
            if inputs.cut(key) == "rows" and inputs.tied_to(key) == key and inputs.merged(key):
                self._right[key] = find(key)
                self._ranks[key] = len(self._right[key][0])

    def directions(self, key: str) -> Tensor | None:
        """Return the directions of a matrix that is whole, as columns; ``None`` of others."""
        key = self.inputs.tied_to(key)
        return self._aside.get(key) if key in self._ranks and key not in self._right else None

    def aligned(self, key: str, model: int, start: int, stop: int) -> Tensor:
        """Return elements of a model's flattened task vector, by its parts in the directions."""
        key = self.inputs.tied_to(key)
        if key not in self._ranks:
            tensors, base = self.inputs.read(key, start, stop)
            assert base is not None
            return tensors[model] - base
        if key not in self._right:
            return self._aside.get((key, model)).view(-1)[start:stop]
        columns = self.inputs.spec(key).shape[1]
        first, last = start // columns, -(-stop // columns)
        own = self._right[key][1][first:last, model * columns : (model + 1) * columns]
        return own.reshape(-1)[start - first * columns : stop - first * columns]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of an entry's aligned task vectors."""
        shape = self.inputs.shape(key, 0, self.inputs.merged(key))
        rank = self._ranks.get(self.inputs.tied_to(key))
        return shape if rank is None else (rank, *shape[1:])

    def factor(self, key: str, merged: Callable[[str], Tensor]) -> Tensor:
        """Return what rows of the task vectors side by side are multiplied by, of a tall matrix."""
        values, right = self._right[key]
        weighted = merged(key).to("cpu", torch.float64) / values[:, None].square()
        return torch.cat([part.double().T @ weighted for part in right.split(_AT_ONCE, dim=1)])

    @staticmethod
    def side_by_side(
        key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return rows of all task vectors side by side."""
        return torch.cat(list(task_vectors(key, start, tensors, base)), dim=1)

    def _find(self, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        assert base is not None
        if self.inputs.cut(key) != "rows" and is_matrix(key, base.shape, self._exclude_keys):
            rows, columns = base.shape
            vectors = task_vectors(key, start, tensors, base)
            u = column_space(vectors, (rows, columns * len(tensors)), self._rank_tol).to(base)
            self._aside.put(key, u)
            for model, vector in enumerate(task_vectors(key, start, tensors, base)):
                self._aside.put((key, model), u.T @ vector)
            self._ranks[key] = u.shape[1]

    def _find_right(self, entry: Inputs) -> tuple[Tensor, Tensor]:
        """Return the values and, each times its value, the right singular vectors as rows."""
        (key,) = entry
        size = entry.spec(key).shape[1] * len(entry.names)
        place = "cpu" if entry.policy.device == "mps" else entry.policy.device
        half = torch.zeros(size, size, dtype=torch.float64, device=place)
        half = folded(entry, lambda *piece: self.side_by_side(*piece).mT, add_gram, half)
        values, vectors = spectrum(
            mirrored(half), room=lambda *shape: on_disk(shape, torch.float64)
        )
        values = values[: count_kept(values, self._rank_tol)].cpu()
        right = on_disk((len(values), size), torch.float64 if entry.is_double else torch.float32)
        for start in range(0, len(values), _AT_ONCE):
            own = slice(start, min(start + _AT_ONCE, len(values)))
            right[own] = vectors[:, own].mT.cpu() * values[own, None]
        return values, right


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
        return self.read(key, 0, spec.numel).to(spec.dtype, copy=True).view(spec.shape)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements that are read, and of entries that are no matrix subtracted."""
        if self._model is None:
            return torch.zeros((), dtype=self._specs[key].dtype).expand(stop - start)
        return self._alignment.aligned(key, self._model, start, stop)

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
