"""What every fusion method must satisfy, whatever its mathematics: ``check_method(MyMethod())``."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import count
from typing import TypeVar, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.arguments import arguments_of
from fusion_bench.catalog import OF_ALL_ENTRIES
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.contract import Data, FusionMethod, Ran
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.problems import FusionBenchError
from fusion_bench.results import ACCURACY, Metric, SampleScores
from fusion_bench.weights import (
    MergePolicy,
    Model,
    TensorWeights,
    Weights,
    in_memory,
    is_special,
    stream,
)

BASE = "_pretrained_"
#: A matrix of ``Net``, which a check leaves as it is in all models.
STILL = "encoder.layers.1.weight"

T = TypeVar("T")
Models = Mapping[str, nn.Module]
Entries = Mapping[str, Tensor]


@dataclass(frozen=True)
class Traits:
    """Where a method differs from the rest.

    Attributes:
        alone: it takes exactly one model, the pretrained one not counted.
        two_ends: it takes exactly two models, the pretrained one counted.
        ordered: the order of the models matters.
        rounds: what it makes of equal models is that model but for rounding.
        ignores: entries of ``Net`` that it takes from the base without a look at the models.
    """

    alone: bool = False
    two_ends: bool = False
    ordered: bool = False
    rounds: bool = False
    ignores: Sequence[str] = ()


Check = Callable[[FusionMethod, Models, Traits], None]


def check_method(
    method: FusionMethod,
    *,
    two_ends: bool = False,
    ordered: bool = False,
    rounds: bool = False,
) -> None:
    """Check what holds for every method, on tiny models with entries of every kind.

    A method that merges weights must, among other things, give the base for models equal to it,
    keep keys, shapes, dtypes and ties, change no input, give the same in any order of reading and
    with any number of threads, and notice NaN. Nothing is downloaded; it takes a second.

    Args:
        method: with options that suit three models.
        two_ends: it takes exactly two models, the pretrained one counted.
        ordered: the order of the models matters, as for one weight per model.
        rounds: what it makes of equal models is that model but for rounding; else every bit counts.

    Raises:
        AssertionError: with the rule that the method breaks.
    """
    models, traits = family(Net), Traits(two_ends=two_ends, ordered=ordered, rounds=rounds)
    for check in checks_of(method):
        try:
            check(method, models, traits)
        except AssertionError as error:
            rule = " ".join((check.__doc__ or "").split())
            raise AssertionError(f"{type(method).__name__}: {rule}\n{error}") from error


def checks_of(method: FusionMethod) -> Sequence[Check]:
    """Return the checks of a method's kind."""
    if isinstance(method, LearningAlgorithm):
        return LEARNING
    return ENSEMBLES if isinstance(method, EnsembleAlgorithm) else MERGING


class Net(nn.Module):
    """Entries of every kind: 0-d to 4-d, tied, empty, running statistics, integers, booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 6)])})
        self.classifier = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of seven classes."""
        hidden = self.norm(self.conv(images)).relu().flatten(2).mean(2)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        answers: Tensor = self.head(hidden) * self.logit_scale
        return answers


def family(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, nn.Module]:
    """Return a base and three models, ``a`` to ``c``, as if they were fine-tuned from it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = make().to(dtype)
        for value in base.parameters():
            value.data.add_(0.1 * torch.randn(value.shape))
        return {BASE: base, **{name: _tuned(base, steps=i) for i, name in enumerate("abc", 1)}}


@torch.no_grad()
def _tuned(base: nn.Module, steps: int) -> nn.Module:
    model = deepcopy(base)
    for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
        if tensor.dtype.is_floating_point:
            tensor.add_(0.02 * torch.randn(tensor.shape))
        elif tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            tensor.add_(steps)
    return model


class Pool:
    """Weights by name, as a method sees a model pool."""

    vocabulary = None

    def __init__(self, models: Mapping[str, Weights], policy: MergePolicy | None = None):
        self._models = models
        self.policy = policy or MergePolicy()
        self.model_names = [name for name in models if not is_special(name)]
        self.has_pretrained = BASE in models

    def weights(self, name: str) -> Weights:
        """Return a model's weights."""
        return self._models[name]

    def model(self, name: str) -> Model:
        """Return a model without a config."""
        return Model(self.weights(name), None, "test")

    def load_model(self, name: str) -> nn.Module:
        """Refuse: there are weights alone."""
        raise NotImplementedError(name)

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Refuse: there are weights alone."""
        raise NotImplementedError


class TrainablePool(Pool):
    """Modules by name, for methods that run them."""

    def __init__(self, modules: Models):
        super().__init__(as_weights(modules))
        self._modules = modules

    def load_model(self, name: str) -> nn.Module:
        """Return a copy of a module."""
        return deepcopy(self._modules[name]).eval()

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        """Return a module with these weights."""
        weights = weights.weights if isinstance(weights, Model) else weights
        module = deepcopy(next(iter(self._modules.values()))).eval()
        module.load_state_dict({key: weights[key] for key in weights})
        return module


class Task:
    """A few images and labels, as a method sees its data; for ``Net``."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        random = torch.Generator().manual_seed(seed)
        self._images = torch.randn(12, 2, 6, 6, generator=random).to(dtype)
        self._labels = torch.randint(0, 7, (12,), generator=random)

    def classify(self, module: nn.Module) -> nn.Module:
        """Return the function from images to logits."""
        return module

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, count: int | None, seed: int = 0) -> Tensor:
        """Draw samples without replacement."""
        return torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:count]

    def batches(self, samples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels."""
        for part in torch.split(samples, batch_size):
            yield self._images[part], self._labels[part]

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever."""
        for turn in count():
            yield from self.batches(self.sample(None, seed + turn), batch_size)

    @property
    def metric(self) -> Metric:
        """What models are evaluated by."""
        return ACCURACY

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return how the model does on all samples."""
        with torch.no_grad():
            answers = model(self._images).argmax(1).numpy()
        return SampleScores.classified(np.arange(12), self._labels.numpy(), answers)


# What the checks of methods that merge weights are written with


def as_weights(models: Models) -> dict[str, Weights]:
    """Return the modules' weights."""
    return {name: TensorWeights(model.state_dict()) for name, model in models.items()}


def chosen(models: Mapping[str, T], traits: Traits) -> dict[str, T]:
    """Return as many of the models as a method takes."""
    base = [BASE] if BASE in models else []
    tuned = [model for model in models if model != BASE]
    if traits.alone:
        tuned = tuned[:1]
    if traits.two_ends:
        tuned = tuned[: 1 if base else 2]
    return {key: models[key] for key in base + tuned}


def fuse(method: FusionMethod, models: Mapping[str, object], traits: Traits) -> Ran:
    """Merge as many of the models, modules or weights, as the method takes."""
    use = chosen(models, traits)
    if isinstance(next(iter(use.values())), nn.Module):
        return method.run(cast(Models, use))
    return method.run(Pool(cast(Mapping[str, Weights], use)))


def members(fused: Ran) -> dict[str, Weights | Entries]:
    """Return the models that a method made, by name; one alone has none."""
    if isinstance(fused, Weights):
        return {"": fused}
    assert isinstance(fused, Mapping), f"the result is a {type(fused).__name__}"
    several = any(not isinstance(value, Tensor) for value in fused.values())
    return cast(dict[str, Weights | Entries], dict(fused) if several else {"": fused})


def entries(fused: Ran) -> dict[str, Tensor]:
    """Return the entries of all models that a method made."""
    found: dict[str, Tensor] = {}
    for name, weights in members(fused).items():
        tensors = in_memory(weights) if isinstance(weights, Weights) else weights
        found |= {f"{name}:{key}": tensor for key, tensor in tensors.items()}
    return found


def of_base(models: Mapping[str, nn.Module], fused: Ran) -> dict[str, Tensor]:
    """Return what ``entries`` would be if each model made were the first of ``models``."""
    state = next(iter(models.values())).state_dict()
    return {f"{member}:{key}": state[key] for member in members(fused) for key in state}


def in_small_pieces(fused: Ran, piece: int) -> dict[str, Tensor]:
    """Return the entries, streamed in pieces of ``piece`` elements at most."""
    found: dict[str, Tensor] = {}
    for name, weights in members(fused).items():
        assert isinstance(weights, Weights)
        parts: dict[str, list[tuple[int, Tensor]]] = {key: [] for key in weights}

        def keep(
            key: str,
            start: int,
            values: Tensor,
            parts: dict[str, list[tuple[int, Tensor]]] = parts,
        ) -> None:
            parts[key].append((start, values))

        stream(weights, keep, piece)
        for key in weights:
            spec = weights.spec(key)
            ordered = sorted(parts[weights.tied_to(key)], key=lambda part: part[0])
            flat = torch.cat([torch.empty(0), *(part for _, part in ordered)])
            found[f"{name}:{key}"] = flat.to(spec.dtype).view(spec.shape)
    return found


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor: Tensor) -> tuple[torch.Size, torch.dtype, bytes]:
    """Return all that is to be known of a tensor, NaN and the sign of zero included."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.shape, tensor.dtype, values.numpy().tobytes()


def state_bits(models: Models) -> dict[str, dict[str, tuple[torch.Size, torch.dtype, bytes]]]:
    """Return all bits of the models."""
    return {
        name: {key: bits(tensor) for key, tensor in model.state_dict().items()}
        for name, model in models.items()
    }


def assert_same(found: Entries, expected: Entries) -> None:
    """Compare all bits."""
    assert found.keys() == expected.keys(), "the keys differ"
    differing = [key for key in expected if bits(found[key]) != bits(expected[key])]
    assert not differing, f"these entries differ: {', '.join(differing)}"


def assert_close(found: Entries, expected: Entries, tolerance: float = 1e-5) -> None:
    """Compare up to ``tolerance`` of the largest element, and one rounding to what is stored."""
    assert found.keys() == expected.keys(), "the keys differ"
    for key, want in expected.items():
        got = found[key]
        assert got.shape == want.shape, f"{key}: the shapes differ"
        if not got.dtype.is_floating_point:
            assert torch.equal(got, want), f"{key} differs"
            continue
        got, exact, limits = got.double(), want.double(), torch.finfo(got.dtype)
        rounding = 0.51 * limits.eps * exact.abs() + limits.smallest_normal * limits.eps
        if want.dtype == found[key].dtype:
            rounding = rounding * 2
        size = exact.abs().amax() if exact.numel() else 0
        assert ((got - exact).abs() <= tolerance * size + rounding).all(), f"{key} differs"


def _assert_equal(found: Entries, expected: Entries, traits: Traits) -> None:
    """Compare what is made of equal models with one of them."""
    if traits.rounds:
        assert_close(found, expected, 1e-6)
    else:
        assert_same(found, expected)


def _elementwise(method: FusionMethod) -> bool:
    return isinstance(method, TensorwiseAlgorithm) and method.elementwise


def _assert_agree(method: FusionMethod, found: Entries, expected: Entries) -> None:
    """Compare the results of one computation that was cut in different ways."""
    (assert_same if _elementwise(method) else assert_close)(found, expected)


# The checks; the docstring of each is the rule.


def equal_models(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Models that all equal the base give the base."""
    same = dict.fromkeys((BASE, *"abc"), models[BASE])
    fused = fuse(method, same, traits)
    _assert_equal(entries(fused), of_base(same, fused), traits)


def form(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The result has the base's keys, shapes, dtypes and ties; the models are not changed."""
    base = models[BASE].state_dict()
    like = TensorWeights(base)
    before = state_bits(models)
    memory = {t.data_ptr() for model in models.values() for t in model.state_dict().values()}
    for lazy in members(fuse(method, as_weights(models), traits)).values():
        assert isinstance(lazy, Weights)
        _assert_like(lazy, like)
    for state in members(fuse(method, models, traits)).values():
        _assert_like(TensorWeights(state), like)
        for key, tensor in state.items():
            assert not tensor.requires_grad, f"{key} requires a gradient"
            assert tensor.isfinite().all(), f"{key} is not finite"
            shared = tensor.numel() and tensor.data_ptr() in memory
            assert not shared, f"{key} shares its memory with a model's"
    assert state_bits(models) == before, "a model was changed"


def _assert_like(weights: Weights, like: Weights) -> None:
    assert list(weights) == list(like), "the keys or their order differ"
    for key in like:
        assert weights.spec(key) == like.spec(key), f"{key}: {weights.spec(key)}"
        assert weights.tied_to(key) == like.tied_to(key), f"{key} is tied to another entry"


def integers(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Integers and booleans are the base's."""
    fused = fuse(method, models, traits)
    expected = of_base(models, fused)
    for key, tensor in entries(fused).items():
        if not tensor.dtype.is_floating_point:
            assert torch.equal(tensor, expected[key]), f"{key} differs"


def base(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Without a base the first model is the reference; or the message names ``_pretrained_``."""
    tuned = {key: model for key, model in models.items() if key != BASE}
    if method.needs.base:
        try:
            fuse(method, tuned, traits)
        except FusionBenchError as error:
            assert BASE in str(error), f"the message is: {error}"
            return
        raise AssertionError("it needs the base, and merges without it")
    fused = fuse(method, tuned, traits)
    first, found = of_base(tuned, fused), entries(fused)
    assert list(found) == list(first), "the keys or their order differ"
    for key, tensor in found.items():
        alike = (tensor.shape, tensor.dtype) == (first[key].shape, first[key].dtype)
        assert alike, f"{key}: the shape or dtype differs"
        exact = tensor.dtype.is_floating_point or torch.equal(tensor, first[key])
        assert exact, f"{key} differs"
    same = fuse(method, dict.fromkeys("abc", models["a"]), traits)
    _assert_equal(entries(same), first, traits)


def one_model(method: FusionMethod, models: Models, traits: Traits) -> None:
    """One model alone is merged with the base, or refused with a ``FusionBenchError``."""
    try:
        fused = method.run({BASE: models[BASE], "a": models["a"]})
    except FusionBenchError:
        return
    for key, tensor in entries(fused).items():
        assert tensor.isfinite().all(), f"{key} is not finite"


def unchanged(method: FusionMethod, models: Models, traits: Traits) -> None:
    """An entry that no model changed stays; a model may be equal to the base."""
    own = models[BASE].state_dict()
    states = {key: model.state_dict() | {STILL: own[STILL]} for key, model in models.items()}
    for name in "ac":
        fused = fuse(method, _weights_of(states | {name: own}), traits)
        found = entries(fused)
        for key, tensor in found.items():
            assert tensor.isfinite().all(), f"{key} is not finite"
        kept = {key: tensor for key, tensor in found.items() if key.endswith(STILL)}
        _assert_equal(kept, dict.fromkeys(kept, own[STILL]), traits)


def _weights_of(states: Mapping[str, dict[str, Tensor]]) -> dict[str, Weights]:
    return {name: TensorWeights(state) for name, state in states.items()}


def order(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The order of the models is irrelevant, unless ``ordered`` says so."""
    if traits.ordered:
        return
    expected = entries(fuse(method, models, traits))
    for turned in ("bca", "cba"):
        found = entries(fuse(method, {key: models[key] for key in (BASE, *turned)}, traits))
        for key, want in expected.items():
            assert torch.allclose(found[key], want, rtol=1e-5, atol=1e-6), f"{key} differs"


def reading(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Entries may be read in any order and again; the method keeps nothing between runs."""
    weights = chosen(as_weights(models), traits)
    first, second = method.run(Pool(weights)), method.run(Pool(weights))
    forwards = {f"{m}:{key}": w[key] for m, w in members(first).items() for key in w}
    backwards = {
        f"{m}:{key}": w[key]
        for m, w in reversed(members(second).items())
        for key in reversed(list(w))
    }
    assert_same(backwards, forwards)
    assert_same(entries(first), forwards)
    assert_same(entries(fuse(method, models, traits)), forwards)


def generator(method: FusionMethod, models: Models, traits: Traits) -> None:
    """What is drawn at random comes from the option ``seed``, not from torch's own generator."""
    weights = as_weights(models)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, before = entries(fuse(method, weights, traits)), torch.get_rng_state()
        torch.manual_seed(2)
        assert_same(entries(fuse(method, weights, traits)), first)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), before), "the generator has moved on"


def precision(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Models in half precision are computed in float32 and rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: deepcopy(model).to(dtype) for name, model in models.items()}
        wide = {name: deepcopy(model).float() for name, model in half.items()}
        found, expected = entries(fuse(method, half, traits)), entries(fuse(method, wide, traits))
        for key, tensor in found.items():
            own = dtype if expected[key].dtype == torch.float32 else tensor.dtype
            assert tensor.dtype == own, f"{key} is {tensor.dtype}"
        if _elementwise(method):
            assert_same(found, {k: v.to(found[k].dtype) for k, v in expected.items()})
        assert_close(found, expected, 1e-6)


def pieces(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The result depends neither on the number of threads nor on the pieces that are read."""
    weights = as_weights(models)
    with threads(1):
        expected = entries(fuse(method, weights, traits))
    for piece, number in [(13, 1), (2**18, 2)]:
        with threads(number):
            found = in_small_pieces(fuse(method, weights, traits), piece)
        _assert_agree(method, found, expected)


def finite(method: FusionMethod, models: Models, traits: Traits) -> None:
    """NaN and infinity in a model are noticed, though the result might not show them."""
    for name, key, value in (
        ("b", "conv.weight", torch.nan),
        ("c", "logit_scale", -torch.inf),
        (BASE, "encoder.layers.0.weight", torch.inf),
    ):
        states = {model: module.state_dict() for model, module in models.items()}
        used = name in chosen(states, traits) and (name != BASE or method.needs.base)
        where = name if used else "a"
        broken = states[where][key].clone()
        broken.view(-1)[0] = value
        states[where] = states[where] | {key: broken}
        if key in traits.ignores:
            found = entries(fuse(method, _weights_of(states), traits))[f":{key}"]
            assert torch.equal(found, states[BASE][key]), f"{key} differs"
            continue
        try:
            entries(fuse(method, _weights_of(states), traits))
        except FusionBenchError as error:
            assert "NaN" in str(error), f"the message is: {error}"
        else:
            raise AssertionError(
                f"{value} in {key} of '{where}' went unnoticed: set 'shows_nonfinite = False'"
            )


def options(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The options of every method, ``show_pbar`` and ``inplace``, come last."""
    if not isinstance(method, TensorwiseAlgorithm):
        return
    given = inspect.signature(type(method)).parameters.values()
    anyhow = inspect.Parameter.POSITIONAL_OR_KEYWORD
    last = [(own.name, own.default, own.kind) for own in given if own.kind is anyhow][-2:]
    assert last == [("show_pbar", True, anyhow), ("inplace", False, anyhow)], f"they are {last}"


def rules(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Options that a rule of ``where`` gives to entries are as the method's own."""
    if not isinstance(method, TensorwiseAlgorithm) or not (given := arguments_of(method)):
        return
    own = [name for name in given if name not in OF_ALL_ENTRIES]
    if not own:
        return
    pattern = {"match": ["conv.*", "logit_scale"]}
    ruled = copy(method)
    ruled.where = [{**pattern, **{name: given[name] for name in own}}]
    try:
        found = entries(fuse(ruled, models, traits))
    except FusionBenchError as error:
        assert "base_method.where" in str(error), f"the message is: {error}"
        return
    _assert_agree(method, found, entries(fuse(method, models, traits)))


def inplace(method: FusionMethod, models: Models, traits: Traits) -> None:
    """With ``inplace`` the result is written to the base alone; several results are refused."""
    if not isinstance(method, TensorwiseAlgorithm):
        return
    own = copy(method)
    own.inplace = True
    modules = chosen({key: deepcopy(model) for key, model in models.items()}, traits)
    made = fuse(method, modules, traits)
    expected, before = entries(made), state_bits(modules)
    if list(members(made)) != [""]:
        try:
            own.run(modules)
        except FusionBenchError as error:
            assert str(error).startswith("inplace: "), f"the message is: {error}"
            assert state_bits(modules) == before, "a model was changed"
            return
        raise AssertionError("it made several models in place of one")
    fused, after = own.run(modules), state_bits(modules)
    written = {key: bits(tensor) for key, tensor in entries(fused).items()}
    assert written == {f":{key}": own for key, own in after[BASE].items()}, "the base is not it"
    assert_same(entries(fused), expected)
    assert {k: v for k, v in after.items() if k != BASE} == {
        k: v for k, v in before.items() if k != BASE
    }, "another model was changed"


MERGING: Sequence[Check] = (
    form,
    reading,
    generator,
    equal_models,
    integers,
    base,
    one_model,
    unchanged,
    order,
    precision,
    pieces,
    finite,
    options,
    rules,
    inplace,
)


def learn(method: FusionMethod, models: Models) -> Ran:
    """Merge models by a method that learns from data."""
    pool = TrainablePool(models)
    dtype = next(iter(models.values())).get_parameter(STILL).dtype
    data = {model: Task(ord(model), dtype) for model in pool.model_names}
    fabric = Fabric(accelerator="cpu", devices=1)
    return method.run(pool, fabric, cast(Data, data))


def learned_of_equal_models(method: FusionMethod, models: Models, traits: Traits) -> None:
    """Models that all equal the base give the base, whatever the data."""
    same = dict.fromkeys((BASE, *"abc"), models[BASE])
    fused = learn(method, same)
    assert_close(entries(fused), of_base(same, fused), 1e-4)


def learned_form(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The result has the base's form, is the same again, and leaves models and generator alone."""
    for dtype in (torch.float32, torch.bfloat16):
        own = {name: deepcopy(model).to(dtype) for name, model in models.items()}
        like, before = TensorWeights(own[BASE].state_dict()), state_bits(own)
        with torch.random.fork_rng():
            state = torch.get_rng_state()
            fused = learn(method, own)
            found = entries(fused)
            assert torch.equal(torch.get_rng_state(), state), "the generator has moved on"
        for weights in members(fused).values():
            assert isinstance(weights, Weights)
            _assert_like(TensorWeights(in_memory(weights)), like)
        for name_and_key, tensor in found.items():
            key = name_and_key.partition(":")[2]
            assert tensor.isfinite().all(), f"{key} is not finite"
            if not tensor.dtype.is_floating_point:
                theirs = (model.state_dict()[key] for model in own.values())
                assert any(torch.equal(tensor, each) for each in theirs), f"{key} is of no model"
        assert state_bits(own) == before, "a model was changed"
        assert_same(entries(learn(method, own)), found)


def order_of_tasks(method: FusionMethod, models: Models, traits: Traits) -> None:
    """The order of the models and tasks is irrelevant, unless ``ordered`` says so."""
    if traits.ordered:
        return
    turned = {key: models[key] for key in (BASE, *"cab")}
    assert_close(entries(learn(method, turned)), entries(learn(method, models)), 1e-4)


LEARNING: Sequence[Check] = (learned_of_equal_models, learned_form, order_of_tasks)


def answers(method: FusionMethod, models: Models, traits: Traits) -> None:
    """An ensemble of equal models answers as they do; the order of the models is irrelevant."""
    modules = {key: deepcopy(model).eval() for key, model in models.items()}
    before, images = state_bits(modules), Task(0).batches(torch.arange(12), 12)
    batch, _ = next(images)

    def answer(use: Models | Pool) -> Tensor:
        made = method.run(use)
        assert isinstance(made, nn.Module), f"the result is a {type(made).__name__}"
        found: Tensor = made(batch)
        return found

    with torch.no_grad():
        alone: Tensor = modules[BASE](batch)
        together = answer(TrainablePool(modules))
        answer(modules)
        turned = answer({key: modules[key] for key in (BASE, *"cab")})
        alike = answer({BASE: modules["a"], **dict.fromkeys("bc", modules[BASE])})
    torch.testing.assert_close(turned, together)
    torch.testing.assert_close(alike, alone)
    assert not torch.allclose(together, alone), "it answers as the base does"
    assert state_bits(modules) == before, "a model was changed"


ENSEMBLES: Sequence[Check] = (answers,)
