r"""Layers of several models, one slice after another.

Each slice is merged by a method of its own. With copied slices that is depth up-scaling: Kim et
al., SOLAR 10.7B, https://arxiv.org/abs/2312.15166
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.base import refuse_disagreeing, run
from fusion_bench.method.contract import Data, Drawing, ModelPool, Needs, Outlining, Ran
from fusion_bench.method.passthrough import PassthroughAlgorithm
from fusion_bench.method.plain import class_name
from fusion_bench.method.slices import (
    BASE,
    COMMON,
    Slice,
    SlicePool,
    Source,
    check_names,
    chosen_stack,
    range_of,
    read_slices,
    sides,
    view,
)
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.weights import Config, Layers, Model, Stacked, TensorSpec, Weights, first_of
from fusion_bench.weights.blueprint import Blueprint, Run, restacked, states
from fusion_bench.weights.computed import is_computed

if TYPE_CHECKING:
    from lightning.fabric import Fabric

#: Keys of a config that say which layers have another form.
_UNLIKE = re.compile(
    r"first_k|_freq$|_step$|_period$|_offset$|interval|only_layers|_index$|groups?$"
)


class StackedLayers:
    """A model of layers of several models, in any number and order.

    What is in front of the layers comes from the first slice, what is behind them from the last, by
    that slice's method. The config is that of the pretrained model, or else of the first, with the
    new number of layers.

    Args:
        slices: each a mapping: ``models``, name to ``[first, end]`` or null for all layers;
            ``base``, the model that is the slice's pretrained one, by default ``_pretrained_``
            where the method needs one; ``base_method``; and ``stack``, such as ``decoder.block``,
            of models with several.
        base_method: merges the slices without their own; one model is copied by default.

    Raises:
        FusionBenchError: with each mistake.
    """

    @keeps_arguments
    def __init__(self, slices: Sequence[Mapping[str, Any]], base_method: object = None):
        self.slices = slices
        self.base_method = base_method
        self._slices = read_slices(slices, base_method)

    @property
    def needs(self) -> Needs:
        """What the slices' methods ask for."""
        return Needs(base=any(one.base == BASE for one in self._slices), alike=False)

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse slices that the models do not have, or that make no model; no weight is read.

        Raises:
            FusionBenchError: unknown models, stacks or layers, layers that a slice's method cannot
                merge, or that no config describes.
        """
        check_names(self._slices, pool)
        if not pool.weights(_reference(pool)):  # nothing but the names is known
            return
        stack = _Stack(self._slices, pool)
        for part in stack.parts:
            with _placed(part.slice):
                part.slice.method.check_pool(part.pool)
        stack.config()

    def described(self, pool: ModelPool) -> str:
        """Return which layers the merged model has, and its size."""
        made = self.outline(pool)
        weights = made.weights if isinstance(made, Model) else made
        own = [weights.spec(key).numel for key in weights if weights.tied_to(key) == key]
        return f"{_Stack(self._slices, pool).described()}; {_amount(sum(own))} parameters"

    def outline(self, pool: ModelPool) -> Weights | Model:
        """Return the merged model's shapes, types, origins and config; no weight is read."""
        check_names(self._slices, pool)
        stack = _Stack(self._slices, pool)
        return stack.model([_outlined(part) for part in stack.parts])

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights | Model:
        """Return the new model, whose weights are computed when they are read.

        Args:
            pool: the models, which may have different numbers of layers.
            fabric: for the slices' methods.
            data: ignored.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        check_names(self._slices, pool)
        refuse_disagreeing(pool, layers=False)
        stack = _Stack(self._slices, pool)
        merged = []
        for part in stack.parts:
            with _placed(part.slice):
                made = part.slice.method.fuse(part.pool, fabric)
            if not isinstance(made, Weights):
                raise FusionBenchError(
                    f"{class_name(part.slice.method)} returns no weights of one model.",
                    "Choose another method.",
                    place=part.slice.method_place,
                )
            merged.append(made)
        return stack.model(merged)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Stack a pool's layers, or those of a dict of modules, which become a state dict."""
        return run(self, modelpool, fabric, data)


def _reference(pool: ModelPool) -> str:
    """Return the model whose config and tokenizer the new one gets."""
    return BASE if pool.has_pretrained else pool.model_names[0]


@contextmanager
def _placed(one: Slice) -> Iterator[None]:
    """Put the place of a slice before that of its problems, or that of its method."""
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(
            problem.inside(*(one.method_place if problem.place else one.place))
            for problem in error.problems
        )
        raise


@dataclass(frozen=True)
class _Part:
    """A slice, its layers in the new model, and what its method sees."""

    slice: Slice
    stack: str
    layers: Mapping[str, range]
    pool: SlicePool


class _Stack:
    """The parts of a new model, known by names and headers."""

    def __init__(self, slices: Sequence[Slice], pool: ModelPool):
        self._pool = pool
        own = _reference(pool)
        names = dict.fromkeys([own, *(name for one in slices for name in one.names)])
        self._sources = {name: self._source(name) for name in names}
        self.reference = self._sources[own]
        drawn = self.reference.blueprint
        known = list(self.reference.layers.stacks)
        self._drawn_as: dict[str, str] = {}
        self._sides = sides(self.reference.keys, {})
        if drawn is not None:
            order = list(Layers(drawn.entries).stacks)
            self._drawn_as = _matched(known, order)
            known.sort(key=lambda stack: order.index(self._drawn_as.get(stack, order[0])))
            stored = {own: stack for stack, own in self._drawn_as.items()}
            self._sides |= {
                key: (stored[stack], behind)
                for key, (stack, behind) in sides(drawn.entries, drawn.tied).items()
                if stack in stored
            }
        if not known:
            raise FusionBenchError(
                f"no layers are found in the names of the entries of '{own}'.",
                "Stack models whose layers are numbered, such as model.layers.0.",
            )
        chosen: dict[str, list[Slice]] = {}
        for one in slices:
            chosen.setdefault(chosen_stack(one, known), []).append(one)
        for stack, (one, *_) in chosen.items():
            self._refuse_shared(stack, one)
        copied = Slice({own: None}, None, None, PassthroughAlgorithm(), None, (), ())
        self.parts = [
            part for stack in known for part in self._parts(stack, chosen.get(stack, [copied]))
        ]
        names = {
            name
            for part in self.parts
            for key in part.pool.reference
            for name in (key, *(origin.key for origin in part.pool.reference.origins(key)))
        }
        for part in self.parts:
            if part.slice.method_place == COMMON:  # its rules need not match in every slice
                part.pool.elsewhere = names

    def _source(self, name: str) -> Source:
        model, drawn = self._pool.model(name), None
        if isinstance(self._pool, Drawing) and model.config is not None:
            with suppress(FusionBenchError):  # its own config may be of another release
                drawn = self._pool.blueprint(model.config)
        return Source.of(model, drawn)

    def _parts(self, stack: str, slices: Sequence[Slice]) -> Iterator[_Part]:
        first = 0
        for index, one in enumerate(slices):
            with within(*one.place):
                layers = self._layers(stack, one)
            behind = index == len(slices) - 1
            seen = {}
            for name, chosen in layers.items():
                source = self._sources[name]
                before, after = self._ends(source, stack, index == 0, behind)
                own = source.entries(stack, chosen, first)
                seen[name] = view(source, {**before, **own, **after})
            weights = {name: seen[name] for name in one.models}
            if one.base is not None:
                weights[BASE] = seen[one.base]
            yield _Part(one, stack, layers, SlicePool(self._pool, weights, list(one.models)))
            first += len(next(iter(layers.values())))

    def _layers(self, stack: str, one: Slice) -> dict[str, range]:
        """Return the layers of each model in a slice."""
        found: dict[str, range] = {}
        for name, given in one.models.items():
            with within("models"):
                found[name] = range_of(name, given, self._sources[name].count(stack), stack)
        counts = {len(layers) for layers in found.values()}
        if one.base is not None and one.base not in found:
            same = set(one.models.values())
            given = one.base_layers or (same.pop() if len(same) == 1 else None)
            with within("models"):
                layers = range_of(one.base, given, self._sources[one.base].count(stack), stack)
            found = {one.base: layers, **found}
            counts.add(len(layers))
        if len(counts) > 1:
            told = ", ".join(f"{name} {len(layers)}" for name, layers in found.items())
            raise FusionBenchError(
                f"the models give different numbers of layers: {told}.",
                "Give as many layers of each.",
                place=("models",),
            )
        return found

    def _ends(
        self, source: Source, stack: str, front: bool, behind: bool
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return a model's entries in front of a stack and behind it, as far as they are wanted."""
        ends: tuple[dict[str, str], dict[str, str]] = {}, {}
        own = sides(source.keys, {})
        for key, stored in source.outside().items():
            place, last = self._sides.get(key) or own.get(key, (stack, True))
            if place == stack and (behind if last else front):
                tied = stored != key and self._sides.get(stored) == (place, last)
                if not tied:  # where its first name is too, it need not be stored again
                    ends[last][key] = stored
        return ends

    def model(self, merged: Sequence[Weights]) -> Weights | Model:
        """Return the merged weights of all parts as one model; without a config the weights."""
        entries = {key: (weights, key) for weights in merged for key in weights}
        weights, config = Stacked(entries), self.config()
        if config is None:
            return weights
        return replace(self.reference.model, weights=weights, config=config)

    def described(self) -> str:
        """Return in words which layers the new model has."""
        stacks = dict.fromkeys(part.stack for part in self.parts)
        told = []
        for stack in stacks:
            parts = [part for part in self.parts if part.stack == stack]
            slices = ", ".join(
                " with ".join(
                    f"{_numbers(layers)} of {name}" for name, layers in part.layers.items()
                )
                for part in parts
            )
            count = sum(len(next(iter(part.layers.values()))) for part in parts)
            named = f"{stack}: " if len(stacks) > 1 else ""
            told.append(f"{named}layers {slices} → {count} {'layer' if count == 1 else 'layers'}")
        return "; ".join(told)

    def config(self) -> Config | None:
        """Return the new model's config.

        Raises:
            FusionBenchError: none describes these layers.
        """
        own, drawn = self.reference.model.config, self.reference.blueprint
        if own is None:
            return None
        draw = self._pool.blueprint if isinstance(self._pool, Drawing) else lambda config: None
        stacks: dict[str, list[Run]] = {}
        for part in self.parts:
            name, layers = next(iter(part.layers.items()))
            source = self._sources[name]
            config = source.blueprint.config if source.blueprint else source.model.config
            runs = stacks.setdefault(part.stack, [])
            runs.append(Run(name, config or {}, layers, source.count(part.stack)))
        changed = {
            stack: runs
            for stack, runs in stacks.items()
            if [run.layers for run in runs] != [range(self.reference.count(stack))]
        }
        names = {stack: self._drawn_as.get(stack, stack) for stack in changed}
        counts = {names[stack]: self.reference.count(stack) for stack in changed}
        with within("slices"):
            new = {names[stack]: runs for stack, runs in changed.items()}
            made = restacked(own, drawn, counts, new, draw)
        if drawn is not None:
            with within("slices"):
                self._check(made, draw(made), drawn)
        return made

    def _refuse_shared(self, stack: str, one: Slice) -> None:
        """Refuse a stack whose number of layers no key of the config states."""
        config, count = self.reference.blueprint, self.reference.count(stack)
        if config is None or states(config.config, count):
            return
        raise FusionBenchError(
            f"the config of this '{config.config.get('model_type')}' states no number of layers "
            f"that is {count}, as '{stack}' has. Stages, and layers that share their weights, "
            "cannot be stacked.",
            "Choose models of another kind.",
            place=(*one.place, "stack"),
        )

    def _check(self, config: Config, made: Blueprint | None, own: Blueprint) -> None:
        """Refuse a config whose module has other entries than those that are written."""
        if made is None:
            return
        stacks, lines = Layers(made.entries).stacks, []
        for stack, own_stack in self._drawn_as.items():
            layers = (next(iter(p.layers.values())) for p in self.parts if p.stack == stack)
            count, found = sum(map(len, layers)), len(stacks.get(own_stack, ()))
            if found != count:
                lines.append(f"a module of that config has {found} layers, and here are {count}")
        weights = self.reference.model.weights
        odd = _odd({key: weights.spec(key) for key in weights}, own)
        lines += [line for what, line in _odd(self._specs(), made).items() if what not in odd]
        if not lines:
            return
        kind = config.get("model_type")
        keys = [key for key in config if _UNLIKE.search(key) and config[key] not in (None, [], 0)]
        said = f" ({', '.join(f'{key}: {config[key]}' for key in keys)})" if keys else ""
        raise FusionBenchError(
            f"no config of a '{kind}' describes these layers{said}.",
            "Choose layers so that those of each form stay where they are.",
            details=first_of(lines, 10),
        )

    def _specs(self) -> dict[str, TensorSpec]:
        """Return the merged model's entries, those that are tied once."""
        seen = (part.pool.reference for part in self.parts)
        return {
            key: weights.spec(key)
            for weights in seen
            for key in weights
            if weights.tied_to(key) == key
        }


def _outlined(part: _Part) -> Weights:
    method = part.slice.method
    if not isinstance(method, Outlining):
        return part.pool.reference
    with _placed(part.slice):
        made = method.outline(part.pool)
    return made.weights if isinstance(made, Model) else made


def _matched(stored: Sequence[str], drawn: Sequence[str]) -> dict[str, str]:
    """Return what stacks of a file are called in a module, which may have newer names."""
    same = {stack: stack for stack in stored if stack in drawn}
    left = [stack for stack in stored if stack not in same]
    others = [stack for stack in drawn if stack not in same]
    return same | (dict(zip(left, others, strict=True)) if len(left) == len(others) == 1 else {})


def _odd(specs: Mapping[str, TensorSpec], drawn: Blueprint) -> dict[tuple[str, str], str]:
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


def _numbers(layers: range) -> str:
    return f"{layers.start}–{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"


def _amount(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
