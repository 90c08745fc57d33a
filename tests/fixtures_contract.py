"""The methods under config/method, each by its YAML, and small models of many kinds to fuse."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from fixtures_clip import vision_config
from fixtures_weights import bits
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from fusion_bench.instantiate import instantiate
from fusion_bench.method import TensorwiseAlgorithm
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.modelpool import CausalLMPool, HFModelPool
from fusion_bench.results import ACCURACY, Metric, SampleScores
from fusion_bench.weights import (
    MergePolicy,
    TensorWeights,
    Weights,
    in_memory,
    is_special,
    stream,
    write_checkpoint,
)

CONFIG = Path(__file__).parents[1] / "config"
BASE = "_pretrained_"


@dataclass(frozen=True)
class Special:
    """Where a method differs from the rest.

    Attributes:
        options: what its YAML leaves open or does not suit three models, or takes long.
        two_ends: it takes exactly two models, the pretrained one counted.
        ordered: the order of the models matters.
        rounds: what it makes of equal models is that model but for rounding.
        ignores: entries of ``Net`` that it takes from the base without a look at the models.
        draws: options with which it draws at random, where the YAML's own do not.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    two_ends: bool = False
    ordered: bool = False
    rounds: bool = False
    ignores: Sequence[str] = ()
    draws: Mapping[str, Any] = field(default_factory=dict)


#: By YAML. Every other method takes three models, in any order.
SPECIAL: dict[str, Special] = {
    "adamerging/layer_wise": Special({"max_steps": 3}),
    "adamerging/layer_wise_plusplus": Special({"max_steps": 3}),
    "adamerging/task_wise": Special({"max_steps": 3}),
    "adamerging/task_wise_plusplus": Special({"max_steps": 3}),
    "karcher/karcher": Special(rounds=True),
    "linear/expo": Special(rounds=True),
    "linear/linear_interpolation": Special(two_ends=True, ordered=True),
    "linear/weighted_average": Special({"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True),
    "model_soup/greedy": Special(ordered=True, rounds=True),
    "model_soup/learned": Special({"max_steps": 3}),
    "model_soup/uniform": Special(rounds=True),
    # For a single element the angles' mean may lie where the share of the average is infinite.
    "model_stock/model_stock average=angle": Special({"clamp": True}),
    "opcm/opcm": Special(ordered=True, draws={"shuffle_order": True}),
    "opcm/weight_average": Special(rounds=True),
    "rlhf/salsa": Special({"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True),
    "rlhf/warm": Special(rounds=True),
    "rlhf/warp_liti": Special(two_ends=True, ordered=True, rounds=True),
    "rlhf/warp_slerp": Special(ordered=True),
    "simple_average": Special(rounds=True),
    "slerp/multi_slerp": Special(rounds=True),
    "slerp/multi_slerp normalize_weights=False": Special(
        {"weights": [0.5, 0.3, 0.2]}, ordered=True, rounds=True
    ),
    "slerp/nuslerp": Special(ordered=True),
    "slerp/slerp": Special(two_ends=True, ordered=True),
    "wudi/wudi": Special({"iter_num": 5}),
    "wudi/wudi rest=base": Special({"iter_num": 5}, ignores=("conv.weight", "logit_scale")),
}


def special(name: str) -> Special:
    """Return what is special about a method, or else about the one that it is a variant of."""
    return SPECIAL.get(name) or SPECIAL.get(name.split()[0], Special())


@cache
def nodes() -> dict[str, dict[str, Any]]:
    """Return every YAML under config/method, composed; all at once, which is faster."""
    group = CONFIG / "method"
    names = [
        str(path.relative_to(group).with_suffix(""))
        for path in sorted(group.rglob("*.yaml"))
        if not path.name.startswith("_")
    ]
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        every = compose(overrides=[f"+method@n{i}={name}" for i, name in enumerate(names)])
    config: Any = OmegaConf.to_container(every, resolve=True)
    return {name: config[f"n{i}"] for i, name in enumerate(names)}


def method_class(name: str) -> type[Any]:
    """Return the class that a YAML names."""
    return get_class(nodes()[name.split()[0]]["_target_"])


def kind(name: str) -> str | None:
    """Return how a method is tested: as a function of the models' ``weights`` that needs nothing
    else, as one that learns from ``data``, or as one that makes a ``module``.

    Of any other kind nothing is known here, and so nothing would be tested.
    """
    try:
        own = method_class(name)
    except ImportError:  # a test says so; the others can still be run
        return None
    if issubclass(own, LearningAlgorithm):
        return "data"
    if issubclass(own, TensorwiseAlgorithm):
        return "weights"
    return "module" if issubclass(own, EnsembleAlgorithm) else None


def takes(name: str, option: str) -> bool:
    """Tell whether a method has an option."""
    return option in inspect.signature(method_class(name)).parameters


def variants(name: str) -> Iterator[str]:
    """Yield, as ``name option=value``, each choice that a YAML does not make."""
    hints = get_type_hints(method_class(name).__init__)
    for option, hint in hints.items():
        own = nodes()[name].get(option)
        if option not in ("return", "show_pbar", "inplace"):
            yield from (f"{name} {option}={choice}" for choice in _choices(hint) if choice != own)


def _choices(hint: Any) -> list[Any]:
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for inner in get_args(hint) for choice in _choices(inner)]


@cache
def method(name: str, **options: Any) -> Any:
    """Return the method that a YAML describes, with a variant's option.

    It is the same one each time, for it must keep nothing of what it has merged.
    """
    yaml_name, *given = name.split()
    variant: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    quiet = {"show_pbar": False} if takes(name, "show_pbar") else {}
    node = {
        "_recursive_": False,
        **nodes()[yaml_name],
        **quiet,
        **special(name).options,
        **variant,
        **options,
    }
    return instantiate(node)


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
        hidden = self.norm(self.conv(images)).relu().flatten(2).mean(2)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        answers: Tensor = self.head(hidden) * self.logit_scale
        return answers


#: A matrix of ``Net``, which a test leaves as it is in all models.
STILL = "encoder.layers.1.weight"


def clip() -> nn.Module:
    """Return a small CLIP vision encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model: nn.Module = CLIPVisionModel(CLIPVisionConfig(**vision_config()))
    return model


def llama() -> nn.Module:
    """Return a small Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {"net": Net, "clip": clip, "llama": llama}
DTYPES = {"net": torch.float32, "clip": torch.float32, "llama": torch.bfloat16}


_drawn = 0


def draw(number: int) -> None:
    """Let what is asked for from now on be the families of this number."""
    global _drawn
    if number != _drawn:
        _drawn = number
        family.cache_clear()
        widened.cache_clear()


@cache
def family(kind: str, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Return a base and models fine-tuned from it, which nobody may change."""
    with torch.random.fork_rng():
        torch.manual_seed(_drawn)
        base = FAMILIES[kind]().to(dtype or DTYPES[kind])
        for value in base.parameters():
            value.data.add_(0.1 * torch.randn(value.shape))
        return {BASE: base, **{name: _tuned(base, steps=i) for i, name in enumerate("abc", 1)}}


@cache
def widened(kind: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the family of that type, its values in float32."""
    return {name: deepcopy(model).float() for name, model in family(kind, dtype).items()}


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


def chosen(name: str, models: Mapping[str, Any], base: bool = True) -> dict[str, Any]:
    """Return as many of the models as a method takes."""
    tuned = [model for model in models if model != BASE]
    if special(name).two_ends:
        tuned = tuned[: 1 if base else 2]
    return {key: models[key] for key in ([BASE] if base else []) + tuned}


def as_weights(models: Mapping[str, nn.Module]) -> dict[str, Weights]:
    """Return the modules' weights."""
    return {name: TensorWeights(model.state_dict()) for name, model in models.items()}


class Pool:
    """Weights by name, as a method sees a model pool."""

    vocabulary = None

    def __init__(self, models: Mapping[str, Weights], policy: MergePolicy | None = None):
        self._models = models
        self.policy = policy or MergePolicy()
        self.model_names = [name for name in models if not is_special(name)]
        self.has_pretrained = BASE in models

    def weights(self, name: str) -> Weights:
        return self._models[name]


class TrainablePool(Pool):
    """Modules by name, for methods that run them."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__(as_weights(modules))
        self._modules = modules

    def load_model(self, name: str) -> nn.Module:
        return deepcopy(self._modules[name]).eval()

    def build_model(self, weights: Mapping[str, Tensor]) -> nn.Module:
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
        return module

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, count: int | None, seed: int = 0) -> Tensor:
        return torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:count]

    def batches(self, samples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(samples, batch_size):
            yield self._images[part], self._labels[part]

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for turn in count():
            yield from self.batches(self.sample(None, seed + turn), batch_size)

    @property
    def metric(self) -> Metric:
        return ACCURACY

    def evaluate(self, model: nn.Module) -> SampleScores:
        with torch.no_grad():
            answers = model(self._images).argmax(1).numpy()
        return SampleScores.classified(np.arange(12), self._labels.numpy(), answers)


def members(fused: Any) -> dict[str, Any]:
    """Return the models that a method made, by name; one alone has none."""
    if isinstance(fused, Weights):
        return {"": fused}
    several = any(not isinstance(value, Tensor) for value in fused.values())
    return dict(fused) if several else {"": fused}


def entries(fused: Any) -> dict[str, Tensor]:
    """Return the entries of all models that a method made."""
    found: dict[str, Tensor] = {}
    for name, weights in members(fused).items():
        tensors = in_memory(weights) if isinstance(weights, Weights) else weights
        found |= {f"{name}:{key}": tensor for key, tensor in tensors.items()}
    return found


def in_small_pieces(fused: Any, piece: int) -> dict[str, Tensor]:
    """Return the entries, streamed in pieces of ``piece`` elements at most."""
    found: dict[str, Tensor] = {}
    for name, weights in members(fused).items():
        parts: dict[str, list[tuple[int, Tensor]]] = {}

        def keep(key: str, start: int, values: Tensor, parts: dict[str, Any] = parts) -> None:
            parts.setdefault(key, []).append((start, values))

        stream(weights, keep, piece)
        for key in weights:
            spec = weights.spec(key)
            ordered = sorted(parts.get(weights.tied_to(key), []), key=lambda part: part[0])
            flat = torch.cat([torch.empty(0), *(part for _, part in ordered)])
            found[f"{name}:{key}"] = flat.to(spec.dtype).view(spec.shape)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare all bits."""
    assert found.keys() == expected.keys()
    differing = [key for key in expected if bits(found[key]) != bits(expected[key])]
    assert not differing, differing


def assert_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Compare up to ``tolerance`` of the largest element, and one rounding to what is stored."""
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        got = found[key]
        assert got.shape == want.shape, key
        if not got.dtype.is_floating_point:
            assert torch.equal(got, want), key
            continue
        got, exact, limits = got.double(), want.double(), torch.finfo(got.dtype)
        rounding = 0.51 * limits.eps * exact.abs() + limits.smallest_normal * limits.eps
        if want.dtype == found[key].dtype:
            rounding = rounding * 2
        size = exact.abs().amax() if exact.numel() else 0
        assert ((got - exact).abs() <= tolerance * size + rounding).all(), key


LAYOUTS: dict[str, Sequence[tuple[bool, int | str]]] = {  # a model: keys in reverse, bytes a file
    "sharded": [(False, 4000)],
    "mixed": [(True, 4000), (False, 1500), (True, "5GB"), (False, 6000)],
}


def write_family(kind: str, layout: str, folder: Path) -> dict[str, str]:
    """Write the models' checkpoints; return name to directory."""
    models = family(kind)
    ways = LAYOUTS[layout]
    for i, (name, model) in enumerate(models.items()):
        backwards, size = ways[i % len(ways)]
        state = model.state_dict()
        keys = list(reversed(state)) if backwards else list(state)
        # Of tied entries a file holds the one that comes first in the model.
        first = TensorWeights(state)
        keys = [key for key in keys if first.tied_to(key) == key]
        (folder / name).mkdir(parents=True)
        config: Any = model.config
        config.save_pretrained(folder / name)
        write_checkpoint(
            TensorWeights({key: state[key] for key in keys}), folder / name, max_shard_size=size
        )
    return {name: str(folder / name) for name in models}


def open_pool(kind: str, directories: Mapping[str, str]) -> HFModelPool:
    """Return a pool of checkpoints."""
    return CausalLMPool(directories) if kind == "llama" else HFModelPool(directories)
