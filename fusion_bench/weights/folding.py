"""Many keys in few patterns, for people to read."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fusion_bench.weights.layers import Layers


def folded(keys: Collection[str], among: Iterable[str], most: int = 4) -> str:
    """Return keys as patterns: ``model.layers.{0-3}.self_attn.* (16 tensors)``.

    Args:
        keys: the keys.
        among: all keys that there are; a ``*`` stands for nothing else.
        most: so many patterns at most.
    """
    everything = list(among)
    number = f"{len(keys):,} tensor{'' if len(keys) == 1 else 's'}"
    if len(keys) == len(everything):
        return f"all {number}"
    patterns = list(_patterns(set(keys), everything))
    shown = patterns if len(patterns) <= most else patterns[: most - 1]
    more = [] if len(shown) == len(patterns) else [f"{len(patterns) - len(shown)} more patterns"]
    if len(keys) == 1:
        return patterns[0]
    return f"{', '.join([*shown, *more])} ({number})"


def _patterns(keys: set[str], everything: Sequence[str]) -> Iterator[str]:
    """Yield the patterns, in the order of the keys."""
    layers = Layers(everything)
    outside = [key for key in everything if key in keys and layers.place(key) is None]
    inside: dict[str, dict[str, list[int]]] = {}
    whole: dict[str, dict[str, list[int]]] = {}
    first: dict[str, int] = {}
    for index, key in enumerate(everything):
        place = layers.place(key)
        if place is not None:
            whole.setdefault(place.stack, {}).setdefault(place.rest, []).append(place.number)
            if key in keys:
                inside.setdefault(place.stack, {}).setdefault(place.rest, []).append(place.number)
                first.setdefault(place.stack, index)
    found = [
        (everything.index(names[0]), pattern) for pattern, names in _globs(outside, everything)
    ]
    for stack, rests in inside.items():
        of_numbers: dict[tuple[int, ...], list[str]] = {}
        for rest, numbers in rests.items():
            of_numbers.setdefault(tuple(sorted(numbers)), []).append(rest)
        for places, own in of_numbers.items():
            there = [rest for rest in whole[stack] if set(whole[stack][rest]) & set(places)]
            layer = f"{stack}.{ranges(places)}."
            whole_layer = len(own) == len(there) > 1
            patterns = ["*"] if whole_layer else [pattern for pattern, _ in _globs(own, there)]
            found += [(first[stack], f"{layer}{pattern}") for pattern in patterns]
    yield from (pattern for _, pattern in sorted(found, key=lambda one: one[0]))


def _globs(
    names: Sequence[str], everything: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Yield patterns for names, and the names that each stands for."""
    if not names:
        return
    if prefix and len(names) > 1 and len(names) == len(everything):
        yield f"{prefix}*", list(names)
        return
    own, there = _by_part(names, len(prefix)), _by_part(everything, len(prefix))
    for part, inner in own.items():
        if len(inner) == 1:
            yield inner[0], inner
        else:
            yield from _globs(inner, there[part], f"{prefix}{part}.")


def _by_part(names: Iterable[str], start: int) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name[start:].partition(".")[0], []).append(name)
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ``3``, ``{0-3}`` or ``{0-1,5}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
