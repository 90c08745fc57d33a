"""Several merges of the same models, for which the models are read once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING

from torch import nn

from fusion_bench.arguments import arguments_of
from fusion_bench.instantiate import instantiate, parameters
from fusion_bench.method.base import TensorwiseAlgorithm, inputs_of, run
from fusion_bench.method.contract import (
    Data,
    Fused,
    FusionMethod,
    ModelPool,
    Needs,
    Outlining,
    Product,
    Ran,
)
from fusion_bench.method.plain import PlainMethod, Runs, as_method, class_name
from fusion_bench.problems import (
    FusionBenchError,
    Place,
    Problem,
    Problems,
    did_you_mean,
    within,
)
from fusion_bench.storage import check_file_name
from fusion_bench.weights import Inputs, Model, Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Member:
    """One method of a family.

    Attributes:
        method: the method.
        place: where it is in the family's config.
        keys: an option to where its value is in the family's config.
    """

    method: FusionMethod
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)

    @contextmanager
    def located(self, *, keyed_only: bool = False) -> Iterator[None]:
        """Map each problem of the method to its place in the family's config."""
        try:
            yield
        except FusionBenchError as error:
            error.problems = tuple(
                one if keyed_only and not one.place else self._at(one) for one in error.problems
            )
            raise

    def _at(self, problem: Problem) -> Problem:
        first, *rest = problem.place or ("",)
        if problem.whole or first not in self.keys:
            return problem.inside(*self.place)
        return replace(problem, place=(*self.keys[str(first)], *rest))


@dataclass(eq=False)
class Family:
    """A model of each combination of options, or of each of several methods.

    All are merged in one pass over the models. Methods that merge tensor by tensor share what they
    have in common: the models' alignment, statistics of whole models, and of each piece the sum of
    the task vectors (task arithmetic) or what was elected (TIES).

    Args:
        base_method: the method whose options vary.
        options: an option to the list of its values; there is a model of each combination, named
            like ``scaling_factor=0.1,threshold=20``.
        methods: more methods, by the names of their models.
    """

    base_method: object = None
    options: Mapping[str, Sequence[object]] = field(default_factory=dict)
    methods: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        self.members: dict[str, Member] = {}
        if self.base_method is not None:
            with problems.collect("base_method"):
                self.base_method = _method(self.base_method)
        if isinstance(self.base_method, FusionMethod):
            self._vary(self.base_method, problems)
        elif self.options and not problems:
            with problems.collect():
                raise FusionBenchError("missing; its options vary.", place=("base_method",))
        for name, node in self.methods.items():
            with problems.collect("methods", name):
                check_file_name(name)
                if name in self.members:
                    raise FusionBenchError(f"another model is called '{name}'.", "Rename it.")
                self.members[name] = Member(_method(node), ("methods", name))
        if not self.members and not problems:
            with problems.collect():
                raise FusionBenchError(
                    "it has no values, and there are no other methods.",
                    "Name an option of the base method and its values, such as "
                    "'{here}options={scaling_factor: [0.1, 0.2]}'.",
                    place=("options",),
                )
        splits = dict.fromkeys(own.method.needs.split for own in self.members.values())
        if len(splits) > 1 and len(splits.keys() - {None}) > 1:
            with problems.collect():
                raise FusionBenchError(
                    f"these methods learn from different splits: {', '.join(map(str, splits))}.",
                    "Choose one for all.",
                    place=("methods",),
                )
        problems.raise_all()

    def _vary(self, base: FusionMethod, problems: Problems) -> None:
        """Add a member for each combination of options."""
        made = base.method if isinstance(base, PlainMethod) else base
        given = arguments_of(made)
        wrong = list(self._wrong_options(type(made), given is not None))
        problems.add(wrong)
        if wrong or not self.options:
            return
        for numbered in product(*(enumerate(values) for values in self.options.values())):
            tried = dict(zip(self.options, numbered, strict=True))
            options = {option: value for option, (_, value) in tried.items()}
            keys: dict[str, Place] = {
                option: ("options", option, index) for option, (index, _) in tried.items()
            }
            name = ",".join(f"{option}={value}" for option, value in options.items())
            node = {"_target_": type(made), "_recursive_": False, **(given or {}), **options}
            own = Problems()
            with own.collect(), Member(base, ("base_method",), keys).located():
                with within(next(iter(keys))):
                    check_file_name(name)
                method = as_method(instantiate(node, "method"))
                if name in self.members:
                    raise FusionBenchError(f"'{name}' is there twice.", place=(list(keys)[-1],))
                self.members[name] = Member(method, ("base_method",), keys)
            problems.add(one for one in own if one not in problems)

    def _wrong_options(self, kind: type, known: bool) -> Iterator[Problem]:
        """Yield what is wrong with the options, whatever their values."""
        if not known:
            reason = f"the arguments of this {kind.__name__} are not known."
            yield Problem(("base_method",), reason, "Give it as a config node.")
            return
        names = parameters(kind)
        for option, values in self.options.items():
            place: Place = ("options", option)
            if option not in names:
                remedy = f"{did_you_mean(option, names)} To remove it: '~{{here}}{option}'."
                yield Problem(place, f"{kind.__name__} takes no such key.", remedy)
            elif isinstance(values, str) or not isinstance(values, Sequence):
                yield Problem(place, f"'{values}' is not a list.", "Write it like '[0.1, 0.2]'.")
            elif not values:
                yield Problem(place, "the list is empty.", "Add a value.")

    @property
    def needs(self) -> Needs:
        """What any of the methods asks for."""
        members = [(own.method.needs, own.place) for own in self.members.values()]
        learning = [(needs, place) for needs, place in members if needs.split is not None]
        split, place = learning[0] if learning else members[0]
        return Needs(
            base=any(needs.base for needs, _ in members),
            weights=any(needs.weights for needs, _ in members),
            alike=any(needs.alike for needs, _ in members),
            split=split.split,
            own_data=any(needs.own_data for needs, _ in members),
            labels=any(needs.labels for needs, _ in members),
            split_place=(*place, *split.split_place),
        )

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models that one of the methods cannot merge."""
        problems = Problems()
        for member in self.members.values():
            own = Problems()
            with own.collect(), member.located():
                member.method.check_pool(pool)
            problems.add(one for one in own if one not in problems)
        problems.raise_all()

    def described(self, pool: ModelPool) -> str:
        """Return how many models are made, and their names."""
        return f"{len(self.members)} models in one reading: {', '.join(self.members)}"

    def outline(self, pool: ModelPool) -> Weights | Model:
        """Return the shapes, types and origins of the first model; no weight is read.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        member = next(iter(self.members.values()))
        if not isinstance(member.method, Outlining):
            return pool.weights(pool.model_names[0])
        with member.located(keyed_only=True):
            return member.method.outline(pool)

    def member_of(self, name: str) -> Member:
        """Return the member that makes a model of ``fuse``."""
        if name in self.members:
            return self.members[name]
        return next(own for key, own in self.members.items() if name.startswith(f"{key}/"))

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Mapping[str, Product]:
        """Return the merged models by name, whose weights are computed when they are read.

        Args:
            pool: the models.
            fabric: where ``heavy`` methods compute.
            data: for methods that learn from data.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        inputs: dict[str, Inputs] = {}
        for group in self._groups():
            methods = [
                own.method
                for name in group
                for own in [self.members[name]]
                if isinstance(own.method, TensorwiseAlgorithm)
            ]
            with self.members[group[0]].located(keyed_only=True):
                shared = inputs_of(methods, pool, fabric).shared()
            inputs |= dict.fromkeys(group, shared)
        fused: dict[str, Product] = {}
        for name, member in self.members.items():
            method = member.method
            with member.located(keyed_only=True):
                if name in inputs and isinstance(method, TensorwiseAlgorithm):
                    made: Fused = method.merged(inputs[name])
                else:
                    made = method.fuse(pool, fabric, data)
            if isinstance(made, Weights | Model | nn.Module):
                fused[name] = made
            else:
                fused |= {f"{name}/{inner}": own for inner, own in made.items()}
        return fused

    def _groups(self) -> list[list[str]]:
        """Return the names of the members that can share what they read."""
        groups: dict[object, list[str]] = {}
        for name, member in self.members.items():
            method = member.method
            if isinstance(method, TensorwiseAlgorithm) and _is_plain(type(method)):
                kind = "elements" if method.elementwise else type(method)
                groups.setdefault((method.heavy, kind), []).append(name)
        return list(groups.values())

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Merge a pool's models, or a dict's, which become state dicts by name."""
        return run(self, modelpool, fabric, data)


def _is_plain(kind: type[TensorwiseAlgorithm]) -> bool:
    """Return whether a class merges as ``TensorwiseAlgorithm`` does."""
    return kind.fuse is TensorwiseAlgorithm.fuse and kind.inputs is TensorwiseAlgorithm.inputs


def _method(node: object) -> FusionMethod:
    made = instantiate(node, "method")
    if not isinstance(made, Runs):
        raise FusionBenchError(
            f"{node!r} is not a method.",
            "On the command line, choose one with 'method@{here}base_method=ties_merging'.",
        )
    method = as_method(made)
    if isinstance(method, Family):
        raise FusionBenchError(f"{class_name(method)} inside of another.", "Name its methods here.")
    return method
