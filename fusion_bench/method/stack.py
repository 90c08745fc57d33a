"""A new model of slices of layers: its parts, its entries and its config, known by headers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fusion_bench.method.contract import Drawing, ModelPool
from fusion_bench.method.passthrough import PassthroughAlgorithm
from fusion_bench.method.slice_sources import SlicePool, Source, sides, view
from fusion_bench.method.slices import BASE, COMMON, Slice, begins, chosen_stack, range_of
from fusion_bench.problems import FusionBenchError, Problem, Problems, key_of, within
from fusion_bench.weights import Config, Layers, Model, Stacked, TensorSpec, Weights, first_of
from fusion_bench.weights.blueprint import Blueprint, Run, differences, restacked, states

#: Keys of a config that say which layers have another form.
_UNLIKE = re.compile(
    r"first_k|_freq$|_step$|_period$|_offset$|interval|only_layers|_index$|groups?$"
)
#: Keys of a config, and kinds of models, whose layers compute with their own numbers.
_BY_DEPTH = re.compile(r"by_inverse_layer_idx$")
_KINDS_BY_DEPTH = ("diffllama",)


def reference_of(pool: ModelPool) -> str:
    """Return the model whose config and tokenizer the new one gets."""
    return BASE if pool.has_pretrained else pool.model_names[0]


@dataclass(frozen=True)
class Part:
    """A slice, its layers in the new model, and what its method sees."""

    slice: Slice
    stack: str
    layers: Mapping[str, range]
    pool: SlicePool


class Stack:
    """The parts of a new model, known by names and headers."""

    def __init__(self, slices: Sequence[Slice], pool: ModelPool):
        self._pool = pool
        own = reference_of(pool)
        names = dict.fromkeys([own, *(name for one in slices for name in one.names)])
        self._sources = {name: self._source(name) for name in names}
        self.reference = self._sources[own]
        drawn = self.reference.blueprint
        known = list(self.reference.layers.stacks)
        self._drawn_as: dict[str, str] = {}
        self._sides = sides(self.reference.keys, self.reference.tied())
        if drawn is not None:
            order = list(Layers(drawn.entries).stacks)
            self._drawn_as = _matched(known, order)
            places = {stack: order.index(own) for stack, own in self._drawn_as.items()}
            known.sort(key=lambda stack: places.get(stack, len(order)))
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
        loose: list[Slice] = []
        for one in slices:
            stack = chosen_stack(one, known, self._sides)
            (loose if stack is None else chosen.setdefault(stack, [])).append(one)
        for stack, (one, *_) in chosen.items():
            self._refuse_shared(stack, one)
        copied = Slice({own: None}, None, None, PassthroughAlgorithm(), (), (), ())
        self._loose = loose
        self._layered = [
            part for stack in known for part in self._parts(stack, chosen.get(stack, [copied]))
        ]
        self.parts = [*self._layered, *map(self._outside, loose)]
        everywhere = {
            name
            for part in self.parts
            for key in part.pool.reference
            for name in (key, *(origin.key for origin in part.pool.reference.origins(key)))
        }
        for part in self.parts:
            if part.slice.method_place == COMMON:  # its rules need not match in every slice
                part.pool.elsewhere = everywhere

    def _source(self, name: str) -> Source:
        model, drawn = self._pool.model(name), None
        if isinstance(self._pool, Drawing) and model.config is not None:
            with suppress(FusionBenchError):  # its own config may be of another release
                drawn = self._pool.blueprint(model.config)
        return Source.of(model, drawn)

    def _parts(self, stack: str, slices: Sequence[Slice]) -> Iterator[Part]:
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
            yield Part(one, stack, layers, self._pool_of(one, seen))
            first += len(next(iter(layers.values())))

    def _outside(self, one: Slice) -> Part:
        """Return a slice of entries outside of layers."""
        given = [layers for layers in (*one.models.values(), one.base_layers) if layers is not None]
        if given:
            raise FusionBenchError(
                f"'{one.stack[0]}' has no layers.",
                "Give null for each model.",
                place=(*one.place, "models"),
            )
        seen = {}
        for name in one.names:
            found = self._sources[name].outside().items()
            own = {key: stored for key, stored in found if begins(one, key)}
            again = {key for key, stored in own.items() if key != stored and stored in own}
            seen[name] = view(
                self._sources[name], {key: own[key] for key in own if key not in again}
            )
        return Part(one, "", {}, self._pool_of(one, seen))

    def _pool_of(self, one: Slice, seen: Mapping[str, Weights]) -> SlicePool:
        weights = {name: seen[name] for name in one.models}
        if one.base is not None:
            weights[BASE] = seen[one.base]
        return SlicePool(self._pool, weights, list(one.models))

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
        own = sides(source.keys, source.tied())
        for key, stored in source.outside().items():
            if any(begins(one, key) for one in self._loose):
                continue
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
        stacks = dict.fromkeys(part.stack for part in self._layered)
        told = []
        for stack in stacks:
            parts = [part for part in self._layered if part.stack == stack]
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

    def warnings(self) -> Iterator[str]:
        """Yield what layers compute otherwise where they are deeper or less deep than they were."""
        first: dict[str, int] = {}
        for part in self._layered:
            start = first.get(part.stack, 0)
            layers = next(iter(part.layers.values()))
            first[part.stack] = start + len(layers)
            config = self.reference.model.config or {}
            keys = [key for key, value in config.items() if _BY_DEPTH.search(key) and value]
            keys += ["model_type"] * (config.get("model_type") in _KINDS_BY_DEPTH)
            for key in keys if any(own.start != start for own in part.layers.values()) else ():
                yield (
                    f"{key_of(part.slice.place)}: with {key}={config[key]} a layer computes "
                    "otherwise at another depth; these will be at others than they were trained at."
                )

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
        for part in self._layered:
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
        if drawn is not None:
            own = drawn.stated
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
            layers = (next(iter(p.layers.values())) for p in self._layered if p.stack == stack)
            count, found = sum(map(len, layers)), len(stacks.get(own_stack, ()))
            if found != count:
                lines.append(f"a module of that config has {found} layers, and here are {count}")
        weights = self.reference.model.weights
        odd = differences({key: weights.spec(key) for key in weights}, own)
        lines += [
            line for what, line in differences(self._specs(), made).items() if what not in odd
        ]
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


def _matched(stored: Sequence[str], drawn: Sequence[str]) -> dict[str, str]:
    """Return what stacks of a file are called in a module, which may have newer names."""
    same = {stack: stack for stack in stored if stack in drawn}
    left = [stack for stack in stored if stack not in same]
    others = [stack for stack in drawn if stack not in same]
    return same | (dict(zip(left, others, strict=True)) if len(left) == len(others) == 1 else {})


def _numbers(layers: range) -> str:
    return f"{layers.start}–{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"


def refuse_other_widths(pool: ModelPool) -> None:
    """Refuse models whose layers have tensors of other shapes; no weight is read.

    Raises:
        FusionBenchError: with the first such tensor of each model.
    """
    own = reference_of(pool)
    shapes: dict[tuple[str, str], dict[tuple[int, ...], str]] = {}
    problems = Problems()
    for name in dict.fromkeys([own, *pool.model_names]):
        weights = pool.weights(name)
        layers = Layers(weights)
        for key in weights:
            place, shape = layers.place(key), weights.spec(key).shape
            if place is None:
                continue
            known = shapes.setdefault((place.stack, place.rest), {})
            if name == own:
                known.setdefault(shape, key)
            elif known and shape not in known:
                (wanted, other), *_ = known.items()
                reason = (
                    f"its '{key}' is {list(shape)}, and '{other}' of '{own}' is {list(wanted)}. "
                    "Layers of models of different sizes fit in no model."
                )
                problems.add([Problem((name,), reason, "Choose models of one size.")])
                break
    problems.raise_all()
