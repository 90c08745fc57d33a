"""What holds for every method under config/method, whatever its mathematics.

A new YAML is covered without a change here; where it differs from the rest, ``SPECIAL`` in
`fixtures_contract.py` says so.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import examples
from fixtures_contract import (
    BASE,
    LAYOUTS,
    SPECIAL,
    STILL,
    Pool,
    Task,
    TrainablePool,
    as_weights,
    assert_close,
    assert_same,
    chosen,
    draw,
    entries,
    family,
    in_small_pieces,
    kind,
    members,
    method,
    method_class,
    nodes,
    open_pool,
    special,
    takes,
    threads,
    variants,
    widened,
    write_family,
)
from fixtures_weights import all_bits, open_directory
from lightning.fabric import Fabric
from torch import Tensor, nn

import fusion_bench.method
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, Weights, in_memory, write_checkpoint

METHODS = list(nodes())
PLAIN = [name for name in METHODS if kind(name) == "weights"]
RANDOM = [name for name in PLAIN if takes(name, "seed")]
WITHOUT_BASE = [name for name in PLAIN if not method_class(name).needs_pretrained]

VARIANTS = [variant for name in PLAIN for variant in variants(name)]

every = pytest.mark.parametrize("name", PLAIN)
#: The tests that an option may break though the YAML's own choice does not.
every_variant = pytest.mark.parametrize("name", PLAIN + VARIANTS)


pytestmark = pytest.mark.exhaustive


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test with other models too, where that is asked for."""
    if examples(1) > 1:
        metafunc.parametrize("drawn", range(examples(1)), indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw the models."""
    draw(getattr(request, "param", 0))
    yield
    draw(0)


def fuse(name: str, models: dict[str, Any], **options: Any) -> Any:
    """Merge as many of the models, modules or weights, as the method takes."""
    use = chosen(name, models, base=BASE in models)
    modules = isinstance(next(iter(use.values())), nn.Module)
    return method(name, **options).run(use if modules else Pool(use))


def of_base(name: str, models: dict[str, Any], fused: Any) -> dict[str, Tensor]:
    """Return what `entries` would be if each model made were the first of `models`."""
    reference = next(iter(chosen(name, models, base=BASE in models).values()))
    state = reference.state_dict()
    return {f"{member}:{key}": state[key] for member in members(fused) for key in state}


def state_bits(models: dict[str, nn.Module]) -> dict[str, Any]:
    return {name: all_bits(model.state_dict()) for name, model in models.items()}


def weights_of(states: dict[str, dict[str, Tensor]]) -> dict[str, Weights]:
    return {name: TensorWeights(state) for name, state in states.items()}


Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]


def equal(name: str) -> Compare:
    """Return how to compare what is made of equal models with one of them."""
    return partial(assert_close, tolerance=1e-6) if special(name).rounds else assert_same


def agree(name: str) -> Compare:
    """Return how to compare the results of one computation that was cut in different ways."""
    return assert_same if method(name).elementwise else assert_close


def test_there_are_some() -> None:
    assert len(METHODS) >= 14 and "dare/ties_merging" in METHODS


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_is_is_known(name: str) -> None:
    assert callable(method_class(name).run)
    assert kind(name) is not None, "tell `kind` in fixtures_contract.py what it is"


def test_no_note_is_about_a_method_that_is_not_there() -> None:
    assert {name.split()[0] for name in SPECIAL} <= set(METHODS)
    assert {name for name in SPECIAL if " " in name} <= set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "models"),
    [
        *itertools.product(PLAIN + VARIANTS, ["net"]),
        *itertools.product(PLAIN, ["clip", "llama"]),
    ],
)
def test_models_equal_to_the_base_give_the_base(name: str, models: str) -> None:
    base = family(models)[BASE]
    fused = fuse(name, {BASE: base, "a": base, "b": base, "c": base})
    equal(name)(entries(fused), of_base(name, {BASE: base}, fused))


@every
@pytest.mark.parametrize("models", ["net", "clip", "llama"])
def test_what_is_made_is_shaped_and_tied_like_the_base(name: str, models: str) -> None:
    modules = family(models)
    base = modules[BASE].state_dict()
    like = TensorWeights(base)
    for weights in members(fuse(name, as_weights(modules))).values():
        assert list(weights) == list(base)
        assert all(weights.spec(key) == like.spec(key) for key in base)
        assert all(weights.tied_to(key) == like.tied_to(key) for key in base)
    before = state_bits(modules)
    for state in members(fuse(name, modules)).values():
        assert list(state) == list(base)
        made = TensorWeights(state)
        assert all(made.spec(key) == like.spec(key) for key in base)
        assert all(made.tied_to(key) == like.tied_to(key) for key in base)
        assert not any(tensor.requires_grad for tensor in state.values())
        assert all(tensor.isfinite().all() for tensor in state.values())
        memory = {tensor.data_ptr() for m in modules.values() for tensor in m.state_dict().values()}
        assert not any(t.numel() and t.data_ptr() in memory for t in state.values())
    assert state_bits(modules) == before


@every
def test_integers_and_booleans_are_the_base_s(name: str) -> None:
    modules = family("net")
    fused = fuse(name, modules)
    for key, tensor in entries(fused).items():
        if not tensor.dtype.is_floating_point:
            assert torch.equal(tensor, of_base(name, modules, fused)[key])


@pytest.mark.parametrize("name", WITHOUT_BASE)
def test_without_a_base_the_first_model_is_the_reference(name: str) -> None:
    modules = {key: model for key, model in family("net").items() if key != BASE}
    fused = fuse(name, modules)
    first = of_base(name, modules, fused)
    found = entries(fused)
    assert list(found) == list(first)
    for key, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (first[key].shape, first[key].dtype)
        assert tensor.dtype.is_floating_point or torch.equal(tensor, first[key])
    same = fuse(name, dict.fromkeys("abc", modules["a"]))
    equal(name)(entries(same), first)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - set(WITHOUT_BASE)))
def test_a_missing_base_is_said(name: str) -> None:
    modules = {key: model for key, model in family("net").items() if key != BASE}
    with pytest.raises(FusionBenchError, match="_pretrained_"):
        fuse(name, modules)


@every
def test_one_model_alone_is_merged_or_refused(name: str) -> None:
    modules = family("net")
    try:
        fused = method(name).run({BASE: modules[BASE], "a": modules["a"]})
    except FusionBenchError:
        return
    assert all(tensor.isfinite().all() for tensor in entries(fused).values())


@every_variant
def test_a_model_that_is_the_base_and_an_entry_that_none_changed(name: str) -> None:
    modules = family("net")
    base = modules[BASE].state_dict()
    states = {key: model.state_dict() | {STILL: base[STILL]} for key, model in modules.items()}
    for unchanged in "ac":
        fused = fuse(name, weights_of(states | {unchanged: base}))
        found = entries(fused)
        assert all(tensor.isfinite().all() for tensor in found.values())
        kept = {key: tensor for key, tensor in found.items() if key.endswith(STILL)}
        equal(name)(kept, dict.fromkeys(kept, base[STILL]))


@pytest.mark.parametrize("name", [name for name in PLAIN + VARIANTS if not special(name).ordered])
def test_the_order_of_the_models_is_irrelevant(name: str) -> None:
    modules = family("net")
    expected = entries(fuse(name, modules))
    for order in ("bca", "cba"):
        found = entries(fuse(name, {key: modules[key] for key in (BASE, *order)}))
        for key, want in expected.items():
            torch.testing.assert_close(found[key], want, rtol=1e-5, atol=1e-6)


@every
def test_entries_may_be_read_in_any_order_and_again(name: str) -> None:
    weights = chosen(name, as_weights(family("net")))
    merging = method(name)
    first, second = merging.run(Pool(weights)), merging.run(Pool(weights))
    forwards = {f"{m}:{key}": w[key] for m, w in members(first).items() for key in w}
    backwards = {
        f"{m}:{key}": w[key]
        for m, w in reversed(members(second).items())
        for key in reversed(list(w))
    }
    assert_same(backwards, forwards)
    assert_same(entries(first), forwards)
    assert_same(entries(fuse(name, family("net"))), forwards)


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_tells_what_is_drawn(name: str) -> None:
    weights = as_weights(family("net"))
    draws = special(name).draws
    drawn = [entries(fuse(name, weights, seed=seed, **draws)) for seed in range(6)]
    assert_same(entries(fuse(name, weights, seed=3, **draws)), drawn[3])
    assert len({str(all_bits(result)) for result in drawn}) > 1


@every
def test_it_leaves_the_shared_generator_alone(name: str) -> None:
    weights = as_weights(family("net"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, before = entries(fuse(name, weights)), torch.get_rng_state()
        torch.manual_seed(2)
        assert_same(entries(fuse(name, weights)), first)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), before)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    found = entries(fuse(name, family("net", dtype)))
    expected = entries(fuse(name, widened("net", dtype)))
    for key, tensor in found.items():
        assert tensor.dtype == (dtype if expected[key].dtype == torch.float32 else tensor.dtype)
    if method(name).elementwise:
        assert_same(found, {k: v.to(found[k].dtype) for k, v in expected.items()})
    assert_close(found, expected, 1e-6)


@every_variant
def test_pieces_and_threads_change_nothing(name: str) -> None:
    weights = as_weights(family("net"))
    with threads(1):
        expected = entries(fuse(name, weights))
    for piece, count in [(13, 1), (2**18, 2)]:
        with threads(count):
            found = in_small_pieces(fuse(name, weights), piece)
        agree(name)(found, expected)


@pytest.fixture(scope="module")
def checkpoints(
    drawn: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], HFModelPool]:
    """Write the families; return the function that opens as many of one as a method takes.

    Methods that take as many share the pool: to find the files takes longer than to merge.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def written(models: str, layout: str) -> dict[str, str]:
        return write_family(models, layout, root / models / layout)

    @cache
    def pool(models: str, layout: str, *names: str) -> HFModelPool:
        return open_pool(models, {name: written(models, layout)[name] for name in names})

    return lambda name, models, layout: pool(models, layout, *chosen(name, written(models, layout)))


@every
@pytest.mark.parametrize("models", ["clip", "llama"])
def test_how_checkpoints_are_cut_into_files_changes_nothing(
    name: str, models: str, checkpoints: Callable[[str, str, str], HFModelPool]
) -> None:
    expected = entries(fuse(name, family(models)))
    for layout in LAYOUTS:
        found = entries(method(name).run(checkpoints(name, models, layout)))
        assert found
        agree(name)(found, {key: expected[key] for key in found})


@every
def test_how_the_merged_model_is_cut_into_files_changes_nothing(name: str, tmp_path: Path) -> None:
    weights = as_weights(family("net"))
    fused = fuse(name, weights)
    expected = entries(fused)
    for size in ("5GB", 300):
        for member, merged in members(fused).items():
            folder = tmp_path / f"{size}{member}"
            folder.mkdir()
            write_checkpoint(merged, folder, max_shard_size=size)
            written = open_directory(folder)
            assert (len(written.files) > 1) == (size == 300)
            found = {f"{member}:{key}": written[key] for key in written}
            agree(name)(found, {key: expected[key] for key in found})


@every_variant
@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("b", "conv.weight", torch.nan),
        ("c", "logit_scale", -torch.inf),
        (BASE, "encoder.layers.0.weight", torch.inf),
    ],
)
def test_what_is_not_finite_is_noticed(name: str, where: str, key: str, value: float) -> None:
    states = {model: module.state_dict() for model, module in family("net").items()}
    if where not in chosen(name, states) or (where == BASE and not method(name).needs_pretrained):
        where = "a"
    broken = states[where][key].clone()
    broken.view(-1)[0] = value
    states[where] = states[where] | {key: broken}
    if key in special(name).ignores:
        assert torch.equal(entries(fuse(name, weights_of(states)))[f":{key}"], states[BASE][key])
        return
    with pytest.raises(FusionBenchError, match="NaN"):
        entries(fuse(name, weights_of(states)))


@every
def test_the_options_of_all_methods_come_last(name: str) -> None:
    given = inspect.signature(method_class(name)).parameters.values()
    last = [(own.name, own.default, own.kind) for own in given][-2:]
    anyhow = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert last == [("show_pbar", True, anyhow), ("inplace", False, anyhow)]


@every
def test_inplace_writes_to_one_model_alone(name: str) -> None:
    modules = chosen(name, {key: deepcopy(model) for key, model in family("net").items()})
    made = fuse(name, modules)
    expected = entries(made)
    before = state_bits(modules)
    if list(members(made)) != [""]:
        with pytest.raises(FusionBenchError, match=r"^inplace: \w+ makes \d models"):
            method(name, inplace=True).run(modules)
        assert state_bits(modules) == before
        return
    fused = method(name, inplace=True).run(modules)
    after = state_bits(modules)
    assert all_bits(members(fused)[""]) == after[BASE]
    assert_same(entries(fused), expected)
    assert {k: v for k, v in after.items() if k != BASE} == {
        k: v for k, v in before.items() if k != BASE
    }


DATA = [name for name in METHODS if kind(name) == "data"]
learning = pytest.mark.parametrize("name", DATA)


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def learn(name: str, modules: dict[str, nn.Module], fabric: Fabric, **options: Any) -> Any:
    """Merge models by a method that learns from data."""
    pool = TrainablePool(modules)
    dtype = next(iter(modules.values())).get_parameter(STILL).dtype
    data = {model: Task(ord(model), dtype) for model in pool.model_names}
    return method(name, **options).run(pool, fabric, data)


@learning
def test_learning_from_equal_models_gives_that_model(name: str, fabric: Fabric) -> None:
    base = family("net")[BASE]
    fused = learn(name, {BASE: base, "a": base, "b": base, "c": base}, fabric)
    assert_close(entries(fused), of_base(name, {BASE: base}, fused), 1e-4)


@learning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_learned_is_shaped_and_tied_like_the_base(
    name: str, fabric: Fabric, dtype: torch.dtype
) -> None:
    modules = family("net", dtype)
    base = modules[BASE].state_dict()
    like, before = TensorWeights(base), state_bits(modules)
    with torch.random.fork_rng():
        generator = torch.get_rng_state()
        fused = learn(name, modules, fabric)
        found = entries(fused)
        assert torch.equal(torch.get_rng_state(), generator)
    for weights in members(fused).values():
        assert list(weights) == list(base)
        assert all(weights.spec(key) == like.spec(key) for key in base)
        made = TensorWeights(in_memory(weights))
        assert all(made.tied_to(key) == like.tied_to(key) for key in base)
    for name_and_key, tensor in found.items():
        key = name_and_key.partition(":")[2]
        assert tensor.isfinite().all()
        if not tensor.dtype.is_floating_point:
            assert any(torch.equal(tensor, model.state_dict()[key]) for model in modules.values())
    assert state_bits(modules) == before
    assert_same(entries(learn(name, modules, fabric)), found)


@pytest.mark.parametrize("name", [name for name in DATA if not special(name).ordered])
def test_the_order_of_the_tasks_is_irrelevant(name: str, fabric: Fabric) -> None:
    modules = family("net")
    expected = entries(learn(name, modules, fabric))
    turned = {key: modules[key] for key in (BASE, *"cab")}
    assert_close(entries(learn(name, turned, fabric)), expected, 1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if kind(name) == "module"])
def test_a_module_of_equal_models_answers_as_they_do(name: str) -> None:
    modules = {key: deepcopy(model).eval() for key, model in family("net").items()}
    before, images = state_bits(modules), Task(0).batches(torch.arange(12), 12)
    batch, _ = next(images)
    with torch.no_grad():
        for use in (modules, TrainablePool(modules)):
            assert isinstance(method(name).run(use), nn.Module)
        together = method(name).run(TrainablePool(modules))(batch)
        turned = method(name).run({key: modules[key] for key in (BASE, *"cab")})(batch)
        alike = method(name).run({BASE: modules["a"], **dict.fromkeys("bc", modules[BASE])})(batch)
        torch.testing.assert_close(turned, together)
        torch.testing.assert_close(alike, modules[BASE](batch))
        assert not torch.allclose(together, modules[BASE](batch))
    assert state_bits(modules) == before


def made(build: Callable[[Any], Any], models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Merge models by a method that is built from `fusion_bench.method`, if it is there."""
    try:
        merging = build(fusion_bench.method)
    except AttributeError as error:
        if error.obj is not fusion_bench.method:
            raise
        pytest.skip(f"not there yet: {error.name}")
    return entries(merging.run(models))


#: What gives one and the same model, whatever the three models are.
IDENTITIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "task arithmetic with 1/T is the average": (
        lambda m: m.TaskArithmeticAlgorithm(1 / 3),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "equal weights give the average": (
        lambda m: m.WeightedAverageAlgorithm([2, 2, 2]),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "constant layer weights give the weighted average": (
        lambda m: m.WeightedAverageAlgorithm([1, 1, 1], layer_weights={"*": [0.5, 0.3, 0.2]}),
        lambda m: m.WeightedAverageAlgorithm([0.5, 0.3, 0.2]),
    ),
    "ExPO of no step is the average": (
        lambda m: m.ExPOAlgorithm(0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "dropping nothing is task arithmetic": (
        lambda m: m.DareTaskArithmetic(0.4, sparsity_ratio=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "dropping nothing is the average": (
        lambda m: m.DareSimpleAverage(sparsity_ratio=0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "dropping nothing is TIES": (
        lambda m: m.DareTiesMerging(0, scaling_factor=0.3, threshold=20, merge_func="sum"),
        lambda m: m.TiesMergingAlgorithm(0.3, threshold=20, merge_func="sum"),
    ),
    "DELLA that drops nothing is task arithmetic": (
        lambda m: m.DellaMerging(0.4, density=1, epsilon=0, merge="linear", merge_func="sum"),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "DELLA that drops nothing is TIES that trims nothing": (
        lambda m: m.DellaMerging(0.4, density=1, epsilon=0),
        lambda m: m.TiesMergingAlgorithm(0.4, threshold=100),
    ),
    "all breadcrumbs are task arithmetic": (
        lambda m: m.ModelBreadcrumbs(0.4, density=1, gamma=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "consensus of nobody is task arithmetic": (
        lambda m: m.ConsensusTaskArithmetic(0.4, k=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "stitching whole task vectors is the average": (
        lambda m: m.LocalizeAndStitch(density=1),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "LiNeS that does not grow is a factor": (
        lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(0.4), alpha=0.5, beta=0),
        lambda m: m.TaskArithmeticAlgorithm(0.2),
    ),
    "LiNeS gives task arithmetic the size of the average": (
        lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(0.4), alpha="auto", beta=0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "Iso-CTS without task spaces is Iso-C": (
        lambda m: m.ISO_CTS_Merge(common_space_fraction=1.0),
        lambda m: m.ISO_C_Merge(),
    ),
    "KnOTS that adds is task arithmetic": (
        lambda m: m.KnOTSMerging(m.TaskArithmeticAlgorithm(0.4)),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_two_methods_are_one(identity: str) -> None:
    left, right = IDENTITIES[identity]
    for models in ("net", "clip"):
        modules = family(models)
        assert_close(made(left, modules), made(right, modules), 1e-6)


#: What makes of the base and one model that model.
ONE: dict[str, Callable[[Any], Any]] = {
    "average": lambda m: m.SimpleAverageAlgorithm(),
    "WiSE-FT": lambda m: m.LinearInterpolationAlgorithm(1),
    "SLERP": lambda m: m.SlerpMergeAlgorithm(1),
    "multi-SLERP": lambda m: m.MultiSlerpAlgorithm(),
    "Karcher mean": lambda m: m.KarcherMeanAlgorithm(),
    "ExPO": lambda m: m.ExPOAlgorithm(0),
    "task arithmetic": lambda m: m.TaskArithmeticAlgorithm(1),
    "TIES": lambda m: m.TiesMergingAlgorithm(1, threshold=100),
    "MagMax": lambda m: m.MagMaxAlgorithm(1),
    "SCE": lambda m: m.SCEAlgorithm(),
    "DARE": lambda m: m.DareTaskArithmetic(1, sparsity_ratio=0),
    "NuSLERP": lambda m: m.NuSlerpAlgorithm(),
    "DELLA": lambda m: m.DellaMerging(1, density=1, epsilon=0),
    "breadcrumbs": lambda m: m.ModelBreadcrumbs(1, density=1, gamma=0),
    "stitching": lambda m: m.LocalizeAndStitch(density=1),
    "TALL masks": lambda m: m.TallMaskTaskArithmeticAlgorithm(),
    "consensus": lambda m: m.ConsensusTaskArithmetic(1, k=1),
    "EMR": lambda m: m.EMRMerging(),
    "OPCM": lambda m: m.OPCM(),
    "WUDI": lambda m: m.WUDIMerging(),
    "WUDI in closed form": lambda m: m.WUDIMerging(solver="lstsq"),
    "LiNeS": lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(1), alpha=1, beta=0),
    "TSV-M": lambda m: m.TaskSingularVectorMerging(),
}
#: What makes of the base and one model the base.
NONE: dict[str, Callable[[Any], Any]] = {
    "WiSE-FT": lambda m: m.LinearInterpolationAlgorithm(0),
    "SLERP": lambda m: m.SlerpMergeAlgorithm(0),
    "ExPO": lambda m: m.ExPOAlgorithm(-1),
    "task arithmetic": lambda m: m.TaskArithmeticAlgorithm(0),
    "TIES": lambda m: m.TiesMergingAlgorithm(0),
    "MagMax": lambda m: m.MagMaxAlgorithm(0),
    "DARE": lambda m: m.DareTaskArithmetic(1, sparsity_ratio=1),
}


@pytest.mark.parametrize(
    ("build", "end"),
    [
        pytest.param(build, end, id=f"{name}-{end}")
        for table, end in ((ONE, "a"), (NONE, BASE))
        for name, build in table.items()
    ],
)
def test_the_ends_of_a_method_are_its_models(build: Callable[[Any], Any], end: str) -> None:
    modules = family("net")
    found = made(build, {BASE: modules[BASE], "a": modules["a"]})
    expected = modules[end].state_dict()
    for name, tensor in found.items():
        key = name.partition(":")[2]
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_about_the_same(name: str) -> None:
    weights = chosen(name, as_weights(family("clip")))
    here = entries(method(name).run(Pool(weights)))
    there = entries(method(name).run(Pool(weights, MergePolicy(device="cuda"))))
    assert_close(there, here, 1e-4)
