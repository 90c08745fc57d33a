"""What every method of one tensor at a time has in common."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_bench.errors import FusionBenchError
from fusion_bench.weights.align import Aligned, MergePolicy, align, shortened
from fusion_bench.weights.mapping import TensorSpec, Weights

log = logging.getLogger(__name__)

#: The types that the mathematics happens in.
_WIDE = (torch.float32, torch.float64)
#: ``merge_tensor(key, tensors, base)``: one float32 tensor from the same entry of every model.
MergeTensor = Callable[[str, Sequence[Tensor], Tensor | None], Tensor]


def merge(
    models: Mapping[str, Weights],
    merge_tensor: MergeTensor,
    base: Weights | None = None,
    *,
    elementwise: bool = False,
    linear: bool = False,
    policy: MergePolicy | None = None,
    vocabulary: int | None = None,
    show_progress: bool = False,
) -> "MergedWeights":
    """Return the merged weights; their entries are computed when they are read.

    Args:
        models: name to weights; their order is that of ``tensors`` in ``merge_tensor``.
        merge_tensor: the method. It must not write to what it is given, and may be called from
            several threads.
        base: the pretrained model.
        elementwise: each merged element depends on the same element of every model alone, so that
            ``merge_tensor`` may be given 1-d pieces of an entry.
        linear: it is their weighted sum, so that NaN or infinity in a model shows in the result.
        policy: what to do where models differ.
        vocabulary: the reference's number of tokens, for ``policy.on_vocabulary``.
        show_progress: show a bar while they are read.

    Raises:
        FusionBenchError: as ``align``.
    """
    policy = policy or MergePolicy()
    aligned = align(models, base, policy, vocabulary)
    return MergedWeights(aligned, merge_tensor, elementwise, linear, policy, show_progress)


class MergedWeights(Weights):
    """Weights that are merged when they are read, in the reference's order.

    Floating-point entries reach ``merge_tensor`` as float32 (float64 stays) and are rounded once,
    by whoever stores them as their ``spec`` says. Integer and boolean entries are the reference's.
    Entries that are tied in every model are merged once and stay tied.
    """

    def __init__(
        self,
        aligned: Aligned,
        merge_tensor: MergeTensor,
        elementwise: bool,
        linear: bool,
        policy: MergePolicy,
        show_progress: bool,
    ):
        self.in_pieces = elementwise
        self.show_progress = show_progress
        self._aligned = aligned
        self._linear = linear
        self._merge_tensor = merge_tensor
        self._policy = policy
        self._on_cpu = torch.device(policy.device).type == "cpu"
        self._names = list(aligned.models)
        self._inputs = list(aligned.models.values())
        self._nonfinite: dict[str, None] = {}  # an ordered set

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all models."""
        everything = [self._aligned.reference, *self._inputs]
        return tuple(dict.fromkeys(file for weights in everything for file in weights.files))

    def __getitem__(self, key: str) -> Tensor:
        spec = self.spec(key)
        return self.read(key, 0, spec.numel).to(spec.dtype, copy=True).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._aligned.reference)

    def __len__(self) -> int:
        return len(self._aligned.reference)

    def spec(self, key: str) -> TensorSpec:
        """Return the reference's shape, and the policy's dtype or the reference's."""
        spec = self._aligned.reference.spec(key)
        if spec.dtype.is_floating_point and self._policy.torch_dtype is not None:
            return TensorSpec(spec.shape, self._policy.torch_dtype)
        return spec

    def tied_to(self, key: str) -> str:
        """Return the first key of an entry that is tied in every model."""
        first = self._aligned.reference.tied_to(key)
        copied = self._aligned.copied
        tied = all(weights.tied_to(key) == weights.tied_to(first) for weights in self._inputs)
        return first if tied and (key in copied) == (first in copied) else key

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield pieces of a bounded size where that leaves the method's result alone."""
        whole = not self.in_pieces and key not in self._aligned.copied
        numel = self.spec(key).numel
        return super().pieces(key, max(numel, 1) if whole else size)

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of the entry in all models."""
        if key in self._aligned.copied:
            return self._aligned.reference.bytes_to_read(key)
        base = self._aligned.base
        return sum(w.bytes_to_read(key) for w in [*self._inputs, *([] if base is None else [base])])

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return merged elements, in float32 or float64."""
        reference = self._aligned.reference
        common = 0 if key in self._aligned.copied else self._common(key)
        if start >= common:
            return self._checked(key, reference.read(key, start, stop))
        if not self.in_pieces:
            merged = self._merged(key, 0, common)[start:stop]
        else:
            merged = self._merged(key, start, min(stop, common))
        if stop <= common:
            return merged
        rest = self._checked(key, reference.read(key, common, stop)).to(merged)
        return torch.cat([merged, rest])

    def verify(self) -> None:
        """Name the entries in which NaN or infinity was met.

        Raises:
            FusionBenchError: where there are some and the policy does not let them pass.
        """
        if not self._nonfinite:
            return
        message = "NaN, infinity or overflow in\n  " + shortened(self._nonfinite)
        if self._policy.on_nonfinite == "warn":
            log.warning(message)
            return
        raise FusionBenchError(
            f"{message}\nUse sound checkpoints, a wider policy.dtype where the result alone is "
            "named, or give modelpool.policy.on_nonfinite=warn."
        )

    def _common(self, key: str) -> int:
        """Return how many elements of the entry all models have."""
        spec = self._aligned.reference.spec(key)
        rows = self._aligned.common_rows.get(key)
        return spec.numel if rows is None else spec.numel // spec.shape[0] * rows

    def _merged(self, key: str, start: int, stop: int) -> Tensor:
        shape: tuple[int, ...] = (stop - start,)
        stored = [weights.read(key, start, stop) for weights in self._inputs]
        base = self._aligned.base
        if base is not None:
            stored.append(base.read(key, start, stop))
        if not self.in_pieces:
            shape = self._aligned.reference.spec(key).shape
            if (rows := self._aligned.common_rows.get(key)) is not None:
                shape = (rows, *shape[1:])
            stored = [tensor.view(shape) for tensor in stored]
        # torch counts in-place changes; the first piece tells of all.
        versions = _versions(stored) if start == 0 else []
        tensors = _Working(self._working, key, self._names, stored[: len(self._names)])
        pretrained = None if base is None else self._working(key, "_pretrained_", stored[-1])
        merged = self._merge_tensor(key, tensors, pretrained)
        if versions and _versions(stored) != versions:
            raise RuntimeError(f"merge_tensor wrote to the tensors of '{key}' that it was given.")
        if merged.shape != shape:
            raise RuntimeError(
                f"merge_tensor made {list(merged.shape)} of '{key}', which is {list(shape)}."
            )
        merged = merged.reshape(-1)
        if not self._is_sound(key, merged) and self._linear:
            for name, tensor in zip([*self._names, "_pretrained_"], stored, strict=False):
                self._is_finite(key, name, tensor.float())
        return merged

    def _working(self, key: str, model: str, stored: Tensor) -> Tensor:
        """Return the values in the type and the place where the mathematics happens."""
        if not (self._on_cpu and stored.dtype in _WIDE and stored.is_cpu):
            dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
            stored = stored.to(self._policy.device, dtype)
        if not self._linear:
            self._is_finite(key, model, stored)
        return stored

    def _checked(self, key: str, copied: Tensor) -> Tensor:
        """Return elements of the reference, having looked at them."""
        if copied.dtype.is_floating_point and copied.numel():
            self._is_sound(key, copied if copied.dtype.itemsize >= 4 else copied.float())
        return copied

    def _is_sound(self, key: str, result: Tensor) -> bool:
        """Tell, and note, whether ``result`` is finite, also in the type that it is stored in."""
        if not self._is_finite(key, "merged", result):
            return False
        dtype = self.spec(key).dtype
        largest = torch.finfo(dtype).max
        # bfloat16 reaches as far as float32.
        narrower = dtype.itemsize < result.dtype.itemsize and dtype != torch.bfloat16
        if narrower and result.numel() and result.abs().amax() > largest:
            self._nonfinite[f"merged: '{key}' exceeds {dtype}"] = None
            return False
        return True

    def _is_finite(self, key: str, model: str, tensor: Tensor) -> bool:
        # The sum is a quick first look: it is finite only where all elements are.
        finite = math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())
        if not finite:
            self._nonfinite[f"{model}: '{key}'"] = None
        return finite


class _Working(Sequence[Tensor]):
    """The tensors of one entry, each converted when the method asks for it.

    So each is worked on while it is in the cache, and no more than one copy is held.
    """

    def __init__(
        self,
        convert: Callable[[str, str, Tensor], Tensor],
        key: str,
        names: Sequence[str],
        stored: Sequence[Tensor],
    ):
        self._convert = convert
        self._key = key
        self._names = names
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Working(self._convert, self._key, self._names[index], self._stored[index])
        return self._convert(self._key, self._names[index], self._stored[index])


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return torch's counts of in-place changes."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
