"""The same entry of every model, in the type and on the device of the computation."""

import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fusion_bench.weights.align import Aligned, MergePolicy
from fusion_bench.weights.crew import Crew, LastOne, PerKey
from fusion_bench.weights.mapping import Cost, Origin, TensorSpec
from fusion_bench.weights.stream import PIECE, visit

log = logging.getLogger(__name__)

#: Copies of a piece, in memory, beside those of the models, with what the allocator keeps for the
#: next one; of a matrix that is factorised, in float32; and of squares of its smaller side, beside
#: the models' own, in float64.
_COPIES, _WHOLE, _SQUARES = 20, 10, 4

T = TypeVar("T")
#: How an entry may be cut without a change of what is made of it: anywhere, into slices along the
#: first dimension, or not at all.
Cut = Literal["elements", "rows", "whole"]
#: How an entry of a key and a shape may be cut.
Cuts = Callable[[str, Sequence[int]], Cut]
#: What is done with a piece of an entry: its key, its first element, the models' tensors, and the
#: pretrained model's.
Visit = Callable[[str, int, Sequence[Tensor], Tensor | None], None]
#: What is made of a piece.
OfPiece = Callable[[str, int, Sequence[Tensor], Tensor | None], Tensor]


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Return whether a key matches one of the patterns; ``*`` matches anything."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


class Inputs:
    """Aligned models, read entry by entry.

    Args:
        aligned: the models.
        policy: where the mathematics happens.
        elementwise: entries may be read in 1-d pieces.
        look_for_nonfinite: look for NaN and infinity, which will not show in what is made.
        show_progress: show a bar while they are read.
        cuts: how each entry may be cut; by default anywhere with ``elementwise``, else not at all.
        one_by_one: pieces are worked on one after the other, each by all of torch's threads.
    """

    def __init__(
        self,
        aligned: Aligned,
        policy: MergePolicy,
        elementwise: bool = True,
        look_for_nonfinite: bool = True,
        show_progress: bool = False,
        cuts: Cuts | None = None,
        one_by_one: bool = False,
    ):
        self.aligned = aligned
        self.policy = policy
        self.names = list(aligned.models)
        self.show_progress = show_progress
        self.nonfinite: dict[str, None] = {}  # an ordered set of what was noticed
        self._look_for_nonfinite = look_for_nonfinite
        self._on_cpu = torch.device(policy.device).type == "cpu"
        self._inputs = list(aligned.models.values())
        self._all = [*self._inputs, *([] if aligned.base is None else [aligned.base])]
        self._elementwise = elementwise
        self._cuts = cuts
        self._one_by_one = one_by_one
        self._crew: Crew | None = None
        self._keys: Sequence[str] | None = None
        self._may_cut = all(weights.in_pieces for weights in self._all)
        self.in_pieces = (
            self._may_cut
            and not one_by_one
            and all(key in aligned.copied or self.cut(key) != "whole" for key in self)
        )
        self._asked: frozenset[str] | None = None
        self._remembered: dict[object, Any] = {}
        self._last: LastOne[tuple[Working, Tensor | None]] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all models."""
        everything = [self.aligned.reference, *self._inputs]
        return tuple(dict.fromkeys(file for weights in everything for file in weights.files))

    def __iter__(self) -> Iterator[str]:
        return iter(self.aligned.reference if self._keys is None else self._keys)

    def spec(self, key: str) -> TensorSpec:
        """Return the reference's shape and dtype."""
        return self.aligned.reference.spec(key)

    def tied_to(self, key: str) -> str:
        """Return the first key of an entry that is tied in every model."""
        first = self.aligned.reference.tied_to(key)
        copied = self.aligned.copied
        tied = all(weights.tied_to(key) == weights.tied_to(first) for weights in self._inputs)
        return first if tied and (key in copied) == (first in copied) else key

    def merged(self, key: str) -> int:
        """Return how many elements of an entry are merged: those that all models have."""
        if key in self.aligned.copied:
            return 0
        spec = self.spec(key)
        rows = self.aligned.common_rows.get(key)
        return spec.numel if rows is None else spec.numel // spec.shape[0] * rows

    def count(self) -> int:
        """Return how many elements are merged in all; tied ones count once."""
        return sum(self.merged(key) for key in self if self.tied_to(key) == key)

    def without(self, patterns: Sequence[str]) -> "Inputs":
        """Return the same models, with entries that match a pattern copied instead of merged."""
        for pattern in patterns:
            if not any(matches(key, [pattern]) for key in self):
                log.warning("'%s' matches no key.", pattern)
        removed = {key for key in self if matches(key, patterns)}
        return self._with_copied(removed)

    def asking(self, keys: Collection[str]) -> "Inputs":
        """Return the same models, for a method that merges these entries alone.

        Statistics of whole models are of all entries still, those of single entries of these.
        """
        inputs = copy(self)
        inputs._asked = frozenset(keys)
        return inputs

    def remember(self, about: Hashable, compute: Callable[[], T]) -> T:
        """Return a statistic of the whole model, which methods for other entries may share.

        Args:
            about: what distinguishes it from others.
            compute: finds it, if it is not known yet.
        """
        found = (about, self.aligned.copied)
        if found not in self._remembered:
            self._remembered[found] = compute()
        known: T = self._remembered[found]
        return known

    def shared(self) -> "Inputs":
        """Return the same models, for several merges that are made of each piece in turn."""
        inputs = copy(self)
        inputs._last = LastOne()
        return inputs

    def of_piece(self, about: Hashable, make: Callable[[], OfPiece]) -> OfPiece:
        """Return a function of pieces, which merges that share these models compute once for each.

        Its results may not be written to.

        Args:
            about: what distinguishes it from others.
            make: returns the function.
        """
        if self._last is None:
            return make()

        def shared() -> OfPiece:
            found, last = make(), LastOne[Tensor]()

            def get(key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
                shape = (tensors[0] if base is None else base).shape
                return last.get((key, start, shape), lambda: found(key, start, tensors, base))

            return get

        return self.remember(("of a piece", about), shared)

    def asked(self) -> "Inputs":
        """Return the same models with all entries copied that are not asked for."""
        if self._asked is None:
            return self
        return self._with_copied({key for key in self if key not in self._asked})

    def _with_copied(self, keys: Collection[str]) -> "Inputs":
        inputs = copy(self)
        inputs.aligned = replace(self.aligned, copied=self.aligned.copied | frozenset(keys))
        inputs.nonfinite = {}
        return inputs

    @property
    def is_double(self) -> bool:
        """Whether an entry of any model is float64, and so is computed in it."""
        return any(w.spec(key).dtype == torch.float64 for w in self._all for key in self)

    @property
    def is_quick(self) -> bool:
        """Whether single elements may be read, out of files rather than by computing pieces."""
        return self.in_pieces and all(
            self.cut(key) == "elements" and not any(w.cost(key).peak_bytes for w in self._all)
            for key in self
            if self.merged(key)
        )

    def each(self, find: Callable[["Inputs"], T]) -> Callable[[str], T]:
        """Return a function that gives, for a key, what ``find`` finds out of this entry alone.

        It does so once, when it is first asked for. Threads that need it meanwhile take part: they
        share the pieces of whatever ``find`` surveys.
        """
        return PerKey(lambda key, crew: find(self._only(key, crew)))

    def _only(self, key: str, crew: Crew) -> "Inputs":
        """Return the same models with one entry; what is not finite is noticed elsewhere."""
        part = copy(self)
        part._keys, part._crew = (key,), crew
        part._look_for_nonfinite = part.show_progress = False
        return part

    def cut(self, key: str) -> Cut:
        """Return how an entry may be cut."""
        if self._cuts is not None:
            return self._cuts(key, self.spec(key).shape)
        return "elements" if self._elementwise else "whole"

    def grain(self, key: str) -> int:
        """Return the fewest elements that may be read of an entry; it is cut at multiples."""
        cut, shape = self.cut(key), self.spec(key).shape
        if cut == "elements" and self._may_cut:
            return 1
        if cut == "rows" and self._may_cut and len(shape) > 1:
            return max(1, math.prod(shape[1:]))
        return max(1, self.merged(key))

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield start and stop of pieces of what is merged of an entry."""
        numel, grain = self.merged(key), self.grain(key)
        step = max(1, size // grain) * grain
        for start in range(0, numel, step):
            yield start, min(start + step, numel)

    def bytes_to_read(self, key: str) -> int:
        """Return the bytes of the entry in all models."""
        if key in self.aligned.copied:
            return self.aligned.reference.bytes_to_read(key)
        return sum(weights.bytes_to_read(key) for weights in self._all)

    def cost(self, key: str) -> Cost:
        """Return what merging an entry takes, with the rough number of copies that methods hold.

        Of a piece there are one copy for each model and a few more, in the type of the computation.
        A matrix that is factorised whole is in float64, as its factors and their products are.
        """
        shape, models = self.spec(key).shape, len(self._all)
        size = min(max(PIECE, self.grain(key)), self.merged(key))
        is_double = any(weights.spec(key).dtype == torch.float64 for weights in self._all)
        held = size * (8 if is_double else 4) * (models + _COPIES)
        if self._one_by_one and self.cut(key) != "elements" and len(shape) == 2:
            smaller = min(shape)
            held = 4 * size * _WHOLE + 8 * smaller**2 * (models + _SQUARES)
        inner = sum(weights.cost(key).peak_bytes for weights in self._all)
        return Cost(self.bytes_to_read(key), held + inner)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return the stored entries of all models, or what is copied from the reference."""
        copied = key in self.aligned.copied
        found = [self.aligned.reference] if copied else self._all
        return tuple(origin for weights in found for origin in weights.origins(key))

    def shape(self, key: str, start: int, stop: int) -> tuple[int, ...]:
        """Return the shape in which ``read`` gives elements: 1-d where any will do."""
        shape = self.spec(key).shape
        if self.cut(key) == "elements":
            return (stop - start,)
        if stop - start == math.prod(shape):
            return shape
        return ((stop - start) // math.prod(shape[1:]), *shape[1:])

    def read(
        self, key: str, start: int, stop: int, every: int = 1
    ) -> tuple["Working", Tensor | None]:
        """Return the elements in every model, and in the pretrained one where there is one.

        ``every`` takes only one of so many, where they may be cut anywhere.
        """
        if self._last is None:
            return self._read(key, start, stop, every)
        about = key, start, stop, every, self._look_for_nonfinite
        return self._last.get(about, lambda: self._read(key, start, stop, every))

    def _read(self, key: str, start: int, stop: int, every: int) -> tuple["Working", Tensor | None]:
        shape = self.shape(key, start, stop)
        stored = [weights.read(key, start, stop).view(shape) for weights in self._all]
        if every > 1:
            stored = [tensor[::every] for tensor in stored]
        # One type for all: products of matrices take no two.
        exact = any(tensor.dtype == torch.float64 for tensor in stored)
        wide = partial(self._working, torch.float64 if exact else torch.float32)
        tensors = Working(wide, key, self.names, stored[: len(self._inputs)])
        pretrained = None
        if self.aligned.base is not None:
            pretrained = wide(key, "_pretrained_", stored[-1])
        tensors.everything = stored
        return tensors, pretrained

    def survey(self, look: Visit, every: int = 1) -> None:
        """Call ``look`` with every merged element, in pieces, in any order.

        ``every`` uses only one of so many elements, for an estimate.
        """

        def work(key: str, start: int, stop: int) -> None:
            look(key, start, *self.read(key, start, stop, every))

        spread = None if self._crew is None else self._crew.spread
        visit(self, work, PIECE, "measuring tensors", spread=spread)

    def find_nonfinite(self, key: str, tensors: "Working") -> None:
        """Note which of the models hold NaN or infinity."""
        for name, tensor in zip([*self.names, "_pretrained_"], tensors.everything, strict=False):
            self.is_finite(key, name, tensor.float())

    def is_finite(self, key: str, model: str, tensor: Tensor) -> bool:
        """Return and record whether all elements are finite."""
        # The sum is a quick first look: it is finite only where all elements are.
        finite = math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())
        if not finite:
            self.nonfinite[f"{model}: '{key}'"] = None
        return finite

    def _working(self, dtype: torch.dtype, key: str, model: str, stored: Tensor) -> Tensor:
        """Return the values in the type and on the device of the computation."""
        if not (self._on_cpu and stored.dtype == dtype and stored.is_cpu):
            stored = stored.to(self.policy.device, dtype)
        if self._look_for_nonfinite:
            self.is_finite(key, model, stored)
        return stored


class Working(Sequence[Tensor]):
    """The tensors of one entry, each converted when the method asks for it.

    So each is worked on while it is in the cache, and at most one copy is in memory.
    """

    #: What is stored of all models, the pretrained one too.
    everything: Sequence[Tensor] = ()

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
            return Working(self._convert, self._key, self._names[index], self._stored[index])
        return self._convert(self._key, self._names[index], self._stored[index])
