"""Layouts: what a model's file calls and groups its entries, and what today's classes do.

transformers has a registry of conversions, by which it reads files of one expert an entry, or of
other times, into classes with all experts in one entry. Where each row goes is asked of these
conversions themselves, by converting the rows' positions.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Arrangement, Regrouped, Run, TensorSpec, Weights, rearranged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def in_layout_of(reference: Weights, weights: Weights, model: "PreTrainedModel") -> Weights:
    """Return ``weights`` in the reference's layout, as far as transformers knows both.

    Entries that cannot be found in the reference's layout keep their own names.

    Args:
        reference: the layout that is wanted.
        weights: the same architecture's weights in any layout.
        model: a model of this architecture, on any device.

    Raises:
        FusionBenchError: the same entry has other dimensions in the two, such as another number of
            experts.
    """
    wanted, own = _arrangements(reference, model, "reference"), _arrangements(weights, model)
    different = [
        name
        for name in wanted.keys() & own.keys()
        if wanted[name].shape != own[name].shape
        and len({*wanted[name].keys, *own[name].keys}) > 2  # else the entry itself says so
    ]
    if different:
        name = min(different)
        there, here = wanted[name], own[name]
        raise FusionBenchError(
            f"{_made_of(here)} {list(here.shape)} for '{name}', in the reference "
            f"{_made_of(there)} {list(there.shape)}.",
            "Use models with the same number of experts, and of the same size.",
        )
    specs = {key: reference.spec(key) for key in reference}
    found = {
        key: entry
        for key, entry in rearranged(wanted, own, specs).items()
        if entry.runs != (Run(key, 0, specs[key].numel),) or key not in weights
    }
    used = {source for entry in found.values() for source in entry.keys}
    kept = {
        key: Arrangement.whole(key, weights.spec(key).shape)
        for key in weights
        if key not in used and key not in found
    }
    return Regrouped(weights, found | kept) if found else weights


def in_current_layout(weights: Weights, model: "PreTrainedModel") -> Weights:
    """Return ``weights`` as the entries of the model's class, as an adapter of it knows them.

    Args:
        weights: the same architecture's weights in any layout.
        model: a model of this architecture, on any device.
    """
    entries = _arrangements(weights, model)
    used = {source for entry in entries.values() for source in entry.keys}
    kept = {key: Arrangement.whole(key, weights.spec(key).shape) for key in weights}
    others = {key: entry for key, entry in kept.items() if key not in used and key not in entries}
    if all(key in weights for key in entries):
        return weights
    return Regrouped(weights, entries | others)


def in_file_layout(weights: Weights, model: "PreTrainedModel") -> Weights:
    """Return ``weights`` as transformers writes a model of this class, one expert an entry.

    Args:
        weights: the same architecture's weights in any layout.
        model: a model of this architecture, on any device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    current = in_current_layout(weights, model)
    specs = {key: current.spec(key) for key in current}
    moved = revert_weight_conversion(model, dict(zip(specs, positions(specs), strict=True)))
    entries = {key: arranged(rows, specs) for key, rows in moved.items()}
    known = {key: entry for key, entry in entries.items() if entry is not None}
    return Regrouped(current, known) if len(known) == len(entries) else current


def _made_of(entry: Arrangement) -> str:
    """Return which entries something is made of."""
    first, count = f"'{entry.keys[0]}'", len(entry.keys)
    return f"{first} and {count - 1} more make" if count > 1 else f"{first} makes"


def _arrangements(
    weights: Weights, model: "PreTrainedModel", whose: str = "model"
) -> dict[str, Arrangement]:
    """Return how each entry of a model's class is put together from a file's entries.

    Raises:
        FusionBenchError: the file holds an entry in two layouts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Arrangement] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted(weights, key=dot_natural_key):  # as transformers does: experts in their order
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if pattern is None:
            entry = Arrangement.whole(key, weights.spec(key).shape)
            if found.setdefault(name, entry) is not entry:
                _refuse_both(weights, whose, found[name], entry)
        else:
            groups.setdefault(name, (of_pattern[pattern], []))[1].append((key, pattern))
    for name, (converter, members) in groups.items():
        specs = {key: weights.spec(key) for key, _ in members}
        rows = dict(zip(specs, positions(specs), strict=True))
        conversion = deepcopy(converter)
        for key, pattern in members:
            conversion.add_tensor(name, key, pattern, rows[key])
        try:
            converted = conversion.convert(name, model=model, config=model.config)
        except Exception as error:  # of an incomplete group transformers raises anything
            log.debug("'%s' stays in its own layout: %s", name, error)
            continue
        for target, result in converted.items():
            moved = result[0] if isinstance(result, list) else result
            made = arranged(moved, specs)
            if made is not None and found.setdefault(target, made) is not made:
                _refuse_both(weights, whose, found[target], made)
    return found


def _refuse_both(weights: Weights, whose: str, one: Arrangement, other: Arrangement) -> None:
    """Refuse two entries of a file that are the same of the model, unless they are tied."""
    keys = one.keys[0], other.keys[0]
    if len({weights.tied_to(key) for key in keys}) > 1:
        raise FusionBenchError(
            f"'{keys[0]}' and '{keys[1]}' are the same tensor in two layouts, and both are in the "
            f"file of the {whose}.",
            "Remove the tensors of one layout there.",
        )


def positions(specs: Mapping[str, TensorSpec]) -> Iterator[Tensor]:
    """Yield for each entry where its rows begin when all are flattened behind each other.

    The last dimension, which is a row, has the size 1 there.
    """
    first = 0
    for spec in specs.values():
        matrix, row = _row(spec)
        shape = (*spec.shape[:-1], 1) if matrix else spec.shape
        yield torch.arange(first, first + spec.numel, max(row, 1)).view(shape)
        first += spec.numel


def arranged(rows: Tensor, specs: Mapping[str, TensorSpec]) -> Arrangement | None:
    """Return what moved positions say; None where rows were not kept whole."""
    starts = rows.reshape(-1)
    if not len(starts):
        return None
    keys, ends = list(specs), list(accumulate(spec.numel for spec in specs.values()))
    matrix, size = _row(specs[keys[bisect_right(ends, int(starts[0]))]])
    if matrix and rows.shape[-1] != 1:
        return None
    cuts = torch.nonzero(starts[1:] != starts[:-1] + size).flatten() + 1
    begins = [0, *cuts.tolist(), len(starts)]
    firsts = starts[begins[:-1]].tolist()
    shape = (*rows.shape[:-1], size) if matrix else tuple(rows.shape)
    entry = Arrangement.of(shape, _runs(firsts, begins, size, keys, ends))
    return entry if all(_row(specs[key]) == (matrix, size) for key in entry.keys) else None


def _row(spec: TensorSpec) -> tuple[bool, int]:
    """Return whether an entry has rows, and the elements of one."""
    return len(spec.shape) > 1, spec.shape[-1] if len(spec.shape) > 1 else 1


def _runs(
    firsts: list[int], begins: list[int], size: int, keys: list[str], ends: list[int]
) -> Iterator[Run]:
    """Yield the ranges that positions stand for, cut where an entry ends."""
    for first, begin, end in zip(firsts, begins, begins[1:], strict=False):
        stop = first + (end - begin) * size
        while first < stop:
            index = bisect_right(ends, first)
            before = ends[index - 1] if index else 0
            last = min(stop, ends[index])
            yield Run(keys[index], first - before, last - before)
            first = last
