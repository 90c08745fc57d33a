"""Merging weights tensor by tensor."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights.align import MergePolicy, align, shortened
from fusion_bench.weights.inputs import Inputs
from fusion_bench.weights.mapping import Cost, Origin, TensorSpec, Weights
from fusion_bench.weights.stream import NotYet

log = logging.getLogger(__name__)

#: ``merge_tensor(key, tensors, base)``: one float32 tensor from the same entry of every model.
MergeTensor = Callable[[str, Sequence[Tensor], Tensor | None], Tensor]
#: ``merge_piece(key, start, tensors, base)``: the same, for elements from ``start`` on.
MergePiece = Callable[[str, int, Sequence[Tensor], Tensor | None], Tensor]


def same_for_all(merge_tensor: MergeTensor) -> MergePiece:
    """Return ``merge_tensor`` for pieces: it acts elementwise."""
    return lambda key, start, tensors, base: merge_tensor(key, tensors, base)


def merge(
    models: Mapping[str, Weights],
    merge_tensor: MergeTensor,
    base: Weights | None = None,
    *,
    elementwise: bool = False,
    shows_nonfinite: bool = False,
    policy: MergePolicy | None = None,
    vocabulary: int | None = None,
    show_progress: bool = False,
) -> "MergedWeights":
    """Return the merged weights; their entries are computed when they are read.

    Args:
        models: name to weights; their order is that of ``tensors`` in ``merge_tensor``.
        merge_tensor: the method. It must not change its inputs, and may be called from several
            threads.
        base: the pretrained model.
        elementwise: each merged element depends only on the same element of every model, so
            ``merge_tensor`` may get 1-d pieces of an entry.
        shows_nonfinite: NaN or infinity in a model shows in the result, as in a sum.
        policy: what to do when models differ.
        vocabulary: the reference's number of tokens, for ``policy.on_vocabulary``.
        show_progress: show a bar while they are read.

    Raises:
        FusionBenchError: as ``align``.
    """
    policy = policy or MergePolicy()
    aligned = align(models, base, policy, vocabulary)
    inputs = Inputs(aligned, policy, elementwise, not shows_nonfinite, show_progress)
    return MergedWeights(inputs, same_for_all(merge_tensor))


def changed(
    name: str, weights: Weights, policy: MergePolicy, change: MergePiece | None = None
) -> Weights:
    """Return one model's weights in the policy's type, each piece changed by ``change``.

    Args:
        name: the model, for messages.
        weights: its weights; they are returned where nothing changes.
        policy: what to do with NaN, and the type of the result.
        change: the only one of ``tensors`` is what it changes.
    """
    if change is None and policy.torch_dtype is None:
        return weights
    aligned = align({name: weights}, None, policy, None)
    inputs = Inputs(aligned, policy, True, True, weights.show_progress)
    return MergedWeights(inputs, change or (lambda key, start, tensors, base: tensors[0]))


class MergedWeights(Weights):
    """Weights that are merged when they are read, in the reference's order.

    ``merge_piece`` gets floating-point entries as float32 (float64 stays). They are rounded once to
    the type of their ``spec``, when they are stored. Integer and boolean entries are the
    reference's. Entries that are tied in every model are merged once and stay tied.
    """

    def __init__(self, inputs: Inputs, merge_piece: MergePiece):
        self.in_pieces = inputs.in_pieces
        self.show_progress = inputs.show_progress
        self._inputs = inputs
        self._reference = inputs.aligned.reference
        self._merge_piece = merge_piece

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all models."""
        return self._inputs.files

    def __getitem__(self, key: str) -> Tensor:
        spec = self.spec(key)
        return self.read(key, 0, spec.numel).to(spec.dtype, copy=True).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reference)

    def __len__(self) -> int:
        return len(self._reference)

    def spec(self, key: str) -> TensorSpec:
        """Return the reference's shape, and the policy's dtype or the reference's."""
        spec = self._reference.spec(key)
        dtype = self._inputs.policy.torch_dtype
        if spec.dtype.is_floating_point and dtype is not None:
            return TensorSpec(spec.shape, dtype)
        return spec

    def tied_to(self, key: str) -> str:
        """Return the first key of an entry that is tied in every model."""
        return self._inputs.tied_to(key)

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield pieces of a bounded size if this does not change the method's result."""
        common, numel = self._inputs.merged(key), self.spec(key).numel
        yield from self._inputs.pieces(key, size)
        for start in range(common, numel, size):
            yield start, min(start + size, numel)

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of the entry in all models."""
        return self._inputs.bytes_to_read(key)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries of all models."""
        return self._inputs.origins(key)

    def cost(self, key: str) -> Cost:
        """Return what merging the entry takes."""
        return self._inputs.cost(key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return merged elements, in float32 or float64."""
        try:
            return self._read(key, start, stop)
        except NotYet as missing:
            missing.find()
            return self._read(key, start, stop)

    def read_or_wait(self, key: str, start: int, stop: int) -> Tensor | None:
        """Return merged elements, if nothing is missing for them yet."""
        try:
            return self._read(key, start, stop)
        except NotYet:
            return None

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        key = self.tied_to(key)  # so that nothing depends on which of its names it is read by
        common = self._inputs.merged(key)
        if start >= common:
            return self._checked(key, self._reference.read(key, start, stop))
        grain = self._inputs.grain(key)
        first, last = start // grain * grain, -(-stop // grain) * grain
        merged = self._merged(key, first, min(last, common))[start - first : stop - first]
        if stop <= common:
            return merged
        rest = self._checked(key, self._reference.read(key, common, stop)).to(merged)
        return torch.cat([merged, rest])

    def verify(self) -> None:
        """Report the entries with NaN or infinity.

        Raises:
            FusionBenchError: there are some, and the policy does not allow them.
        """
        if not self._inputs.nonfinite:
            return
        message = "NaN, infinity or overflow in\n  " + shortened(self._inputs.nonfinite)
        if self._inputs.policy.on_nonfinite == "warn":
            log.warning(message)
            return
        raise FusionBenchError(
            f"{message}\nUse valid checkpoints, use a wider policy.dtype if only the result is "
            f"named, or set {self._inputs.policy.typed('on_nonfinite', 'warn')}."
        )

    def _merged(self, key: str, start: int, stop: int) -> Tensor:
        tensors, base = self._inputs.read(key, start, stop)
        # torch counts in-place changes; the first piece tells of all.
        versions = _versions(tensors.everything) if start == 0 else []
        merged = self._merge_piece(key, start, tensors, base)
        if versions and _versions(tensors.everything) != versions:
            raise RuntimeError(f"merge_tensor changed the input tensors of '{key}'.")
        shape = self._inputs.shape(key, start, stop)
        if merged.shape != shape:
            raise RuntimeError(
                f"merge_tensor returned the shape {list(merged.shape)} for '{key}', which has "
                f"{list(shape)}."
            )
        merged = merged.reshape(-1)
        if not self._is_finite(key, merged):
            self._inputs.find_nonfinite(key, tensors)
        return merged

    def _checked(self, key: str, copied: Tensor) -> Tensor:
        """Return checked elements of the reference."""
        if copied.dtype.is_floating_point and copied.numel():
            self._is_finite(key, copied if copied.dtype.itemsize >= 4 else copied.float())
        return copied

    def _is_finite(self, key: str, result: Tensor) -> bool:
        """Return and record whether ``result`` is finite, also in its stored type."""
        if not self._inputs.is_finite(key, "merged", result):
            return False
        dtype = self.spec(key).dtype
        largest = torch.finfo(dtype).max
        # bfloat16 reaches as far as float32.
        narrower = dtype.itemsize < result.dtype.itemsize and dtype != torch.bfloat16
        if narrower and result.numel() and result.abs().amax() > largest:
            self._inputs.nonfinite[f"merged: '{key}' exceeds {dtype}"] = None
            return False
        return True


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return torch's counts of in-place changes."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
