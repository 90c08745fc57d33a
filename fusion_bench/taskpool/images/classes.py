"""Classes are matched by their names, never by the order that two lists happen to have."""

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

_NUMBER = re.compile(r"\d{1,9}")
#: Folders that hold the samples of a split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def class_indices(
    labels: Sequence[str], *classes: Sequence[str], whole: bool = True
) -> list[int] | None:
    """Return for each label the index of its class; None where the names do not decide it.

    Names are the same whatever their case, spaces and punctuation. Labels that are numbers count
    from 0, or from 1. Where names differ, one that is left over belongs to the class that is left
    over; and several belong to those at their indices, if half of the names and more are the same
    and have the same indices.

    Args:
        labels: names, none twice.
        classes: names of the same classes in the same order, one list for each way to call them.
        whole: each label is a class of its own, and their order may mean something.
    """
    count = len(classes[0])
    found = by_name(labels, *classes)
    if whole and len(set(found.values())) < len(found):
        return None
    if len(found) == len(labels):
        return [found[label] for label in labels]
    if all(map(_NUMBER.fullmatch, labels)):
        named_by_numbers = any(all(map(_NUMBER.fullmatch, names)) for names in classes)
        return None if named_by_numbers else _by_number(labels, count, whole)
    if not whole or len(labels) != count:
        return None
    missing = [label for label in labels if label not in found]
    free = sorted(set(range(count)) - set(found.values()))
    in_order = all(found.get(label, index) == index for index, label in enumerate(labels))
    if len(missing) > 1 and not (in_order and len(missing) <= len(found)):
        return None
    found.update(zip(missing, free, strict=True))
    return [found[label] for label in labels]


def by_name(labels: Sequence[str], *classes: Sequence[str]) -> dict[str, int]:
    """Return the indices of those labels that are called as their classes are."""
    found: dict[str, int] = {}
    for spelling in (_as_it_is, _letters):
        known = _unambiguous(classes, spelling)
        for label in labels:
            if label not in found and spelling(label) in known:
                found[label] = known[spelling(label)]
    return found


def sorted_by_number(labels: Collection[str]) -> list[str]:
    """Return labels in the order of the alphabet, or of the numbers that all of them are."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def some(names: Sequence[str]) -> str:
    """Return the first few of some names, in quotes."""
    return ", ".join(map(repr, names[:3])) + (f" … ({len(names)})" if len(names) > 3 else "")


def name_splits(labels: Sequence[str]) -> bool:
    """Return whether all labels are names of splits: ``train`` and ``test``, ``images_val``."""
    words = "|".join(word for own in _SPLITS.values() for word in own)
    pattern = re.compile(rf"(.*[-._ ])?({words})[-._ 0-9]*", re.IGNORECASE)
    matches = [pattern.fullmatch(label) for label in labels]
    found = [match for match in matches if match is not None]
    kinds = {k for k, own in _SPLITS.items() for match in found if match[2].lower() in own}
    alone = all(match[1] is None for match in found)
    return len(found) == len(labels) > 0 and (alone or len(kinds) > 1)


def _unambiguous(
    classes: Sequence[Sequence[str]], spelling: Callable[[str], str]
) -> dict[str, int]:
    """Return the indices of those names that are one class's alone."""
    known: dict[str, set[int]] = {}
    for names in classes:
        for index, name in enumerate(names):
            known.setdefault(spelling(name), set()).add(index)
    return {name: own.pop() for name, own in known.items() if len(own) == 1 and name}


def _by_number(labels: Sequence[str], count: int, whole: bool) -> list[int] | None:
    numbers = [int(label) for label in labels]
    if len(set(numbers)) < len(numbers) or max(numbers) > count:
        return None
    first = 0 if min(numbers) == 0 else 1 if max(numbers) == count else None
    if first is None or (whole and len(numbers) != count) or max(numbers) - first >= count:
        return None
    return [number - first for number in numbers]


def _as_it_is(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _letters(name: str) -> str:
    """Return a name's letters and digits in lower case; of a number, the number."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    kept = "".join(c for c in plain if unicodedata.category(c)[0] in "LNM")
    return kept.lstrip("0") or "0" if kept.isdecimal() else kept
