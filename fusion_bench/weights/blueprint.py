"""What a config describes: a module's entries, and what is said layer by layer."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights.computed import is_computed
from fusion_bench.weights.config import Config
from fusion_bench.weights.layers import Layers
from fusion_bench.weights.mapping import TensorSpec

#: The way to a value in a config: ``("text_config", "num_hidden_layers")``.
Path = tuple[str, ...]

#: What the number of layers is called: ``num_hidden_layers``, ``n_layer``, ``depth`` …
_COUNT = re.compile(r"(layers?|blocks?|depth)$")
#: Lists that are no layers', however long they are.
_OTHER_LISTS = re.compile(
    r"token|_ids?$|architectures|factor|mean$|std$|section|label|name|indices"
)


@dataclass(frozen=True)
class Blueprint:
    """What a config describes.

    Attributes:
        config: the config, with what its class adds by default.
        stated: the same without that; the part of it that is for the module.
        entries: of the module that it describes, in the order in which the module uses them.
        tied: an entry that is another's memory, and the first name of that.
    """

    config: Config
    stated: Config
    entries: Mapping[str, TensorSpec]
    tied: Mapping[str, str] = field(default_factory=dict)


#: Returns what a config describes; ``None`` where that is not known.
Draw = Callable[[Config], Blueprint | None]


@dataclass(frozen=True)
class Run:
    """Layers that follow each other in a model, and in the new one.

    Attributes:
        model: its name.
        config: the model's, with what its class adds by default.
        layers: which.
        count: how many layers there are in that stack of the model.
    """

    model: str
    config: Config
    layers: range
    count: int


def restacked(
    config: Config,
    drawn: Blueprint | None,
    counts: Mapping[str, int],
    stacks: Mapping[str, Sequence[Run]],
    draw: Draw,
) -> dict[str, Any]:
    """Return a config for other layers: their number, and what it lists layer by layer.

    Args:
        config: of the model that the new one is like.
        drawn: what it describes, if that is known.
        counts: how many layers its stacks have.
        stacks: the new layers of those stacks that get others.
        draw: tells what a config describes.

    Raises:
        FusionBenchError: a list of the config that another model's config lacks.
    """
    whole = config if drawn is None else drawn.config
    made = deepcopy(dict(config))
    listed: dict[Path, list[Any]] = {}
    counted: set[Path] = set()
    for stack, runs in stacks.items():
        old, new = counts[stack], sum(len(run.layers) for run in runs)
        for path in _paths_of(stack, old, whole, drawn, draw):
            _put(made, path, new)
            counted.add(path)
            for place in _lists(whole, path[:-1], old):
                listed[place] = [item for run in runs for item in _listed(run, place)]
    implicit: dict[Path, Any] = {
        path: own for path, own in listed.items() if _at(config, path) is None
    }
    for path in listed.keys() - implicit.keys():
        _put(made, path, listed[path])
    for old in set(counts.values()):  # of other stacks, as a class may take them from this one
        implicit |= {
            path: old
            for path in _counts(whole, old)
            if path not in counted and _at(config, path) is None
        }
    redrawn = None
    with suppress(FusionBenchError):  # it is drawn again when it is complete
        redrawn = draw(made) if implicit else None
    for path, own in implicit.items():  # a class may list the new layers otherwise
        if redrawn is None or _at(redrawn.config, path) != own:
            _put(made, path, own)
    return made


def states(config: Config, count: int) -> bool:
    """Tell whether a config has a number of layers that is ``count``."""
    return any(_counts(config, count))


def differences(specs: Mapping[str, TensorSpec], drawn: Blueprint) -> dict[tuple[str, str], str]:
    """Return what a module has otherwise than stored entries, by kind and name in any layer."""
    stored, module = Layers(specs), Layers(drawn.entries)
    found: dict[tuple[str, str], str] = {}

    def add(what: str, layers: Layers, key: str, line: str) -> None:
        place = layers.place(key)
        found.setdefault((what, f"{place.stack}.*.{place.rest}" if place else key), line)

    there = {drawn.tied.get(key, key) for key in specs}
    for key, spec in drawn.entries.items():
        if drawn.tied.get(key, key) not in there and not is_computed(key, spec):
            add("lacks", module, key, f"a module of that config has '{key}', which is missing")
    for key, spec in specs.items():
        if key not in drawn.entries:
            if not is_computed(key, spec):
                add("extra", stored, key, f"a module of that config has no '{key}'")
        elif spec.shape != drawn.entries[key].shape:
            line = f"'{key}' is {list(spec.shape)}, in the config {list(drawn.entries[key].shape)}"
            add("shape", stored, key, line)
    return found


def without_layers(config: Config) -> dict[str, Any]:
    """Return a config without the number of layers and what it lists layer by layer."""
    counts = {value for key, value in config.items() if _is_count(key, value)}
    return {
        key: without_layers(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _is_count(key, value) and not (_is_list(key, value) and len(value) in counts)
    }


def _is_count(key: str, value: object) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool)
    return number and _COUNT.search(key) is not None


def _is_list(key: str, value: object) -> bool:
    return isinstance(value, list | tuple) and not _OTHER_LISTS.search(key)


def _paths_of(
    stack: str, count: int, whole: Config, drawn: Blueprint | None, draw: Draw
) -> list[Path]:
    """Return where a config says how many layers a stack has, and what goes with that number."""
    found = list(_counts(whole, count))
    if drawn is None or (len({path[:-1] for path in found}) < 2 and _stacks(drawn) < 2):
        return found
    own, idle = [], []
    for path in found:
        tried = deepcopy(dict(whole))
        _put(tried, path, count + 1)
        redrawn = draw(tried)
        before, after = (
            Layers(drawn.entries).stacks,
            Layers(redrawn.entries if redrawn else ()).stacks,
        )
        changed = [name for name in before if len(after.get(name, ())) != len(before[name])]
        if changed == [stack]:
            own.append(path)
        elif not changed or redrawn is None:
            idle.append(path)
    sections = {path[:-1] for path in own}
    return [*own, *(path for path in idle if path[:-1] in sections)]


def _stacks(drawn: Blueprint) -> int:
    return len(Layers(drawn.entries).stacks)


def _counts(config: Config, count: int, inside: Path = ()) -> Iterator[Path]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, count, (*inside, key))
        elif _is_count(key, value) and value == count:
            yield (*inside, key)


def _lists(config: Config, section: Path, count: int) -> Iterator[Path]:
    for key, value in (_at(config, section) or {}).items():
        if isinstance(value, Mapping):
            yield from _lists(config, (*section, key), count)
        elif _is_list(key, value) and len(value) == count:
            yield (*section, key)


def _listed(run: Run, path: Path) -> list[Any]:
    own = _at(run.config, path)
    if not isinstance(own, list | tuple) or len(own) != run.count:
        raise FusionBenchError(
            f"the config of '{run.model}' does not list '{'.'.join(path)}' layer by layer, as that "
            "of the merged model does.",
            "Stack layers of models of one kind.",
        )
    return [own[index] for index in run.layers]


def _at(config: Any, path: Path) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _put(config: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        inner = config.get(key)
        config[key] = dict(inner) if isinstance(inner, Mapping) else {}
        config = config[key]
    config[path[-1]] = value
