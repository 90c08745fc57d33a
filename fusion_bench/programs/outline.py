"""Which entries of a merged model come from what, in a few lines, without reading a weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion_bench.weights import LayerPlace, Layers, Weights
from fusion_bench.weights.folding import folded, ranges


@dataclass(frozen=True)
class Outline:
    """What a merged model is made of.

    Attributes:
        lines: entries, and what they come from; those of alike layers in one line.
        nbytes: the bytes of the stored entries that are read, each once.
    """

    lines: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class _Source:
    """Where a merged entry comes from: a model, and there another layer or another name."""

    model: str
    offset: int = 0
    other: str = ""


def outlined(merged: Weights, models: Mapping[str, Weights]) -> Outline:
    """Return what the entries of merged weights come from.

    Args:
        merged: whose origins are known by headers.
        models: the pool's models, for their names.
    """
    owners = _owners(models)
    layers, stored = Layers(merged), {name: Layers(model) for name, model in models.items()}
    groups: dict[tuple[_Source, ...], list[str]] = {}
    read: dict[tuple[int, str], int] = {}
    for key in merged:
        sources: dict[_Source, None] = {}
        for origin in merged.origins(key):
            part = id(origin.weights), origin.key
            read[part] = origin.weights.spec(origin.key).nbytes
            if part in owners:
                name, names = owners[part]
                own_key = key if key in names else next(iter(names))
                there = stored[name].place(own_key)
                sources[_source(name, key, own_key, layers.place(key), there)] = None
        groups.setdefault(tuple(sources), []).append(key)
    lines = tuple(_line(sources, keys, layers) for sources, keys in groups.items())
    return Outline(lines, sum(read.values()))


def _owners(models: Mapping[str, Weights]) -> dict[tuple[int, str], tuple[str, dict[str, None]]]:
    """Return of each stored entry the model that it belongs to, and which entries it is part of.

    Another model may hold some of it: rows of tokens that it lacks, or what an adapter is put on.
    """
    parts: dict[int, dict[str, int]] = {}
    for name, model in models.items():
        for key in model:
            for origin in model.origins(key):
                counts = parts.setdefault(id(origin.weights), {})
                counts[name] = counts.get(name, 0) + 1
    home = {part: max(counts, key=counts.__getitem__) for part, counts in parts.items()}
    owners: dict[tuple[int, str], tuple[str, dict[str, None]]] = {}
    for name, model in models.items():
        for key in model:
            for origin in model.origins(key):
                if home[id(origin.weights)] == name:  # it may be part of several of its entries
                    own = owners.setdefault((id(origin.weights), origin.key), (name, {}))
                    own[1][key] = None
    return owners


def _source(
    model: str, key: str, name: str, here: LayerPlace | None, there: LayerPlace | None
) -> _Source:
    """Return where an entry comes from, told in a way that entries of other layers share."""
    if key == name or here is None or there is None:
        return _Source(model, other="" if key == name else name)
    alike = (here.stack, here.rest) == (there.stack, there.rest)
    other = "" if alike else f"{there.stack}.*.{there.rest}"
    return _Source(model, there.number - here.number, other)


def _line(sources: Sequence[_Source], keys: Sequence[str], layers: Layers) -> str:
    places = [place for key in keys if (place := layers.place(key)) is not None]
    if not sources:
        return f"{folded(keys, layers.keys)}: computed at the merge"
    models: dict[str, list[_Source]] = {}
    for source in sources:
        models.setdefault(source.model, []).append(source)
    names = [
        _named(own[0], places) if len(own) == 1 else f"{model} ({len(own)} tensors each)"
        for model, own in models.items()
    ]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{folded(keys, layers.keys)} from {listed}"


def _named(source: _Source, places: Sequence[LayerPlace]) -> str:
    """Return a model's name, and which of its layers or entries."""
    details = [source.other] if source.other else []
    if source.offset:
        numbers = sorted({place.number + source.offset for place in places})
        details.append(f"layer {ranges(numbers)}")
    return f"{source.model} ({', '.join(details)})" if details else source.model
